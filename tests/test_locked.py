"""Locked doors: work without end, sentences and exit codes, processes, words that reach a machine. `pytest -m faults tests/test_locked.py` runs the fuzzing, too,
and prints what was tried; weights that lie elsewhere are in test_loading, bombs in test_pictures, the store's notes in test_results."""

import base64, contextlib, io, json, os, random, re, shutil, signal, string, struct, subprocess, sys, time, zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import psutil, pytest, torch
from PIL import Image
from fusion_notebooks import demo, study, vqa
from fusion_notebooks.cli import main
from fusion_notebooks.core import templates
from fusion_notebooks.core.errors import attempt, BadInput, NotSupported
from fusion_notebooks.core.images import MAX_PIXELS, open_image, picture_size
from fusion_notebooks.hooks import capture, edit
from fusion_notebooks.mllm import MLLM, handle, loading
from fusion_notebooks.mllm.memory import digest
from fusion_notebooks.results import Store
from test_faults import Study, compare, harm, mutate, one_line, want  # noqa: F401

ROOT = Path(__file__).parents[1]
GLYPH = ROOT / 'data/models/glyph-llava'
EXAMPLE, QUESTION = str(ROOT / 'data/example.png'), 'Which digit is on the purple star?'
often = pytest.mark.often
FIGURES = Counter()  # printed at the end


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GLYPH, tmp_path / 'mine')
    return tmp_path / 'mine'


def renewed(folder, **entries):
    file = folder / 'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.fixture
def says(capsys):
    "The one line of a command that ends with exit code 2"

    def says(*argv):
        try:
            code = main([str(a) for a in argv])
        except SystemExit as e:
            code = e.code
        err = capsys.readouterr().err
        assert code == 2 and err.startswith('fusion: ') and err.count('\n') == 1 and len(err) < 600, (code, err)
        return err

    return says


# work without end

LOOPS = '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}'
GROWN = "{% set all = namespace(x=['x'], y=['x']) %}{% for i in range(60) %}{% set all.x = [all.x, all.x] %}{% set all.y = [all.y, all.y] %}{% endfor %}"
LATE, LARGE = 'it takes longer than 0.5 seconds', 'it takes more memory than it may'
TEMPLATES = {  # each of those in the second and third group is one step of the interpreter
    LOOPS: LATE,
    "{% for i in range(30000) %}{{ 'x' * 1000 }}{% endfor %}": 'it makes 30,000,000 characters, more than the 1,000,000 allowed',
    '{{ lipsum(n=10**9) }}': LATE,
    '{{ 10**(10**8) }}': LATE,
    '{{ (10**(10**7)) * (10**(10**7)) }}': LATE,
    GROWN + '{{ all.x | tojson }}': LATE,
    GROWN + '{{ all.x }}': LATE,
    GROWN + '{{ all.x == all.y }}': LATE,
    "{{ 'x' * 10**10 }}": LARGE,
    "{{ 'x' | center(10**10) }}": LARGE,
    "{{ 'x'.ljust(10**10) }}": LARGE,
    "{{ '%1000000000d' | format(3) }}": LARGE,
    "{{ '{:>10000000000}'.format(1) }}": LARGE,
    "{{ ('x' * 10**6).replace('x', 'y' * 10**6) }}": LARGE,
    "{{ range(99999) | join('x' * 10**5) }}": LARGE,
    "{% set all = namespace(x='xx') %}{% for i in range(60) %}{% set all.x = all.x ~ all.x %}{% endfor %}": LARGE,
    '{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}': 'RecursionError',
    '{{ ' + 5000 * '(' + 5000 * ')' + ' }}': 'RecursionError',
    "{{ '\\ud800' }}": 'UnicodeEncodeError',
    '{{ 1 }}' + ' ' * 1_000_000: 'has 1,000,007 characters, more than the 1,000,000 allowed',
}


@pytest.fixture(scope='module')
def glyph():
    return MLLM.load('glyph-llava')


