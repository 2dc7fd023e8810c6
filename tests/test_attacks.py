"""Variants of attacks that no list named: each ends in one sentence, within seconds, without taking memory"""

import errno, io, json, os, random, shutil, signal, struct, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
import matplotlib.pyplot as plt, psutil, pyarrow as pa, pyarrow.parquet as pq, pytest
from PIL import Image
from fusion_notebooks import plots, study, vqa
from fusion_notebooks.core.images import open_image, picture_size
from fusion_notebooks.mllm import MLLM
from fusion_notebooks.mllm.loading import _check_folder
from fusion_notebooks.results import Store
from test_faults import mutate

ROOT = Path(__file__).parents[1]
GLYPH = ROOT / 'data/models/glyph-llava'
EXAMPLE, QUESTION = str(ROOT / 'data/example.png'), 'Which digit is on the purple star?'


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GLYPH, tmp_path / 'mine')
    return tmp_path / 'mine'


def renewed(file, **entries):
    "Put entries into a JSON file; `__` separates levels"
    tree = json.loads(file.read_text()) if file.exists() else {}
    for name, value in entries.items():
        *path, last = name.split('__')
        node = tree
        for step in path:
            node = node.setdefault(step, {})
        node[last] = value
    file.write_text(json.dumps(tree))


@contextmanager
def refused(said, kinds=(ValueError, OSError), seconds=60, megabytes=300):
    "Within the block one sentence is raised, soon and without taking memory"
    start, before = time.process_time(), psutil.Process().memory_info().rss
    with pytest.raises(kinds, match=said) as e:
        yield
    assert '\n' not in str(e.value) and len(str(e.value)) < 600
    assert time.process_time() - start < seconds
    assert psutil.Process().memory_info().rss - before < megabytes * 1e6


# the folder of a model

CONFIGS = {
    'text_config__num_hidden_layers': 'num_hidden_layers = 10000000 is more than the 1,000 layers',
    'vision_config__num_hidden_layers': 'num_hidden_layers = 10000000 is more than the 1,000 layers',
}


@pytest.mark.parametrize('entry', CONFIGS)
def test_layers_without_end(folder, entry):
    renewed(folder / 'config.json', **{entry: 10**7})
    with refused(CONFIGS[entry]):
        MLLM.load(folder)


@pytest.mark.parametrize(
    'entry, value',
    [
        ('num_additional_image_tokens', 10**9),
        ('image_processor__size', dict(height=10**5, width=10**5)),
        ('image_processor__size', dict(shortest_edge=10**6)),
        ('image_processor__crop_size', dict(height=10**5, width=10**5)),
    ],
)
def test_pixels_and_tokens_without_end(folder, entry, value):
    renewed(folder / 'processor_config.json', **{entry: value})
    with refused('of its processor is more than the'):
        MLLM.load(folder)


def test_a_processor_that_breaks(folder):
    renewed(folder / 'processor_config.json', patch_size=0.001)
    mllm = MLLM.load(folder)
    with refused('The processor of mine cannot make a prompt of this'):
        mllm.prompt(EXAMPLE, QUESTION)


def test_rules_that_make_a_text_longer_and_longer(folder):
    tenfold = dict(type='Replace', pattern=dict(Regex='.'), content=10 * 'a')
    renewed(folder / 'tokenizer.json', normalizer=dict(type='Sequence', normalizers=[tenfold] * 9))
    with refused('make a text 1,000,000,000 times as long'):
        MLLM.load(folder)


def test_a_regular_expression_without_end(folder):
    "The library in Rust panics, which is no `Exception`"
    split = dict(type='Split', pattern=dict(Regex='(a|a?)+$'), behavior='Isolated', invert=False)
    renewed(folder / 'tokenizer.json', pre_tokenizer=split)
    mllm = MLLM.load(folder)
    with refused('The processor of mine cannot make a prompt of this'):
        mllm.prompt(EXAMPLE, 4000 * 'a' + 'b')


