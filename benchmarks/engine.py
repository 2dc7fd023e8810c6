"""What the run engine does with whole studies: two workers against one, and ten million rows. `make bench`, or `python benchmarks/engine.py --quick`.

The workers run the command `fusion study` on a demo model, each with one thread, on units that take ten seconds or more; what is compared is how
fast units are done once all have started, and the whole run, its start included. Beside them stands what this machine can do at best: the same work in
processes that know nothing of each other. Memory is that of a fresh process. Needs two free cores.
"""

import argparse, math, os, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np, pandas as pd
from bench import row, write
from fusion_notebooks.results import Store

ROOT = Path(__file__).parents[1]


def samples_of(seconds):
    "How many samples make a unit of so many seconds, as one process with one thread finds by trying; a multiple of 4, for there are four kinds"
    from fusion_notebooks import demo, study

    mllm, some = study.load(str(ROOT / 'data/models/glyph-llava')), demo.samples(16)
    work = lambda n: study.known_answers_rows(mllm, some[:n], 'gqa', ['from', 'window'])
    work(4)
    start = time.perf_counter()
    work(16)
    return 4 * math.ceil(1.1 * seconds / (time.perf_counter() - start) * 16 / 4)


BARE = '''
import sys, time
from fusion_notebooks import demo, study
mllm, some = study.load(sys.argv[1]), demo.samples(int(sys.argv[2]))
work = lambda n: study.known_answers_rows(mllm, some[:n], 'gqa', ['from', 'window'])
work(4); print('ready', flush=True); input()
start = time.perf_counter(); work(len(some)); work(len(some)); print(time.perf_counter() - start)
'''


def at_best(unit):
    "Time of two bare processes at once over that of one alone, per piece of work"

    def took(n):
        them = [
            subprocess.Popen(
                [sys.executable, '-c', BARE, ROOT / 'data/models/glyph-llava', str(unit)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'),
            )
            for _ in range(n)
        ]
        for p in them:
            p.stdout.readline()
        for p in them:
            p.stdin.write('\n')
            p.stdin.flush()
        return np.mean([float(p.communicate()[0].split()[-1]) for p in them])

    return took(2) / 2 / took(1)


def workers_bench(seconds, n):
    "The same study of n units twice: one worker, two workers"
    unit = samples_of(seconds)
    best = at_best(unit)
    with tempfile.TemporaryDirectory() as folder:
        took, each = {}, {}
        for workers in (1, 2):
            (home := Path(folder) / str(workers)).mkdir()
            (home / 'settings.ini').write_text(
                f'[study]\nmodels = {ROOT}/data/models/glyph-llava\nanalyses = known_answers\nunit = {unit}\n[limits]\ncalibration = 1\nevaluation = {unit * n // 4}\n'
            )
            start = time.perf_counter()
            subprocess.run(
                [
                    Path(sys.executable).parent / 'fusion',
                    'study',
                    '--rows',
                    '--workers',
                    str(workers),
                    '--settings',
                    home / 'settings.ini',
                ],
                cwd=home,
                check=True,
                env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'),
            )
            took[workers] = time.perf_counter() - start
            parts = Store(home / 'data/results').parts()
            assert len(parts) == n and (ends := sorted(p.stat().st_mtime for p in parts))
            each[workers] = (ends[-1] - ends[workers - 1]) / (n - workers)  # from when each has done its first
    row(f'workers: a unit of {unit} samples with one worker', each[1], unit='s')
    row(
        'workers: time per unit of two over that of one; its inverse is the throughput (1.7 times or more)',
        each[2] / each[1],
        limit=round(1 / 1.7, 3),
    )
    row('workers: the same of two bare processes, which is what this machine can do', best)
    for k, t in took.items():
        row(f'workers: {n} units, {k} worker{"s" * (k > 1)}, from start to end', t, unit='s')


SUMMARY = '''
import resource, sys, time
from fusion_notebooks.results import Store
start = time.perf_counter()
n = Store(sys.argv[1]).summary(['model', 'dataset', 'layer', 'how']).n.sum()
seconds = time.perf_counter() - start
try: most = int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])    # getrusage counts that of the process it was started from
except OSError: most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
print(n, seconds, most)
'''


def rows_bench(units, per):
    "A store of many rows: written, compacted, summarised by a fresh process"
    with tempfile.TemporaryDirectory() as folder:
        store, rng, start = Store(Path(folder) / 'results'), np.random.default_rng(0), time.perf_counter()
        layers, hows = (
            np.tile(np.arange(40), per // 40),
            np.repeat(['zero', 'mean', 'swap', 'knockout', 'soft'], per // 5),
        )
        for i in range(units):
            store.add(
                pd.DataFrame(
                    dict(
                        sample=np.char.add(f'{i}-', (np.arange(per) // 200).astype(str)),
                        layer=layers,
                        how=hows,
                        score=rng.random(per),
                        logp=rng.normal(size=per),
                        prediction='red',
                    )
                ),
                dict(
                    model=f'model {i % 7}',
                    dataset=f'benchmark {i % 8}',
                    analysis='masking',
                    code='0123abcd',
                    samples=[f'{i}-{k}' for k in range(per // 200)],
                ),
            )
        row(f'store: {units * per:,} rows in {units:,} parts, written', time.perf_counter() - start, unit='s')
        start = time.perf_counter()
        assert store.compact() == units
        row(f'store: {units * per:,} rows compacted', time.perf_counter() - start, unit='s')
        out = subprocess.run([sys.executable, '-c', SUMMARY, store.folder], capture_output=True, text=True)
        if out.returncode:
            raise RuntimeError(out.stderr[-400:])
        n, seconds, most = map(float, out.stdout.split())
        assert n == units * per
        row(
            f'store: {units * per:,} rows, compacted, summarised by model, benchmark, layer and semantic',
            seconds,
            limit=10,
            unit='s',
        )
        row('store: peak memory of that process', most / 2**20, limit=2, unit='GiB')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='short units, few rows, nothing written')
    a = parser.parse_args()
    workers_bench(1, 4) if a.quick else workers_bench(10, 8)
    rows_bench(50, 2000) if a.quick else rows_bench(5000, 2000)
    if not a.quick:
        write('engine', 'Workers and stores')


if __name__ == '__main__':
    sys.exit(main())