@pytest.mark.parametrize('template', TEMPLATES)
def test_templates_have_limits(glyph, template, monkeypatch):
    "Nothing in a template keeps this process busy or takes its memory, and the next one is filled in"
    monkeypatch.setattr(handle, 'SECONDS', 0.5 if TEMPLATES[template] == LATE else 10)
    if TEMPLATES[template] == LARGE and sys.platform != 'linux':
        pytest.skip('memory is limited on Linux')
    glyph.prompt(EXAMPLE, QUESTION)  # the process that fills in is there
    with monkeypatch.context() as m, pytest.raises(BadInput, match=re.escape(TEMPLATES[template])):
        m.setattr(glyph.processor, 'chat_template', template)
        start, before = time.monotonic(), psutil.Process().memory_info().rss
        glyph.prompt(EXAMPLE, QUESTION)
    assert time.monotonic() - start < 300
    assert psutil.Process().memory_info().rss - before < 100e6
    assert glyph.prompt(EXAMPLE, QUESTION).length


def test_a_hostile_template_on_the_command_line(folder, says, monkeypatch):
    (folder / 'chat_template.jinja').write_text("{{ 'x' * 10**10 }}")
    assert 'chat template of mine' in says('ask', folder, EXAMPLE, QUESTION)


def test_a_template_in_another_thread(glyph, monkeypatch):
    monkeypatch.setattr(handle, 'SECONDS', 0.5)
    monkeypatch.setattr(glyph.processor, 'chat_template', LOOPS)
    with ThreadPoolExecutor(2) as pool:
        for late in [pool.submit(glyph.prompt, EXAMPLE, QUESTION) for _ in range(2)]:
            with pytest.raises(BadInput, match=LATE):
                late.result()


def test_the_process_that_fills_in_templates(glyph):
    "It is begun again where it was killed, a fork begins its own, and it ends with its parent"
    n = glyph.prompt(EXAMPLE, QUESTION).length
    first = templates._filler.process.pid
    os.kill(first, signal.SIGKILL)
    templates._filler.process.wait()
    assert glyph.prompt(EXAMPLE, QUESTION).length == n and templates._filler.process.pid != first
    code = (
        'import os, sys, time',
        'from fusion_notebooks.core.templates import fill_in, _filler',
        "assert fill_in('{{ 1 }}', []) == '1'",
        'mine = _filler.process.pid',
        'pid = os.fork()',
        'if not pid:',
        "    os._exit(not (fill_in('{{ 2 }}', []) == '2' and _filler.process.pid != mine))",
        'assert os.waitpid(pid, 0)[1] == 0',
        "assert fill_in('{{ 3 }}', []) == '3' and _filler.process.pid == mine",
        'print(mine, flush=True)',
        'os.kill(os.getpid(), 9)',
    )
    p = subprocess.run([sys.executable, '-c', '\n'.join(code)], capture_output=True, text=True, cwd=ROOT)
    assert p.returncode == -9, p.stderr
    with contextlib.suppress(psutil.NoSuchProcess):
        gone_within([psutil.Process(int(p.stdout))], 5)


def test_prompts_longer_than_the_positions(folder):
    mllm = MLLM.load(folder)
    n = mllm.prompt(EXAMPLE, QUESTION).length
    mllm.model.config.get_text_config().max_position_embeddings = n
    assert mllm.prompt(EXAMPLE, QUESTION).length == n
    mllm.model.config.get_text_config().max_position_embeddings = n - 1
    with pytest.raises(BadInput, match=f'has {n} tokens, more than the {n - 1} positions of mine'):
        mllm.prompt(EXAMPLE, QUESTION)
    with pytest.raises(BadInput, match='characters, more than'):
        mllm.prompt(EXAMPLE, 'why ' * 500_000)


@pytest.mark.parametrize('key', ['calibration', 'evaluation', 'unit', 'timeout'])
def test_settings_have_bounds(tmp_path, key, says):
    s = Study(tmp_path)
    text = s.ini.read_text()
    s.ini.write_text(text + f'[quick]\n{key} = 999999999999\n')
    assert f'[quick]: {key} = 999999999999 is more than the' in says('status', '--settings', s.ini)
    s.ini.write_text(text + '# ' + 20_000_000 * 'x')
    assert 'more than the 1,000,000 allowed' in says('status', '--settings', s.ini)
    s.ini.unlink()
    os.mkfifo(s.ini)
    assert 'No settings at' in says('status', '--settings', s.ini)