HARMED = {
    'weights linked in a loop': lambda f: (
        (f / 'a.safetensors').symlink_to('b.safetensors'),
        (f / 'b.safetensors').symlink_to('a.safetensors'),
    ),
    'an index that is a list': lambda f: (f / 'model.safetensors.index.json').write_text('[]'),
    'an index of lists': lambda f: (f / 'model.safetensors.index.json').write_text('{"weight_map": [1]}'),
    'a config that is a list': lambda f: (f / 'config.json').write_text('[]'),
    'a number of 5000 digits': lambda f: (f / 'config.json').write_text('{"x": ' + 5000 * '9' + '}'),
    'a config nested without end': lambda f: (f / 'config.json').write_text(200_000 * '{"a":'),
    'a tokenizer of 2 GB': lambda f: os.truncate(f / 'tokenizer.json', 2 * 10**9),
    'a folder with the name of a file': lambda f: (f / 'vocab.json').mkdir(),
    'a link to an endless device': lambda f: (f / 'added_tokens.json').symlink_to('/dev/zero'),
}


@pytest.mark.parametrize('what', HARMED)
def test_folders(folder, what):
    HARMED[what](folder)
    with refused('mine', seconds=20):
        MLLM.load(folder)


def test_an_index_of_a_million_entries(folder):
    shards = {f'x.{i}': 'model.safetensors' for i in range(10**6)}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=shards)))
    start = time.process_time()
    _check_folder(folder, False)
    assert time.process_time() - start < 60


def test_pipes_do_not_hang_a_revision(folder):
    os.mkfifo(folder / 'x.json')
    with refused('not a regular file'):
        study.samples.revision(folder)


