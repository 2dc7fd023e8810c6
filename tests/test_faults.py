"""Faults, for real: processes killed at random moments, full disks, damaged files, dying workers. After each: no row lost, none doubled,
the table equal to the undisturbed run's, one clear line per failure. `pytest -m faults` runs all and prints the figures; those marked `often` run always."""

import contextlib, json, os, random, resource, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path
import nbformat, numpy as np, pandas as pd, pytest
from fusion_notebooks.results import Store

ROOT = Path(__file__).parents[1]
FAKE = Path(__file__).with_name('fake_study.py')
FIGURES = {}  # printed at the end
pytestmark, often = pytest.mark.faults, pytest.mark.often


def count(**kw):
    for k, v in kw.items():
        FIGURES[k] = FIGURES.get(k, 0) + v


def hear_signals():
    "A shell has what it begins in the background ignore these, and so would all that pytest begins"
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Study:
    "A study in a folder, run by another process"

    def __init__(self, folder, samples=48, script=FAKE, env=(), model=None, analyses='early_exit', more=''):
        self.folder, self.script, self.samples = Path(folder), script, samples
        self.model = model or self.folder / 'model'
        if not model:
            self.model.mkdir(parents=True)
            (self.model / 'config.json').write_text('{"num_hidden_layers": 4}')
            (self.model / 'model.safetensors').write_bytes(b'weights')
        self.ini = self.folder / 'settings.ini'
        self.ini.write_text(
            f'[study]\nmodels = {self.model}\nanalyses = {analyses}\nresults = results\nruns = runs\nfigures = figures\n{more}\n[limits]\ncalibration = {samples}\nevaluation = {samples}\n'
        )
        self.store, self.log = Store(self.folder / 'results'), self.folder / 'log'
        self.env = dict(
            PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
            OMP_NUM_THREADS='1',
            FAKE_LOG=str(self.log),
            PYTHONWARNINGS='ignore',
        ) | dict(env)

    def notebook(self, *cells, name='early_exit'):
        nb = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(c) for c in ("model = ''\nsettings = ''\nquick = False", *cells)],
            metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')),
        )
        nb.cells[0].metadata['tags'] = ['parameters']
        (self.folder / 'nbs/analyses').mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, self.folder / f'nbs/analyses/{name}.ipynb')
        return self

    def start(self, *args, **env):
        return subprocess.Popen(
            [sys.executable, str(self.script), *map(str, args)],
            env=os.environ | self.env | {k: str(v) for k, v in env.items()},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=hear_signals,
        )

    def run(self, *args, **kw):
        p = self.start(*args, **kw)
        out, err = p.communicate(timeout=900)
        return p.returncode, out, err

    def rows(self, *args, **kw):
        return self.run('study', '--rows', '--settings', self.ini, *args, **kw)

    def table(self):
        return self.store.read(split='evaluation')

    def required(self):
        "The table as `require` gives it, computing what is missing"
        code, out, err = self.run('table', self.ini, self.model, self.folder / 'table.pkl')
        assert code == 0, err
        return pd.read_pickle(self.folder / 'table.pkl')

    def computed(self):
        return [l.split()[0] for l in self.log.read_text().splitlines()] if self.log.exists() else []


def compare(got, want):
    "Count what is lost and doubled, and insist on equality"
    key = [c for c in ('sample', 'analysis', 'layer', 'how', 'split', 'method') if c in want]
    doubled, lost = (
        int(got.duplicated(key).sum()),
        len(want.merge(got[key].drop_duplicates(), on=key, how='left', indicator=True).query('_merge == "left_only"')),
    )
    count(**{'rows lost': lost, 'rows doubled': doubled, 'tables compared': 1})
    if lost or doubled:
        print(
            f'{lost} rows lost and {doubled} doubled of {len(want)}; units in the table:',
            got['sample'].nunique(),
            file=sys.stderr,
        )
    pd.testing.assert_frame_equal(
        *(
            t.drop(columns='commit').sort_values(key).reset_index(drop=True)[sorted(set(want) - {'commit'})]
            for t in (got, want)
        )
    )