# sentences


@pytest.mark.parametrize('device', ['bogus', 'meta', 'cuda:x', '', 'cuda:99', 'xla'])
def test_devices_that_are_not_there(device, says):
    said = says('demo', 'eval', 'glyph-llava', '--n', 1, '--device', device)
    assert f"'{device}'" in said or f'device = {device} ' in said


QUANTIZED = dict(
    bitsandbytes=dict(quantization_config=dict(quant_method='bitsandbytes', load_in_4bit=True)),
    gptq=dict(quantization_config=dict(quant_method='gptq', bits=4)),
    awq=dict(quantization_config=dict(quant_method='awq', bits=4)),
    fp8=dict(quantization_config=dict(quant_method='fp8')),
    unknown=dict(quantization_config=dict(quant_method='nosuch')),
    flash=dict(attn_implementation='flash_attention_2'),
    flash_hidden=dict(_attn_implementation='flash_attention_2'),
)


@pytest.mark.parametrize('what', QUANTIZED)
def test_configs_that_want_what_is_not_here(folder, what, says, capsys):
    renewed(folder, **QUANTIZED[what])
    if main(['ask', str(folder), EXAMPLE, QUESTION, '--out', str(folder / 'x.png')]) == 0:
        assert what in ('flash', 'flash_hidden', 'unknown')  # transformers leaves such an entry alone
        return
    capsys.readouterr()
    assert 'mine' in says('ask', folder, EXAMPLE, QUESTION)


@pytest.mark.parametrize(
    'argv', [['ask', 'glyph-llava', EXAMPLE], ['doctor'], ['study', '--models'], ['status', '--settings']]
)
def test_arguments_that_are_not_text(argv, says):
    assert 'is not UTF-8 text' in says(*argv, os.fsdecode(b'what \xff\xfe?'))
    with pytest.raises(BadInput, match='not UTF-8'):
        MLLM.load('glyph-llava').prompt(EXAMPLE, os.fsdecode(b'what \xff?'))


@pytest.mark.parametrize('name', ['~nosuchuser/x', '~nosuchuser', 'x' * 5000, '../nosuch/y/z', 'a\nb', '/'])
def test_names_that_are_no_models(name, says, tmp_path):
    for argv in (['ask', name, EXAMPLE, QUESTION], ['doctor', name]):
        says(*argv)
    says('ask', 'glyph-llava', name, QUESTION)


@pytest.mark.parametrize('column', ['answers', 'box'])
def test_lists_without_end(tmp_path, column):
    Image.new('RGB', (40, 40)).save(tmp_path / 'a.png')
    row = dict(image='a.png', question='What?', answers='["red"]', box='[0, 0, 9, 9]') | {column: '[' * 200_000}
    cells = ['"' + v.replace('"', '""') + '"' for v in row.values()]
    (tmp_path / 'mine.csv').write_text(','.join(row) + '\n' + ','.join(cells) + '\n')
    with pytest.raises(ValueError, match='mine.csv, row 0') as e:
        vqa.load(tmp_path / 'mine.csv')
    assert len(str(e.value)) < 400


# words that reach a machine


@pytest.mark.faults
@pytest.mark.parametrize('name', [pytest.param('we{ird}{quick}', marks=often), '{}', '{model!r:>99}', '}{'])
def test_braces_in_the_names_of_folders(tmp_path, name):
    "Papermill fills in what stands in braces"
    (tmp_path / name).mkdir()
    model = tmp_path / name / 'a{quick}b'
    model.mkdir()
    (model / 'config.json').write_text('{"num_hidden_layers": 4}')
    (model / 'model.safetensors').write_bytes(b'weights')
    s = Study(tmp_path / name, samples=8, model=model).notebook('print(model)')
    code, out, err = s.run('study', '--settings', s.ini)
    assert code == 0, err
    done = s.folder / 'runs' / model.name / 'early_exit.ipynb'
    assert str(model) in done.read_text() and not list(tmp_path.rglob('runs/False*'))


# processes