def test_an_adapter_that_is_its_own_base(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/adapter_config.json').write_text(json.dumps(dict(base_model_name_or_path=str(tmp_path / 'a'))))
    (tmp_path / 'a/adapter_model.safetensors').write_bytes(b'')
    for read in (MLLM.load, study.samples.revision):
        with refused('is an adapter, too'):
            read(tmp_path / 'a')


# pictures


def saved(form, *images, **kw):
    images[0].save(data := io.BytesIO(), form, **kw)
    return bytearray(data.getvalue())


def tiff_of_pages(n, loop=False):
    data = saved('TIFF', Image.new('L', (2, 2)))
    first = struct.unpack('<I', data[4:8])[0]
    entries = struct.unpack('<H', data[first : first + 2])[0]
    end, size = first + 2 + 12 * entries, 6 + 12 * entries
    page, place = bytes(data[first:end]), len(data)
    data[end : end + 4] = struct.pack('<I', first if loop else place)
    for k in range(0 if loop else n):
        data += page + struct.pack('<I', place + (k + 1) * size if k < n - 1 else 0)
    return bytes(data)


def gif_of_frames(n):
    data = bytes(saved('GIF', Image.new('P', (2, 2))))
    frame = data.index(b'\x2c')
    return data[:frame] + n * data[frame:-1] + b';'


def exif(*entries):
    return b'Exif\0\0II*\0\x08\0\0\0' + struct.pack('<H', len(entries)) + b''.join(entries) + bytes(4)


LOOP_IN_EXIF = exif(struct.pack('<HHII', 0x112, 3, 1, 6), struct.pack('<HHII', 0x8769, 4, 1, 8))
COUNT_IN_EXIF = exif(struct.pack('<HHII', 0x112, 5, 0x7FFFFFFF, 8))
MADE = {
    'a TIFF of 100,000 pages': lambda: tiff_of_pages(100_000),
    'a TIFF whose pages are a loop': lambda: tiff_of_pages(1, loop=True),
    'a GIF of 300,000 frames': lambda: gif_of_frames(300_000),
    'EXIF data in a loop': lambda: saved('JPEG', Image.new('RGB', (40, 60)), exif=LOOP_IN_EXIF),
    'EXIF data that says two billion': lambda: saved('JPEG', Image.new('RGB', (40, 60)), exif=COUNT_IN_EXIF),
    'a PNG with EXIF data that says two billion': lambda: saved('PNG', Image.new('RGB', (4, 6)), exif=COUNT_IN_EXIF),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('what', MADE)
def test_pictures_that_are_read(tmp_path, what):
    (tmp_path / 'x.png').write_bytes(MADE[what]())
    start, before = time.process_time(), psutil.Process().memory_info().rss
    assert open_image(tmp_path / 'x.png').size == picture_size(tmp_path / 'x.png')
    assert time.process_time() - start < 20
    assert psutil.Process().memory_info().rss - before < 300e6


@pytest.mark.parametrize(
    'data',
    [
        b'P6 #' + 100_000_000 * b'a' + b'\n4 4 255 ' + bytes(48),
        b'P6 ' + 100_000_000 * b'#\n' + b'4 4 255 ' + bytes(48),
        b'P3 9999 9999 255 ' + 30_000_000 * b'1 ',
    ],
    ids=['one long comment', 'many comments', 'numbers as text'],
)
def test_a_ppm_that_takes_minutes(tmp_path, data):
    (tmp_path / 'x.png').write_bytes(data)
    for given in (tmp_path / 'x.png', data):
        with refused('damaged or truncated|as text', seconds=20):
            open_image(given)


# tables


def loaded(folder, name, data):
    Image.new('RGB', (40, 40)).save(folder / 'a.png')
    (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return vqa.load(folder / name, 'all')


def json_row(**entries):
    row = dict(image='a.png', question='what?', answers=['red'])
    return json.dumps([row | entries])


TABLES = {
    'half a character in a question': ('t.json', json_row(question='what \ud800?')),
    'half a character in an answer': ('t.json', json_row(answers=['\ud800'])),
    'half a character in an id': ('t.json', json_row(id='\ud800')),
    'half a character in a name': ('t.json', json_row(image='\ud800.png')),
    'an id of 5000 digits': ('t.json', '[{"id": ' + 5000 * '9' + '}]'),
    'an id of 5000 digits in a line': ('t.jsonl', '{"id": ' + 5000 * '9' + '}\n'),
    'a box of 400 digits': ('t.json', json_row(box=[0, 0, 1, 10**400])),
    'a box of 400 digits in a cell': ('t.csv', f'image,question,answers,box\na.png,what?,red,"[0,0,1,1{400 * "0"}]"\n'),
    'lists without end': ('t.json', 10**6 * '['),
    'objects without end in a line': ('t.jsonl', 10**5 * '{"a":' + '\n'),
    'a nul in the name of a picture': ('t.csv', 'image,question,answers\na.png\0,what?,red\n'),
    'a column with a long name': ('t.csv', 10**6 * 'x' + ',question,answers\na.png,what?,red\n'),
    'UTF-16': ('t.csv', 'image,question,answers\na.png,what?,red\n'.encode('utf-16')),
    'an id that steers a terminal': ('t.csv', 'image,question,answers,id\n' + 2 * 'a.png,what?,red,"\x1b[2J"\n'),
}


@pytest.mark.parametrize('what', TABLES)
def test_tables(tmp_path, what):
    with refused(TABLES[what][0]):
        loaded(tmp_path, *TABLES[what])


@pytest.mark.parametrize('name', ['t.csv', 't.json', 't.jsonl', 't.tsv'])
def test_a_table_of_4_gb(tmp_path, name):
    (tmp_path / name).write_bytes(b'[')
    os.truncate(tmp_path / name, 4 * 10**9)
    with refused('4,000,000,000 bytes, more than the 1,000,000,000 allowed'):
        vqa.load(tmp_path / name)


def test_a_parquet_file_of_few_bytes_and_many_rows(tmp_path):
    Image.new('RGB', (40, 40)).save(tmp_path / 'a.png')
    n = 3_000_000
    columns = {name: [text] for name, text in dict(image='a.png', question=1000 * 'w', answers='red').items()}
    indices = pa.array([0]).take(pa.array([0] * n))
    table = {name: pa.DictionaryArray.from_arrays(indices, pa.array(v)) for name, v in columns.items()}
    pq.write_table(pa.table(table), tmp_path / 't.parquet', row_group_size=n)
    assert (tmp_path / 't.parquet').stat().st_size < 1e6
    with refused('t.parquet', seconds=200, megabytes=3000):  # 3 GB of text, and each row a dict
        vqa.load(tmp_path / 't.parquet')


# the store

JUNK = ['[]', '{}', '{', '1', '"x"', 5000 * '9', 10**5 * '[', '{"key": 1, "cause": 2, "id": {}}', '\xff\xfe']


@pytest.mark.parametrize('junk', JUNK, ids=range(len(JUNK)))
def test_small_files_of_the_store(tmp_path, junk):
    store, key = Store(tmp_path / 'r'), dict(unit=1)
    store.folder.mkdir()
    for ending in ('.failed', '.json', '.lock'):
        store.path(key).with_suffix(ending).write_bytes(junk.encode('latin-1'))
    assert store.failure(key) == store.failures() == {}
    with pytest.warns(UserWarning, match='made again'):
        assert store.memo(key, lambda: [1]) == [1]
    with store.claim(key) as deaths:
        assert set(deaths) <= {'memory', 'crash', 'killed'}


def test_a_record_of_a_failure_is_read_again(tmp_path):
    store, key = Store(tmp_path / 'r'), dict(unit=1)
    store.fail(key, 'No room.', True)
    assert store.failure(key)['cause'] == 'No room.' and store.failure(key)['input'] and len(store.failures()) == 1


@pytest.mark.parametrize('text', ['[1]', '{', '5', 10**5 * '['])
def test_parts_that_say_odd_keys(tmp_path, text):
    store = Store(tmp_path / 'r')
    store.folder.mkdir()
    odd = pa.table(dict(score=[1.0])).replace_schema_metadata(dict(key=text, columns='score: double'))
    pq.write_table(odd, store.path(dict(unit=1)))
    assert store.keys() == [] and store.read().empty


# figures


def test_a_full_disk_leaves_no_half_figure(tmp_path, monkeypatch):
    figure = plt.figure()

    def full(path, data):
        with open(path, 'wb') as f:
            f.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, 'No space left on device')

    with monkeypatch.context() as m:
        m.setattr(Path, 'write_bytes', full)
        with refused('No space left'):
            plots.save(figure, tmp_path, 'a', {})
    assert not list(tmp_path.iterdir())
    assert plots.save(figure, tmp_path, 'a', {}).exists() and len(list(tmp_path.iterdir())) == 3


def test_damaged_figures_are_drawn_again(tmp_path):
    figure = plt.figure()
    whole = plots.save(figure, tmp_path, 'a', {}).read_bytes()
    rng = random.Random(0)
    for _ in range(20):
        (tmp_path / 'a.png').write_bytes(mutate(whole, rng))
        assert Image.open(plots.save(figure, tmp_path, 'a', {})).load()


# the command

FUSION = [sys.executable, '-c', 'import sys; from fusion_notebooks.cli import main; sys.exit(main())']


def command(*argv, **kw):
    env = os.environ | dict(PYTHONPATH=str(ROOT)) | kw.pop('env', {})
    return subprocess.run([*FUSION, *argv], stderr=subprocess.PIPE, env=env, timeout=300, **kw)


@pytest.mark.parametrize('argv', [['status'], ['--help'], ['--version'], ['status', '--json']])
def test_a_reader_that_leaves(argv):
    "As `| head` does"
    reader, writer = os.pipe()
    os.close(reader)
    done = command(*argv, stdout=writer, cwd=ROOT)
    os.close(writer)
    codes = [128 + signal.SIGPIPE, *([1] if argv == ['--help'] else [])]  # help is printed by rich
    assert done.returncode in codes and not done.stderr


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_output_on_a_full_disk():
    with open('/dev/full', 'w') as full:
        done = command('status', stdout=full, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count(b'\n') == 1 and b'No space left' in done.stderr


def test_output_that_is_closed():
    done = command('status', stdout=None, cwd=ROOT, preexec_fn=lambda: os.close(1))
    assert done.returncode == 0 and not done.stderr


def test_a_terminal_of_few_characters():
    done = command('status', stdout=subprocess.PIPE, cwd=ROOT, env=dict(PYTHONIOENCODING='ascii'))
    assert done.returncode == 0 and done.stdout.isascii() and not done.stderr


def test_a_folder_that_is_gone(tmp_path):
    gone = tmp_path / 'gone'
    gone.mkdir()
    done = command('status', stdout=subprocess.PIPE, cwd=gone, preexec_fn=lambda: os.rmdir(gone))
    assert done.returncode in (0, 2) and b'Traceback' not in done.stderr


def test_words_that_steer_a_terminal(tmp_path):
    done = command('status', '--settings', 'no\x1b[2Jsuch\x07.ini', stdout=subprocess.PIPE, cwd=tmp_path)
    assert done.returncode == 2 and b'\x1b' not in done.stderr and done.stderr.count(b'\n') == 1
