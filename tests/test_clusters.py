"The guide to clusters does what it says: its job script under plain bash, its certificates and Dask cluster on this machine, no address without TLS"

import json, os, re, signal, subprocess, sys, time
from pathlib import Path
import pandas as pd, pytest
from test_faults import FAKE, Study, compare, one_line, _made, want

GUIDE = '\n'.join(
    ''.join(c['source'])
    for c in json.loads((Path(__file__).parents[1] / 'nbs/guides/clusters.ipynb').read_text())['cells']
)


def block(*words):
    return next(b for b in re.findall(r'```\w+\n(.*?)```', GUIDE, re.S) if all(w in b for w in words))


@pytest.fixture
def site(tmp_path):
    "A study in a folder whose environment has our `fusion`"
    s = _made(tmp_path)
    (tmp_path / '.venv/bin').mkdir(parents=True)
    (tmp_path / '.venv/bin/activate').write_text('export PATH="$PWD/.venv/bin:$PATH"\n')
    (fusion := tmp_path / '.venv/bin/fusion').write_text(f'#!/bin/bash\nexec "{sys.executable}" "{FAKE}" "$@"\n')
    fusion.chmod(0o755)
    return s


def submit(s, script, cwd=None, **env):
    "What a batch system does with a job script"
    (path := s.folder / 'job.sh').write_text(script)
    path.chmod(0o755)
    return subprocess.Popen(
        [str(path)],
        env=os.environ | s.env | {k: str(v) for k, v in env.items()},
        cwd=cwd or s.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def pbs(script):
    "The same script for PBS, as the guide says"
    lines = [
        '#PBS -J 0-15' if l.startswith('#SBATCH --array') else l
        for l in script.splitlines()
        if not l.startswith('#SBATCH') or '--array' in l
    ]
    assert '`#PBS -J 0-15`' in GUIDE and '`cd "$PBS_O_WORKDIR"`' in GUIDE
    return '\n'.join([*lines[:2], 'cd "$PBS_O_WORKDIR"', *lines[2:]]) + '\n'


@pytest.mark.parametrize('system', ['SLURM', 'PBS'])
def test_the_job_script(site, want, system, tmp_path_factory):
    script = block('#SBATCH --array')
    assert script.startswith('#!/bin/bash\n')
    if system == 'PBS':
        tasks = [
            submit(
                site,
                pbs(script),
                tmp_path_factory.mktemp('home'),
                PBS_ARRAY_INDEX=i,
                PBS_O_WORKDIR=site.folder,
                FAKE_SECONDS=0.2,
            )
            for i in range(2)
        ]
    else:
        tasks = [submit(site, script, SLURM_ARRAY_TASK_ID=i, FAKE_SECONDS=0.2) for i in range(2)]
    for p in tasks:
        out, err = p.communicate(timeout=900)
        assert p.returncode == 0, err
    assert len(site.computed()) == len(set(site.computed())) == 6
    compare(site.table(), want)


def test_the_signal_before_the_time_is_up(site, want):
    assert '--signal=B:TERM@' in block('#SBATCH --array')
    p, end = submit(site, block('#SBATCH --array'), SLURM_ARRAY_TASK_ID=3, FAKE_SECONDS=0.5), time.monotonic() + 200
    while not site.computed() and time.monotonic() < end:
        time.sleep(0.05)
    os.kill(p.pid, signal.SIGTERM)  # to the batch shell alone, whose place the command has taken
    out, err = p.communicate(timeout=900)
    assert p.returncode == 130 and 0 < len(site.store.parts()) == len(site.computed()) < 6
    one_line(err, 'what was finished is kept')
    assert site.rows()[0] == 0
    compare(site.table(), want)


@pytest.mark.parametrize(
    'address',
    [
        'tcp://10.1.2.3:8786',
        'tcp://127.0.0.1.example.org:8786',
        'tcp://127.0.0.1:1@example.org:8786',
        'ws://10.1.2.3:80',
        'nonsense',
    ],
)
def test_a_scheduler_elsewhere_needs_tls(tmp_path, address):
    from fusion_notebooks import study

    s = _made(tmp_path)
    with pytest.raises(ValueError, match='another machine without encryption: give a tls:// address'):
        study.on_cluster(study.choose(s.ini), address)


def test_a_scheduler_elsewhere_is_refused_by_the_command(tmp_path):
    s = _made(tmp_path)
    code, out, err = s.run('study', '--settings', s.ini, '--scheduler', 'tcp://10.1.2.3:8786')
    assert code == 2 and not s.computed()
    one_line(err, 'fusion: tcp://10.1.2.3:8786 is another machine without encryption: give a tls:// address')


@pytest.mark.faults
def test_certificates_and_a_cluster_behind_tls(tmp_path, want):
    "The guide's own lines make the certificate; then scheduler, worker and study speak TLS, and nobody else is let in"
    s, home, running = (
        _made(tmp_path / 'study') if (tmp_path / 'study').mkdir() is None else None,
        tmp_path / 'home',
        [],
    )
    home.mkdir()
    env = s.env | dict(HOME=str(home), FAKE_SECONDS='.2')
    subprocess.run(['bash', '-euc', block('openssl req')], env=os.environ | env, check=True, capture_output=True)
    assert (home / '.config/dask/key.pem').stat().st_mode & 0o077 == 0

    def dask(*args):
        running.append(
            subprocess.Popen(
                [sys.executable, '-m', 'dask', *args, '--no-dashboard'],
                env=os.environ | env,
                cwd=tmp_path,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )

    try:
        dask('scheduler', '--protocol', 'tls', '--host', '127.0.0.1', '--port', '0', '--scheduler-file', 'at.json')
        end = time.monotonic() + 200
        while not (tmp_path / 'at.json').exists() and time.monotonic() < end:
            time.sleep(0.1)
        address = json.loads((tmp_path / 'at.json').read_text())['address']
        assert address.startswith('tls://127.0.0.1:')
        dask('worker', address, '--nthreads', '1', '--preload', str(FAKE))
        code, out, err = s.rows('--scheduler', address, HOME=home)
        assert code == 0, err
        compare(s.table(), want)
        stranger = 'import sys, dask\nfrom distributed import Client\ndask.config.set({"distributed.comm.require-encryption": None})\ntry: Client(sys.argv[1], timeout=5)\nexcept OSError: sys.exit(7)'
        assert (
            subprocess.run(
                [sys.executable, '-c', stranger, address.replace('tls', 'tcp')],
                env=os.environ | env,
                capture_output=True,
            ).returncode
            == 7
        )
        recipe = block('SLURMCluster(') + '\nprint(cluster.job_script())'
        script = subprocess.run(
            [sys.executable, '-c', recipe], env=os.environ | env, capture_output=True, text=True, cwd=tmp_path
        )
        assert script.returncode == 0 and 'tls://' in script.stdout.splitlines()[0], script.stderr
        assert all(
            w in script.stdout
            for w in (
                '#SBATCH --gres=gpu:1',
                '#SBATCH --mem=',
                '--nthreads 1',
                '--lifetime 230m',
                'distributed.cli.dask_worker tls://',
            )
        ), script.stdout
    finally:
        for p in running:
            p.kill()
            p.wait()