def family(pid):
    "A process and all that came of it"
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def alive(processes):
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def gone_within(processes, seconds):
    "None of them is there any more when the time is up"
    end = time.monotonic() + seconds
    while alive(processes) and time.monotonic() < end:
        time.sleep(0.05)
    left = alive(processes)
    FIGURES['processes left'] += len(left)
    FIGURES['processes that had to end'] += len(processes)
    assert not left, [p.cmdline() for p in left]


def begun(mark, p):
    "Wait until a process has made a file"
    end = time.monotonic() + 300
    while not mark.exists() and p.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert mark.exists(), p.communicate()


def in_a_notebook(s, *args):
    "A study whose notebook has begun, and its processes"
    mark = s.folder / 'begun'
    s.notebook(f'import time; open({str(mark)!r}, "a").close(); time.sleep(300)')
    p = s.start('study', '--settings', s.ini, *args)
    begun(mark, p)
    return p, family(p.pid)


@pytest.mark.faults
@pytest.mark.parametrize(
    'workers, number',
    [
        (1, signal.SIGKILL),
        pytest.param(2, signal.SIGKILL, marks=often),
        (2, signal.SIGHUP),
        (2, signal.SIGQUIT),
        (2, signal.SIGABRT),
    ],
)
def test_a_killed_study_leaves_no_process(tmp_path, workers, number):
    p, all_of_it = in_a_notebook(Study(tmp_path, samples=8), '--workers', workers)
    assert any('ipykernel' in ' '.join(x.cmdline()) for x in alive(all_of_it))
    p.send_signal(number)
    p.communicate(timeout=200)
    gone_within(all_of_it, 5)


@pytest.mark.faults
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('workers', [pytest.param(1, marks=often), 2])
def test_signals_are_graceful_in_notebooks(tmp_path, workers, number):
    s = Study(tmp_path, samples=8)
    p, all_of_it = in_a_notebook(s, '--workers', workers)
    (os.kill if number == signal.SIGTERM else os.killpg)(p.pid, number)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 130
    one_line(err, 'what was finished is kept, and the same command goes on')
    gone_within(all_of_it, 5)
    assert not list(s.folder.glob('runs/*/*.json')) and not list(s.folder.rglob('*.tmp'))


@pytest.mark.faults
@pytest.mark.parametrize('workers', [1, 2])
def test_sigterm_while_a_model_loads_and_while_units_run(tmp_path, want, workers):
    for env, sign in ((dict(FAKE_LOAD=3), 'log.loads'), (dict(FAKE_SECONDS=0.5), 'log')):
        s = Study(tmp_path / next(iter(env))).notebook()
        p = s.start('study', '--settings', s.ini, '--workers', workers, **env)
        begun(s.folder / sign, p)
        all_of_it = family(p.pid)
        os.kill(p.pid, signal.SIGTERM)
        out, err = p.communicate(timeout=300)
        assert p.returncode in (0, 130) and 'Traceback' not in err, err
        gone_within(all_of_it, 5)
        assert s.run('study', '--settings', s.ini)[0] == 0
        compare(s.table(), want)


# fuzzing


def tried(kind, crashes, n):
    FIGURES[f'{kind} tried'] += n
    FIGURES['crashes'] += len(crashes)
    assert not crashes, (len(crashes), crashes[:4])


def one_sentence(do, *args):
    "What is wrong with how something was refused; nothing where it was not, or well"
    try:
        do(*args)
    except (ValueError, OSError) as e:
        said = str(e)
        if isinstance(e, (BadInput, NotSupported, OSError)) or said.rstrip().endswith('.'):
            return None if len(said) < 2000 else f'{len(said)} characters'
        return repr(e)
    except Exception as e:
        return repr(e)


@pytest.mark.faults
@pytest.mark.filterwarnings('ignore')
def test_many_configs(folder):
    rng, crashes = random.Random(0), []
    files = [
        'config.json',
        'preprocessor_config.json',
        'processor_config.json',
        'tokenizer_config.json',
        'generation_config.json',
    ]
    there = {f: (folder / f).read_bytes() for f in files if (folder / f).exists()}
    for k in range(150):
        name = rng.choice([*there])
        tree = json.loads(there[name])
        harm(tree, rng)
        (folder / name).write_text(json.dumps(tree))
        if wrong := one_sentence(MLLM.load, folder):
            crashes.append((name, wrong, {k: v for k, v in tree.items() if v != json.loads(there[name]).get(k)}))
        (folder / name).write_bytes(there[name])
    tried('harmed configs', crashes, 150)


