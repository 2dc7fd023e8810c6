"""Locked doors: work without end, sentences and exit codes, processes, words that reach a machine. `pytest -m faults tests/test_locked.py` runs the fuzzing, too,
and prints what was tried; weights that lie elsewhere are in test_loading, bombs in test_pictures, the store's notes in test_results."""

import json, os, random, shutil, signal, string, time
from collections import Counter
from pathlib import Path
import psutil, pytest
from PIL import Image
from fusion_notebooks import demo, study, vqa
from fusion_notebooks.cli import main
from fusion_notebooks.core.errors import BadInput, NotSupported
from fusion_notebooks.mllm import MLLM, handle
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
TEMPLATES = {
    LOOPS: 'OutOfTime: it takes longer than it may',
    "{% for i in range(30000) %}{{ 'x' * 1000 }}{% endfor %}": '30,000,000 characters, more than the 1,000,000 allowed',
}


@pytest.mark.parametrize('template', TEMPLATES)
def test_templates_have_limits(folder, template, says, monkeypatch):
    monkeypatch.setattr(handle, 'SECONDS', 0.5)
    (folder / 'chat_template.jinja').write_text(template)
    start = time.monotonic()
    assert TEMPLATES[template] in says('ask', folder, EXAMPLE, QUESTION)
    assert time.monotonic() - start < 60  # minutes without the limits


def test_a_template_in_another_thread(folder, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(handle, 'SECONDS', 0.5)
    (folder / 'chat_template.jinja').write_text(LOOPS)
    with ThreadPoolExecutor(1) as pool, pytest.raises(BadInput, match='OutOfTime'):
        pool.submit(MLLM.load(folder).prompt, EXAMPLE, QUESTION).result()


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
    assert f"'{device}'" in says('demo', 'eval', 'glyph-llava', '--n', 1, '--device', device)


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


def in_a_notebook(s, *args):
    "A study whose notebook has begun, and its processes"
    mark = s.folder / 'begun'
    s.notebook(f'import time; open({str(mark)!r}, "a").close(); time.sleep(300)')
    p = s.start('study', '--settings', s.ini, *args)
    end = time.monotonic() + 120
    while not mark.exists() and p.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert mark.exists(), p.communicate()
    return p, family(p.pid)


@pytest.mark.faults
@pytest.mark.parametrize('workers', [1, pytest.param(2, marks=often)])
def test_a_killed_study_leaves_no_process(tmp_path, workers):
    p, all_of_it = in_a_notebook(Study(tmp_path, samples=8), '--workers', workers)
    assert any('ipykernel' in ' '.join(x.cmdline()) for x in alive(all_of_it))
    p.kill()
    p.communicate()
    gone_within(all_of_it, 5)


@pytest.mark.faults
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('workers', [pytest.param(1, marks=often), 2])
def test_signals_are_graceful_in_notebooks(tmp_path, workers, number):
    s = Study(tmp_path, samples=8)
    p, all_of_it = in_a_notebook(s, '--workers', workers)
    (os.kill if number == signal.SIGTERM else os.killpg)(p.pid, number)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130
    one_line(err, 'what was finished is kept, and the same command goes on')
    gone_within(all_of_it, 5)
    assert not list(s.folder.glob('runs/*/*.json')) and not list(s.folder.rglob('*.tmp'))


@pytest.mark.faults
@pytest.mark.parametrize('workers', [1, 2])
def test_sigterm_while_a_model_loads_and_while_units_run(tmp_path, want, workers):
    for env in (dict(FAKE_LOAD=3), dict(FAKE_SECONDS=0.5)):
        s = Study(tmp_path / next(iter(env))).notebook()
        p = s.start('study', '--settings', s.ini, '--workers', workers, **env)
        time.sleep(6)
        all_of_it = family(p.pid)
        os.kill(p.pid, signal.SIGTERM)
        out, err = p.communicate(timeout=100)
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
        slow += time.monotonic() - start > 20
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
    for k in range(60):
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
    for k in range(1000):
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
    for k in range(1000):
        value = ''.join(rng.choice(string.digits + '-+.e²٣_ \t%${}[]=#;') for _ in range(rng.randrange(1, 20)))
        s.ini.write_text(
            text
            + f'[quick]\n{rng.choice(["unit", "timeout", "seed", "calibration", "evaluation", "mixed"])} = {value}\n'
        )
        if wrong := one_sentence(study.read_settings, s.ini, True):
            crashes.append((value, wrong))
    tried('settings', crashes, 1000)


@pytest.mark.faults
def test_figures_of_locked_doors(capsys):
    with capsys.disabled():
        print('\n' + '\n'.join(f'{k}: {v}' for k, v in FIGURES.items()))
    assert (
        not FIGURES['crashes'] + FIGURES['hangs'] + FIGURES['wrong exit codes or sentences'] + FIGURES['processes left']
    )