def one_line(err, *said):
    "The last line of what went to stderr says it, and nothing spills a traceback"
    lines = [l for l in err.splitlines() if l.strip()]
    assert 'Traceback' not in err and lines and all(s in lines[-1] for s in said), err


@pytest.fixture(scope='module')
def want(tmp_path_factory):
    "The table of an undisturbed run"
    s = _made(tmp_path_factory.mktemp('undisturbed'))
    assert s.rows()[0] == 0
    return s.table()


def _made(folder, **kw):
    return Study(folder, **kw).notebook()


@pytest.fixture
def fake(tmp_path):
    return _made(tmp_path)


# killed

NURSERY = '''
import os, random, signal, sys, time
import pandas as pd
from fusion_notebooks.results import Store
folder, kills = sys.argv[1], int(sys.argv[2])
keys = [dict(model='m', unit=i) for i in range(60)]
def rows(i): return pd.DataFrame(dict(sample=[f'{i}-{j}' for j in range(50)], layer=range(50), score=[i*j/7 for j in range(50)], map=[[i/3, j/3] for j in range(50)]))
def write(seed):
    store, rng = Store(folder), random.Random(seed)
    while True:                                                   # again and again: also over parts that are there
        for i in rng.sample(range(60), 60):
            with store.claim(keys[i]) as deaths:
                if deaths is not None: store.add(rows(i), keys[i])
        if seed % 3 == 0: store.compact()
def child(seed):
    if pid := os.fork(): return pid
    try: write(seed)
    finally: os._exit(1)
rng, alive, torn, lost, claimed = random.Random(0), [child(-1)], 0, 0, set()
Store(folder).keys()                                              # what is imported late is imported now
for k in range(kills):
    alive.append(child(k))
    time.sleep(rng.uniform(.001, .06))
    victim = alive.pop(rng.randrange(2))
    os.kill(victim, signal.SIGKILL); os.waitpid(victim, 0)
    got = Store(folder).read()
    torn += 0 if got.empty else int((got.groupby('unit').size() != 50).sum())
    claimed |= set(got.unit) if len(got) else set()
    gone = claimed - set(got.unit) if len(got) else claimed                      # what was once there stays
    if gone:
        lost += len(gone)
        again = Store(folder).read()
        print(f'kill {k}: units {sorted(gone)} are not read; on reading again {sorted(gone - set(again.unit))}; files', sorted(p.name for p in Store(folder).folder.iterdir()), file=sys.stderr)
os.kill(alive[0], signal.SIGKILL); os.waitpid(alive[0], 0)
store = Store(folder)
left = store.missing(keys)
for k in left: store.add(rows(k['unit']), k)
got = store.read(keys)
want = pd.concat([rows(i).assign(model='m', unit=i) for i in range(60)], ignore_index=True)
store.compact()
for a in (got, store.read(keys), store.read().sort_values(['unit', 'layer'], ignore_index=True)):
    lost += len(want) - len(want.merge(a[['unit', 'sample']].drop_duplicates()))
    torn += int(a.duplicated(['unit', 'sample']).sum())
    pd.testing.assert_frame_equal(a.assign(map=a['map'].map(list)), want)
print(lost, torn, sum('pack-' not in p.name for p in store.folder.iterdir()))
'''


def killed_writers(folder, kills):
    p = subprocess.run(
        [sys.executable, '-c', NURSERY, str(folder), str(kills)],
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'),
        timeout=900,
    )
    assert p.returncode == 0, p.stderr
    lost, doubled, left = map(int, p.stdout.split())
    count(**{'writers killed (kill -9)': kills, 'rows lost': lost, 'rows doubled': doubled})
    assert lost == doubled == left == 0 and not p.stderr, p.stdout + p.stderr  # nothing stays behind but packs


@often
def test_writers_killed_at_random(tmp_path):
    killed_writers(tmp_path / 'r', 25)


def test_200_writers_killed_at_random(tmp_path):
    killed_writers(tmp_path / 'r', 200)