@pytest.mark.faults
def test_many_templates(folder, monkeypatch):
    monkeypatch.setattr(handle, 'SECONDS', 2)
    mllm, rng, crashes = MLLM.load(folder), random.Random(1), []
    text = mllm.processor.chat_template
    slow = 0
    for k in range(150):
        broken = mutate(text.encode(), rng).decode('utf-8', 'replace')
        mllm.processor.chat_template = rng.choice(
            [broken, broken + LOOPS, "{{ 'x' * 3000000 }}"] if k % 10 == 0 else [broken]
        )
        start = time.monotonic()
        if wrong := one_sentence(mllm.prompt, EXAMPLE, QUESTION):
            crashes.append((mllm.processor.chat_template, wrong))
        slow += time.monotonic() - start > 60  # two seconds, and a process begun anew, on a busy machine
    FIGURES['hangs'] += slow
    tried('harmed templates', crashes, 150)
    assert not slow


@pytest.mark.faults
def test_many_gates(folder, tmp_path):
    shutil.copytree(ROOT / 'data/models/planted-3', tmp_path / 'planted') if (
        ROOT / 'data/models/planted-3'
    ).is_dir() else None
    planted = tmp_path / 'planted'
    if not (planted / 'gate.safetensors').exists():
        pytest.skip('no planted model comes along')
    rng, crashes, whole = random.Random(2), [], (planted / 'gate.safetensors').read_bytes()
    for _ in range(60):
        (planted / 'gate.safetensors').write_bytes(mutate(whole, rng))
        if wrong := one_sentence(MLLM.load, planted):
            crashes.append(wrong)
    tried('harmed gates', crashes, 60)


WORDS = [
    '--limit',
    '--share',
    '--seed',
    '--tolerance',
    '--workers',
    '--models',
    '--settings',
    '--quick',
    '--',
    '-h',
    '--n',
    '--device',
    '--out',
    '--json',
    '--card',
    '--all',
]


@pytest.mark.faults
def test_many_command_lines(tmp_path, capsys, monkeypatch):
    "No argument ends in a traceback, and what is wrong is exit code 2"
    s, rng, crashes, wrong = Study(tmp_path).notebook(), random.Random(3), [], 0
    n = 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr(demo, 'evaluate', lambda *a, **kw: {})
    odd = [
        '²',
        'nan',
        'inf',
        '-1',
        '9' * 30,
        '',
        ' ',
        '\0',
        '~nosuchuser/x',
        'é',
        '../..',
        '/dev/null',
        '/dev/zero',
        os.fsdecode(b'\xff'),
        '\n',
        str(s.ini),
        'glyph-llava',
        '1',
        '0.5',
    ]
    for _ in range(1000):
        command = rng.choice(
            ['status', 'verify', 'compact', 'ask', 'doctor', 'demo eval', 'nothing', 'study --dry-run']
        )
        argv = command.split() + [rng.choice(WORDS if rng.random() < 0.4 else odd) for _ in range(rng.randrange(5))]
        if {'glyph-llava', '--all'} & {*argv} and command in ('ask', 'doctor'):
            continue  # would do its work
        n += 1
        try:
            code = main(argv)
        except SystemExit as e:
            code = e.code or 0
        except Exception as e:
            crashes.append((argv, repr(e)))
            continue
        out, err = capsys.readouterr()
        if code not in (0, 1, 2) or code == 2 and (not err.startswith('fusion: ') or err.count('\n') != 1):
            wrong += 1
            crashes.append((argv, code, err))
    FIGURES['wrong exit codes or sentences'] += wrong
    tried('command lines', crashes, n)


