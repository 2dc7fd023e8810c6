"""What methods against noise gain where noise is planted: VAR, PAI and the sum over layers with signs, on planted-noise.

`python benchmarks/noise_rivals.py` writes benchmarks/results/noise_rivals.csv, a row per schedule and method: right answers of n, forwards, and
the median ratio of its time to that of the plain answer to the same question. Scenes are of the evaluation split, seed 24, as in noise_law.py;
layers that read were planted at 2, 4 and 6.
"""

import argparse
import time
from itertools import islice
from pathlib import Path

import pandas as pd

from fusion_notebooks import baselines
from fusion_notebooks.baselines import counting
from fusion_notebooks.contrast import refine
from fusion_notebooks.demo import stream
from fusion_notebooks.mllm import MLLM

OUT = Path(__file__).parent / 'results'
READ = [2, 4, 6]
SEED = 24


def asked(mllm, s):
    "Method → function without arguments that answers the question"
    about = mllm, s.image, s.question
    return dict(
        base=lambda: mllm.answer(s.image, s.question),
        var=lambda: baselines.answer(*about, 'var').answer,
        var_all_heads=lambda: baselines.answer(*about, 'var', rho=0.0).answer,
        pai=lambda: baselines.answer(*about, 'pai').answer,
        pai_attention=lambda: baselines.answer(*about, 'pai', gamma=1.0).answer,
        crop_late=lambda: refine(*about, by='late', candidates=READ).answer,
        crop_contrast=lambda: refine(*about, by='contrast', candidates=READ).answer,
        crop_signed=lambda: refine(*about, by='signed', candidates=READ).answer,
    )


def rows_of(mllm, s):
    "A row per method: right or wrong, its forwards, its time over that of the plain answer"
    rows = []
    for name, run in asked(mllm, s).items():
        began = time.perf_counter()
        with counting(mllm) as cost:
            answer = run()
        seconds = time.perf_counter() - began
        rows.append(dict(method=name, right=int(answer.text == s.answers[0]), forwards=cost.forwards, seconds=seconds))
    return [row | dict(ratio=row['seconds'] / rows[0]['seconds']) for row in rows]


def main(n):
    mllm = MLLM.load('planted-noise', device='cpu')
    questions = list(islice(stream('evaluation', kinds=('fine',), seed=SEED), n))
    out = []
    for how in (None, 'flat', 'rising', 'harmful'):
        mllm.gate.sinks = how
        t = pd.DataFrame([row for s in questions for row in rows_of(mllm, s)])
        per = t.groupby('method', sort=False)
        table = per.agg(
            n=('right', 'size'), right=('right', 'sum'), forwards=('forwards', 'mean'), ratio=('ratio', 'median')
        )
        out.append(table.reset_index().assign(sinks=how or 'none'))
    found = pd.concat(out)[['sinks', 'method', 'n', 'right', 'forwards', 'ratio']]
    found.round(2).to_csv(OUT / 'noise_rivals.csv', index=False)
    print(found.to_string(index=False, float_format=lambda v: f'{v:.2f}'))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--n', type=int, default=100, help='questions per schedule')
    main(parser.parse_args().n)