def killed_studies(s, kills, seconds, seed=0, *args):
    "Kill the main process at random moments until it has been killed so often, then let it finish"
    rng, done = random.Random(seed), 0
    while done < kills:
        p = s.start(*args)
        try:
            p.communicate(timeout=rng.uniform(0.3 * seconds, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)
            p.communicate()
            done += 1
        else:
            assert p.returncode == 0
            shutil.rmtree(s.store.folder)
            shutil.rmtree(s.folder / 'runs', ignore_errors=True)
            seconds *= 0.7  # it was through: begin again, and kill sooner
    code, out, err = s.run(*args)
    assert code == 0, err
    count(**{'studies killed (kill -9)': kills})


@often
def test_a_study_killed_at_random(fake, want):
    killed_studies(fake, 2, 3, 0, 'study', '--rows', '--settings', fake.ini)
    compare(fake.table(), want)


def workers_of(pid):
    return [
        int(c)
        for c in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
        if b'spawn_main' in Path(f'/proc/{c}/cmdline').read_bytes()
    ]


def killed_workers(s, kills, wait, seed=0, *args, **env):
    "Kill a random worker now and then while the study runs on"
    rng, p, done, _begun = (
        random.Random(seed),
        s.start('study', '--rows', '--workers', 2, '--settings', s.ini, *args, **env),
        0,
        0,
    )
    while p.poll() is None and done < kills:
        time.sleep(rng.uniform(0.5 * wait, wait))
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if victims := workers_of(p.pid):
                os.kill(rng.choice(victims), signal.SIGKILL)
                done += 1
    out, err = p.communicate(timeout=900)
    assert p.returncode == 0 and 'Traceback' not in err and err.count('another one takes over') == done, err
    count(**{'workers killed (kill -9)': done})
    return done


def test_workers_killed_at_random(fake, want):
    assert killed_workers(fake, 2, 1.5, FAKE_SECONDS=0.6) == 2
    compare(fake.table(), want)


# the same on a real model

REAL = 'import sys\nfrom fusion_notebooks.cli import main\nif __name__ == "__main__": sys.exit(main())'


@pytest.fixture(scope='module')
def real_model(tmp_path_factory):
    from fusion_notebooks import demo

    model, processor = demo.make_model(layers=4)
    model.generation_config.eos_token_id = list(range(model.config.text_config.vocab_size))
    folder = tmp_path_factory.mktemp('models') / 'tiny'
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def real(folder, model):
    (folder / 'real.py').write_text(REAL)
    return Study(folder, 2, folder / 'real.py', model=model, analyses='masking attention early_exit', more='unit = 2')


@pytest.fixture(scope='module')
def real_want(tmp_path_factory, real_model):
    s = real(tmp_path_factory.mktemp('real'), real_model)
    start = time.monotonic()
    code, out, err = s.rows()
    assert code == 0, err
    assert len(s.table()) == 8 * (21 + 4 + 4)
    return s.table(), time.monotonic() - start


def test_a_real_study_killed_at_random(tmp_path, real_model, real_want):
    want, seconds = real_want
    s = real(tmp_path, real_model)
    killed_studies(s, 12, seconds, 1, 'study', '--rows', '--settings', s.ini)
    compare(s.table(), want)


def test_workers_of_a_real_study_killed_at_random(tmp_path, real_model, real_want):
    done, k = 0, 0
    while done < 10:
        s = real(tmp_path / str(k), real_model) if (tmp_path / str(k)).mkdir() is None else None
        done, k = done + killed_workers(s, 5, 0.6 * real_want[1], k), k + 1
        compare(s.table(), real_want[0])


# interrupted


@pytest.mark.parametrize('args', [pytest.param((), marks=often), ('--workers', 2)])
def test_ctrl_c_finishes_the_unit_in_hand(fake, want, args):
    p, end = fake.start('study', '--rows', '--settings', fake.ini, *args, FAKE_SECONDS=0.5), time.monotonic() + 200
    while not fake.computed() and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(p.pid, signal.SIGINT)
    out, err = p.communicate(timeout=900)
    assert p.returncode == 130
    one_line(err, 'what was finished is kept, and the same command goes on')
    assert (
        0 < len(fake.store.parts()) == len(fake.computed())
        and not list(fake.store.folder.glob('*.tmp'))
        and not list(fake.store.folder.glob('*.lock'))
    )
    assert fake.rows()[0] == 0
    compare(fake.table(), want)


# the disk


@often
def test_disk_full(fake, want):
    code, out, err = fake.rows(FAKE_FSIZE=2500)
    assert code == 2 and not fake.store.parts()
    one_line(err, 'results cannot be written (File too large)', 'free space')
    code, out, err = fake.rows(FAKE_FULL=1)
    assert code == 2
    one_line(err, 'cannot be written (No space left on device)')
    assert fake.rows()[0] == 0
    compare(fake.table(), want)


def test_disk_full_now_and_then(fake, want):
    stops = 0
    while (got := fake.rows(FAKE_FULL=6))[0]:
        assert got[0] == 2
        one_line(got[2], 'cannot be written (No space left on device)')
        stops += 1
        assert stops < 60
    count(**{'runs stopped by a full disk': stops})
    compare(fake.table(), want)


@often
def test_results_folder_vanishes(fake, want):
    p = fake.start('study', '--rows', '--settings', fake.ini, FAKE_SECONDS=0.3)
    while not fake.store.folder.is_dir() or len(fake.store.parts()) < 3:
        time.sleep(0.02)
    shutil.rmtree(fake.store.folder, ignore_errors=True)
    p.communicate(timeout=900)
    code, out, err = fake.rows()
    assert code == 0, err
    compare(fake.table(), want)


@often
def test_read_only_folder(want):
    with tempfile.TemporaryDirectory(dir='/tmp') as folder:  # pytest's own are closed to other users
        os.chmod(folder, 0o777)
        s = _made(Path(folder))
        s.store.folder.mkdir()
        s.store.folder.chmod(0o555)
        s.log.touch()
        s.log.chmod(0o666)
        user = dict(FAKE_USER=65534 if os.getuid() == 0 else os.getuid(), PYTHONDONTWRITEBYTECODE=1)
        code, out, err = s.rows(**user)
        assert code == 2 and not s.store.parts(), err
        one_line(err, 'results', 'ermission denied')
        s.store.folder.chmod(0o755)
        assert s.rows()[0] == 0
        s.store.folder.chmod(0o555)
        assert s.run('status', '--settings', s.ini, **user)[0] == 0  # who may only read reads
        compare(s.table(), want)
        s.store.folder.chmod(0o755)


def test_clock_going_backwards(fake, want):
    assert fake.rows('--limit', 16)[0] == 0
    for p in fake.store.folder.iterdir():
        os.utime(p, (2**31, 2**31))
    assert fake.rows(FAKE_CLOCK=1)[0] == 0
    code, out, err = fake.run('status', '--settings', fake.ini, '--json')
    assert code == 0 and json.loads(out)[0]['done'] == 6 and json.loads(out)[0]['hours'] == 0
    assert len(fake.computed()) == len(set(fake.computed())) == 6
    compare(fake.table(), want)


@pytest.mark.parametrize('packed', [pytest.param(False, marks=often), True])
def test_damaged_parts_are_computed_again(fake, want, packed):
    assert fake.rows()[0] == 0
    if packed:
        assert fake.run('compact', '--settings', fake.ini)[0] == 0
    files = sorted(fake.store.folder.glob('*.parquet'))
    for path, harm in zip(
        files,
        (
            lambda b: b[: len(b) // 2],
            lambda b: b[:50] + bytes(30) + b[80:],
            lambda b: b'',
            lambda b: b[:-8],
            lambda b: b[::-1],
        ),
    ):
        path.write_bytes(harm(path.read_bytes()))
    compare(fake.required(), want)
    assert not fake.run('verify', '--settings', fake.ini, '--share', 0.2)[0]


# several at once


@often
def test_two_studies_on_one_store(fake, want):
    both = [fake.start('study', '--rows', '--settings', fake.ini, FAKE_SECONDS=0.3) for _ in range(2)]
    for p in both:
        out, err = p.communicate(timeout=900)
        assert p.returncode == 0, err
    assert len(fake.computed()) == len(set(fake.computed())) == 6  # none was computed twice
    compare(fake.table(), want)


def test_tasks_of_an_array(fake, want):
    tasks = [
        fake.start('study', '--rows', '--settings', fake.ini, SLURM_ARRAY_TASK_ID=i, FAKE_SECONDS=0.2) for i in range(2)
    ]
    assert [p.communicate(timeout=900) and p.returncode for p in tasks] == [0, 0]
    assert len(set(fake.computed())) == 6
    compare(fake.table(), want)


@often
def test_a_cluster_loses_a_worker(tmp_path, want):
    s = _made(tmp_path)
    code, out, err = s.run('cluster', s.ini, FAKE_SECONDS=1)
    assert code == 0, err
    assert len(s.computed()) > 6  # one unit was begun twice
    compare(s.table(), want)
    count(**{'cluster workers killed': 1})


# workers and models


@pytest.mark.parametrize('how, times', [('ABORT', 3), ('KILL', 10)])
def test_a_worker_that_always_dies(fake, want, how, times):
    "A crash is the unit's own doing; a kill may come from outside, so it takes more of them to give the unit up"
    code, out, err = fake.rows('--workers', 2, **{f'FAKE_{how}': 'evaluation-9'})
    died = err.count('another one takes over')
    assert code == 1 and times <= died <= times + 1  # the other worker may begin before a crash is recorded
    one_line(err, 'FAILED model · early_exit, evaluation: 1 of 6 units', f'{died} processes died over this unit')
    code, out, err = fake.run('status', '--settings', fake.ini)
    assert code == 1 and f'{died} processes died over this unit' in out and len(fake.store.parts()) == 5
    assert fake.rows()[0] == 0  # elsewhere it may have room
    compare(fake.table(), want)


def test_a_worker_that_dies_once(fake, want):
    assert fake.rows('--workers', 2, FAKE_KILL_ONCE='evaluation-9')[0] == 0
    compare(fake.table(), want)


@pytest.mark.parametrize(
    'fault, said',
    [
        pytest.param('NAN', 'The model returned no number for sample evaluation-9 (logp = nan).', marks=often),
        ('MEMORY', 'Unable to allocate'),
    ],
)
def test_units_that_fail_are_said_and_stop_nothing_else(fake, want, fault, said):
    fake.notebook('print("never run")')
    code, out, err = fake.run('study', '--settings', fake.ini, **{f'FAKE_{fault}': 'evaluation-9 evaluation-12'})
    assert code == 1 and len(fake.store.parts()) == 5 and 'Traceback' not in err
    one_line(err, 'FAILED model · early_exit: 1 of 6 units of early_exit (evaluation) are missing', said)
    compare(fake.table(), want[~want['sample'].isin([f'evaluation-{i}' for i in range(8, 16)])])
    code, out, err = fake.run('status', '--settings', fake.ini)
    assert code == 1 and out.count('FAILED') == 1 and said in out
    assert fake.rows()[0] == 0 and not fake.store.failures()
    compare(fake.table(), want)


@pytest.mark.parametrize('workers', [1, 2])
def test_notebooks_that_raise_or_hang(tmp_path, want, workers):
    s = Study(tmp_path, more='timeout = 2')
    cells = [
        ('raise RuntimeError("a cell broke\\nbadly")', 'RuntimeError: a cell broke badly'),
        ('import time; time.sleep(3000)', 'CellTimeoutError'),
    ]
    for cell, said in cells + [('import os; os.kill(os.getppid(), 9)', 'The process that ran it died')] * (workers > 1):
        s.notebook(cell)
        start = time.monotonic()
        code, out, err = s.run('study', '--settings', s.ini, '--workers', workers)
        assert code == 1 and time.monotonic() - start < 300
        one_line(err, 'FAILED model · early_exit', said)
    compare(s.table(), want)


@pytest.mark.parametrize('moment', ['write_atomic', '_summarise'])
def test_killed_between_notebook_and_summary(fake, moment):
    "No record of a notebook and no summary of earlier rows outlives them"
    text, summary, record = (
        fake.ini.read_text(),
        fake.folder / 'figures/model/summary.csv',
        fake.folder / 'runs/model/early_exit.json',
    )
    fake.ini.write_text(text.replace('evaluation = 48', 'evaluation = 16'))
    assert fake.run('study', '--settings', fake.ini)[0] == 0 and set(pd.read_csv(summary).n) == {16} and record.exists()
    fake.ini.write_text(text)
    assert fake.run('study', '--settings', fake.ini, FAKE_DIE=moment)[0] == -signal.SIGKILL
    assert not summary.exists() and record.exists() == (moment == '_summarise')
    code, out, err = fake.run('study', '--settings', fake.ini)
    assert code == 0 and set(pd.read_csv(summary).n) == {48}, err


# input


def mutate(data, rng):
    "Flip, cut, repeat or insert some bytes"
    data = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        match rng.randrange(5):
            case 0 if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                del data[a : min(b, a + 40)]
            case 2:
                data[a:a] = data[a : min(b, a + 40)]
            case 3:
                data[a:a] = rng.randbytes(8)
            case 4:
                data[a : a + 4] = rng.choice([b'\xff' * 4, bytes(4), b'\x7f\xff\xff\xff'])
        if not data:
            break
    return bytes(data)


def mutated_pictures(folder, n, seed=0):
    "Every mutated file is a picture, or one sentence that names it"
    import io
    from PIL import features, Image
    from fusion_notebooks.mllm import open_image

    rng, noise, crashes, good = (
        random.Random(seed),
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype='uint8')),
        [],
        0,
    )
    seeds = []
    for form in ('PNG', 'JPEG', 'GIF', 'BMP', 'WEBP', 'TIFF', 'PPM', *['AVIF'] * features.check('avif')):
        noise.save(b := io.BytesIO(), form)
        seeds.append(b.getvalue())
    for k in range(n):
        path = folder / f'{k}.png'
        path.write_bytes(mutate(rng.choice(seeds), rng))
        try:
            good += open_image(path).mode == 'RGB'
        except (ValueError, OSError) as e:
            if '\n' in str(e):
                crashes.append((path, repr(e)))
        except Exception as e:
            crashes.append((path, repr(e)))
        else:
            path.unlink()
    count(**{'mutated pictures tried': n, 'mutated inputs that crashed': len(crashes)})
    assert not crashes and 0 < good < n, crashes[:3]