@pytest.mark.faults
def test_many_numbers_in_settings(tmp_path):
    s, rng, crashes = Study(tmp_path).notebook(), random.Random(4), []
    text = s.ini.read_text()
    for _ in range(1000):
        value = ''.join(rng.choice(string.digits + '-+.e²٣_ \t%${}[]=#;') for _ in range(rng.randrange(1, 20)))
        s.ini.write_text(
            text
            + f'[quick]\n{rng.choice(["unit", "timeout", "seed", "calibration", "evaluation", "mixed"])} = {value}\n'
        )
        if wrong := one_sentence(study.read_settings, s.ini, True):
            crashes.append((value, wrong))
    tried('settings', crashes, 1000)


ODD_SHARDS = [
    '../other.safetensors',
    '/tmp/other.safetensors',
    'pytorch_model.bin',
    'a/b.safetensors',
    '',
    '.',
    '..',
    5,
]
ODD_SHARDS += [None, [], {}, 'x' * 5000 + '.safetensors', 'a\0.safetensors', '~/x.safetensors', 'file:///x.safetensors']
ODD_SHARDS += ['missing.safetensors', 'pipe.safetensors', 'link.safetensors', 'loop.safetensors', '\ud800.safetensors']
ODD_NAMES = ['added_tokens.json', 'x.json', 'x.jinja', 'vocab.txt', 'spiece.model', 'other.safetensors']


def odd_file(file, folder, rng):
    "Put something into a folder that nobody should read"
    match rng.randrange(5 if file.suffix == '.safetensors' else 6):  # weights may be large
        case 0:
            os.mkfifo(file)
        case 1:
            file.symlink_to(rng.choice(['/dev/zero', '/dev/urandom', '/proc/self/mem', '/etc/passwd', '/etc']))
        case 2:
            file.symlink_to(file.name)  # a loop
        case 3:
            file.symlink_to(folder.parent / 'outside')
        case 4:
            file.mkdir()
        case 5:
            file.write_bytes(b'')
            os.truncate(file, 10**12)


@pytest.mark.faults
def test_many_places_of_weights(folder):
    "Whatever an index names, and whatever lies in a folder: what is not a file of the folder is refused, and nothing waits for it"
    rng, crashes, slow = random.Random(5), [], 0
    (folder.parent / 'outside').write_bytes(b'weights')
    index, names = folder / 'model.safetensors.index.json', ['a', 'b', 'c']
    loading._check_folder(folder, False)
    for k in range(600):
        odd = folder / rng.choice(ODD_NAMES)
        if k % 2:
            shards = {name: 'model.safetensors' for name in names} | {rng.choice(names): rng.choice(ODD_SHARDS)}
            tree = rng.choice([shards, shards, shards, [*shards], None, 'x', 7, {'a': {'b': 'c'}}])
            index.write_text(rng.choice(['{', '[1]', '']) if rng.random() < 0.05 else json.dumps(dict(weight_map=tree)))
        else:
            odd_file(odd, folder, rng)
        start = time.process_time()
        wrong = one_sentence(loading._check_folder, folder, False) or one_sentence(study.samples.revision, folder)
        slow += time.process_time() - start > 20
        accepted = [f for f in (loading._check_folder,) if attempt(f, folder, False)[1] is None]
        if wrong or accepted:
            crashes.append((k, wrong, accepted, index.exists() and index.read_text()[:200], odd.name))
        index.unlink(missing_ok=True)
        if odd.is_dir() and not odd.is_symlink():
            odd.rmdir()
        else:
            odd.unlink(missing_ok=True)
    loading._check_folder(folder, False)  # as it was it is read
    FIGURES['hangs'] += slow
    tried('places of weights', crashes, 600)