@pytest.mark.filterwarnings('ignore')
@often
def test_mutated_pictures(tmp_path):
    mutated_pictures(tmp_path, 200)


@pytest.mark.filterwarnings('ignore')
def test_many_mutated_pictures(tmp_path):
    mutated_pictures(tmp_path, 2000, 1)


JUNK = [
    None,
    0,
    -1,
    1e308,
    float('nan'),
    True,
    '',
    'x',
    '../x',
    '/etc/passwd',
    [],
    [None],
    {},
    {'a': {}},
    [['x']] * 10,
    'é' * 300,
    '\0',
    '<script>',
    '$x^',
    2**70,
]


def harm(node, rng):
    "Replace, drop or double one thing somewhere in a JSON value"
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not (isinstance(node[key], (dict, list)) and node[key]) or rng.random() < 0.1:
            break
        node = node[key]
    match rng.randrange(4):
        case 0:
            del node[key]
        case 1 if isinstance(node, list):
            node.append(node[key])
        case _:
            node[key] = rng.choice(JUNK)


def mutated_annotations(folder, n, seed=0):
    "A mutated row of a benchmark, one thing in it or some bytes: samples, or one sentence that names the file"
    from fusion_notebooks import vqa

    root, rng, crashes, good = folder / 'vqa', random.Random(seed), [], 0
    shutil.copytree(Path(__file__).parent / 'fixtures/vqa', root)
    for _ in range(n):
        name = rng.choice(list(vqa.BENCHMARKS))
        path = next(
            p
            for f in [rng.choice(vqa.BENCHMARKS[name].files)]
            for alternative in f.split('|')
            if (p := root / name / alternative).is_file()
        )
        before = path.read_bytes()
        if path.suffix != '.json' or rng.random() < 0.4:
            path.write_bytes(mutate(before, rng))
        elif name == 'pope':
            lines = before.splitlines()
            harm(row := json.loads(lines[at := rng.randrange(len(lines))]), rng)
            path.write_bytes(b'\n'.join([*lines[:at], json.dumps(row).encode(), *lines[at + 1 :]]))
        else:
            harm(tree := json.loads(before), rng)
            path.write_text(json.dumps(tree))
        try:
            good += len(vqa.load(name, 'all', root=root)) > 0
        except (ValueError, OSError) as e:
            if '\n' in str(e) or len(str(e)) > 500 or not any(w in str(e) for w in (path.name, name, 'uestions')):
                crashes.append((name, path.name, repr(e)))
        except Exception as e:
            crashes.append((name, path.name, repr(e)))
        path.write_bytes(before)
    count(**{'mutated annotation rows tried': n, 'mutated inputs that crashed': len(crashes)})
    assert not crashes and 0 < good < n, (len(crashes), crashes[:5])


@often
def test_mutated_annotations(tmp_path):
    mutated_annotations(tmp_path, 100)


def test_many_mutated_annotations(tmp_path):
    mutated_annotations(tmp_path, 2000, 1)


def test_mutated_settings(tmp_path):
    from fusion_notebooks.study import read_settings

    s, rng = _made(tmp_path), random.Random(0)
    text = s.ini.read_bytes()
    for _ in range(500):
        s.ini.write_bytes(mutate(text, rng))
        try:
            read_settings(s.ini)
        except (ValueError, OSError) as e:
            assert '\n' not in str(e)
    count(**{'mutated settings tried': 500})


# speed


@often
def test_a_finished_study_is_looked_through_quickly(tmp_path):
    s, quick = _made(tmp_path, samples=2504, more='unit = 32'), dict(FAKE_SECONDS=0)

    def run():
        "Its messages, seconds, and those of them that it computed"
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        code, out, err = s.run('study', '--settings', s.ini, **quick)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert code == 0, err
        return err, time.monotonic() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    _, _, first = run()
    assert len(s.table()) == 10016
    err, seconds, busy = run()
    assert 'done before, unchanged' in err
    count(
        **{
            'seconds to resume a finished study of 10,000 rows': seconds,
            'of which computing': busy,
            'computing of the first run': first,
        }
    )
    assert busy < first  # the limit in seconds is in `make bench`
    code = f"import sys, runpy\nsys.argv = ['fusion', 'status', '--settings', {str(s.ini)!r}]\ntry: runpy.run_path({str(FAKE)!r}, run_name='__main__')\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, '-c', code],
            env=os.environ | s.env | {k: str(v) for k, v in quick.items()},
            stdout=subprocess.DEVNULL,
        ).returncode
        == 0
    )


def test_what_a_unit_costs_the_engine(fake):
    "Units that only wait: all the processor's time is claims, files and looking for what is missing"
    busy = []
    for _ in range(2):  # the second run finds all there, so the difference is 6 units
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert fake.rows(FAKE_SECONDS=0.2)[0] == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    cost = (busy[0] - busy[1]) / len(fake.computed())
    count(**{'computing per unit by the engine, seconds': cost})
    assert cost < 0.05 * 10  # 5 % of a unit of 10 s


def test_figures(record_property):
    total = lambda *words: sum(v for k, v in FIGURES.items() if all(w in k for w in words))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    sums = {
        'kills survived': total('killed'),
        'rows lost': total('rows lost'),
        'rows doubled': total('rows doubled'),
        'inputs tried': total('mutated', 'tried'),
        'crashes': total('crashed'),
        'computing by all processes started, seconds': used.ru_utime + used.ru_stime,
    }
    record_property('figures', {k: v for k, v in FIGURES.items() if k not in sums} | sums)
    assert sums['rows lost'] == sums['rows doubled'] == sums['crashes'] == 0, FIGURES