def bomb(rng):
    "A small file that says that it is large: (bytes, width, height)"
    w, h = (rng.choice([3, 4000, 13_300, 30_000, 60_000, 65_535]) for _ in range(2))
    match rng.randrange(6):
        case 0:
            head = struct.pack('>IIBBBBB', w, h, 8, rng.choice([0, 2, 6]), 0, 0, 0)
            chunks = [(b'IHDR', head), (b'IDAT', zlib.compress(bytes(100_000))), (b'IEND', b'')]
            body = [struct.pack('>I', len(d)) + t + d + struct.pack('>I', zlib.crc32(t + d)) for t, d in chunks]
            return b'\x89PNG\r\n\x1a\n' + b''.join(body), w, h
        case 1:
            return b'GIF89a' + struct.pack('<HHBBB', w, h, 0x80, 0, 0) + bytes(6) + b';', w, h
        case 2:
            return b'BM' + struct.pack('<IHHIIiiHHIIiiII', 54, 0, 0, 54, 40, w, h, 1, 24, 0, 0, 0, 0, 0, 0), w, h
        case 3:
            return b'P6 %d %d 255 ' % (w, h) + bytes(100), w, h
        case 4:
            tags = [
                (256, w),
                (257, h),
                (258, 8),
                (259, 1),
                (262, 1),
                (273, 8),
                (277, 1),
                (278, h),
                (279, w * h % 2**32),
            ]
            entries = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags)
            return b'II*\0\x08\0\0\0' + struct.pack('<H', len(tags)) + entries + bytes(4), w, h
        case _:
            Image.new('L', (8, 8)).save(data := io.BytesIO(), 'JPEG')
            data = bytearray(data.getvalue())
            at = data.index(b'\xff\xc0') + 5
            data[at : at + 4] = struct.pack('>HH', h, w)
            return bytes(data), w, h


@pytest.mark.faults
@pytest.mark.filterwarnings('ignore')
def test_many_bombs(tmp_path):
    "A picture larger than the limit is refused from its header, by every way in; tables do not keep what they looked at"
    rng, crashes, process = random.Random(6), [], psutil.Process()
    csv, before, largest = tmp_path / 't.csv', process.memory_info().rss, 0
    for k in range(300):
        data, w, h = bomb(rng)
        (tmp_path / 'a.png').write_bytes(data)
        address = 'data:image/png;base64,' + base64.b64encode(data).decode()
        csv.write_text('image,question,answers\na.png,what?,red\n')
        ways = [
            (open_image, tmp_path / 'a.png'),
            (open_image, data),
            (open_image, address),
            (picture_size, tmp_path / 'a.png'),
            (vqa.load, csv, 'all'),
        ]
        large = w * h > MAX_PIXELS
        for way in ways if large else ways[3:]:
            wrong = one_sentence(*way)
            accepted = large and attempt(*way)[1] is None
            if wrong or accepted:
                crashes.append((k, way[0].__name__, data[:4], w, h, wrong))
        largest = max(largest, process.memory_info().rss - before)
    FIGURES['megabytes that bombs took'] = round(largest / 1e6)
    assert largest < 200e6, largest
    tried('pictures that say they are large', crashes, 300)


@pytest.mark.faults
@pytest.mark.parametrize('workers', [1, 2])
def test_many_failures_are_said(tmp_path, workers):
    "In every mode a failure is in the exit code and in words, and none is said where there is none"
    rng, crashes, names = random.Random(7 + workers), [], [f'evaluation-{i}' for i in range(16)]
    s = Study(tmp_path, samples=16).notebook()
    for k in range(6):
        shutil.rmtree(s.store.folder, ignore_errors=True)
        faults = {
            f'FAKE_{fault}': ' '.join(rng.sample(names, rng.randrange(1, 3)))
            for fault in rng.sample(['NAN', 'MEMORY'], rng.randrange(3))
        }
        mode = rng.choice([[], ['--rows']])
        code, out, err = s.run('study', '--settings', s.ini, *mode, '--workers', workers, FAKE_SECONDS=0, **faults)
        status = s.run('status', '--settings', s.ini, **faults)
        said = 'FAILED' in err and 'of early_exit (evaluation) are missing' in err
        if code != bool(faults) or said != bool(faults) or status[0] != bool(faults) or 'Traceback' in err:
            crashes.append((mode, faults, code, err, status))
    FIGURES['wrong exit codes or sentences'] += len(crashes)
    tried(f'studies with failures, {workers} processes,', crashes, 6)


@pytest.mark.faults
@pytest.mark.filterwarnings('ignore')
def test_many_small_files_of_the_store(tmp_path):
    "Notes, records of failures and claims with changed bytes: made again, or taken for none"
    store, rng, crashes = Store(tmp_path / 'r'), random.Random(8), []
    key, value = dict(unit=1, é='ü'), dict(candidates=[1, 5], review=None)
    store.memo(key, lambda: value)
    store.fail(key, 'No room.', True)
    whole = {ending: store.path(key).with_suffix(ending).read_bytes() for ending in ('.json', '.failed')}
    whole['.lock'] = b'machine 12\nstopped machine 12\nmachine 13\n'
    record = store.failure(key)
    for k in range(1500):
        ending = rng.choice([*whole])
        junk = json.dumps(
            rng.choice([[[1], 5], {}, [], None, 7, 'x', dict(value=5), dict(id={}, cause=1, key=[])])
        ).encode()
        data = mutate(whole[ending], rng) if rng.random() < 0.8 else junk
        store.path(key).with_suffix(ending).write_bytes(data)
        found, error = attempt(store.memo, key, lambda: value)
        if error or found != value:
            crashes.append((ending, data, found, repr(error)))
        found, error = attempt(store.failure, key)
        texts = error is None and (found == {} or all(type(found[k]) is type(record[k]) for k in record))
        if not texts or attempt(store.failures)[1] or attempt(store.running)[1]:
            crashes.append((ending, data, found, repr(error)))
        _, error = attempt(claimed, store, key)
        if error:
            crashes.append((ending, data, repr(error)))
        for ending, data in whole.items():
            store.path(key).with_suffix(ending).write_bytes(data)
    tried('small files of the store', crashes, 1500)


def claimed(store, key):
    "Claim a unit and let it go"
    with store.claim(key) as deaths:
        assert set(deaths) <= {'memory', 'crash', 'killed'}


@pytest.mark.faults
def test_many_orders_and_threads(glyph):
    "Captures and edits entered and left in any order, broken off, and from several threads: the model is as found"
    rng, prompt, crashes = random.Random(9), glyph.prompt(EXAMPLE, QUESTION), []

    def logits():
        with torch.inference_mode():
            return glyph.model(**prompt.inputs).logits

    def as_found():
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in glyph.model.modules())
        return glyph.model.config.get_text_config()._attn_implementation, hooks, glyph.attentions

    def any_block(rng):
        if rng.random() < 0.5:
            return capture(
                glyph, rows=rng.choice(['last', 'all']), heads=rng.choice(['mean', 'all']), hidden=rng.random() < 0.5
            )
        how = rng.choice(['zero', 'knockout', 'soft'])
        return edit(glyph, rng.randrange(glyph.n_layers), prompt.visual, how)

    want, found, weights = logits(), as_found(), digest(*glyph.model.parameters())
    for k in range(100):
        open_blocks = []
        for _ in range(rng.randrange(1, 9)):
            if open_blocks and rng.random() < 0.4:
                block = open_blocks.pop(rng.randrange(len(open_blocks)))
                stop = rng.random() < 0.3 and RuntimeError('broken off')
                attempt(block.__exit__, *((RuntimeError, stop, None) if stop else (None, None, None)))
            else:
                block = any_block(rng)
                block.__enter__()
                open_blocks.append(block)
            if rng.random() < 0.1:
                attempt(logits)
        rng.shuffle(open_blocks)
        for block in open_blocks:
            block.__exit__(None, None, None)
        if as_found() != found or k % 10 == 0 and not torch.equal(logits(), want):
            crashes.append((k, as_found()))

    def in_a_thread(seed):
        own = random.Random(seed)
        for _ in range(5):
            with any_block(own):
                logits()
        return seed

    for k in range(10):
        with ThreadPoolExecutor(3) as pool:
            ends = [attempt(f.result, 120) for f in [pool.submit(in_a_thread, 3 * k + i) for i in range(3)]]
        if any(error for _, error in ends) or as_found() != found or not torch.equal(logits(), want):
            crashes.append((k, ends, as_found()))
    assert digest(*glyph.model.parameters()) == weights
    tried('orders of captures and edits', crashes, 100 + 10)


@pytest.mark.faults
def test_figures_of_locked_doors(record_property):
    record_property('figures', dict(FIGURES))
    assert (
        not FIGURES['crashes'] + FIGURES['hangs'] + FIGURES['wrong exit codes or sentences'] + FIGURES['processes left']
    )
