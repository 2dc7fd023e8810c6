"""When does subtracting an early map help? Crops and masks of planted-noise over a grid of noise and early layers.

`python benchmarks/noise_law.py` writes benchmarks/results/noise_law.csv, a row per question and method, noise_mask.csv, and what the
law says beforehand: noise_layers.csv and noise_foreseen.csv; and noise_calibrated.csv, crops at layers that were measured (alone with
`--calibrated`). nbs/guides/noise_law.ipynb reads them. All scenes are of the evaluation split, seed 24; layers were chosen on the calibration split.
"""

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd

from fusion_notebooks import fusion
from fusion_notebooks.contrast import (
    answer_masked,
    answer_with_crops,
    contrastive_attention,
    crop_box,
    first_pass,
    lowest,
    propose,
)
from fusion_notebooks.demo import stream
from fusion_notebooks.mllm import MLLM, Sinks, schedule

OUT = Path(__file__).parent / 'results'
LATE, EARLY = 6, (0, 2, 5)  # where fine questions read; closed, open for colours, decoy
GRID = ('flat 0', 'rising 0.6', 'flat 0.3', 'falling 0.6', 'flat 0.8', 'rising 0.8')
SEED = 24


def asked(n):
    "Fine questions of the evaluation split"
    return list(islice(stream('evaluation', kinds=('fine',), seed=SEED), n))


def looks(maps):
    "Name → map: the late one, its differences to early ones, the mean of all layers that read"
    late = maps[LATE]
    return dict(late=late, read=maps[[2, 4, 6]].mean(0)) | {f'early{i}': late - maps[i] for i in EARLY}


def crops(mllm, s, methods):
    "Rows of one sample: the plain answer, and one with each crop"
    first = first_pass(mllm, s.image, s.question)
    grid, seen = first.prompt.grids[0], looks(np.nan_to_num(fusion.normalise(first.maps)))
    boxes = {name: crop_box(values, grid, 96) for name, values in seen.items()}
    boxes |= {
        'focus': crop_box(seen['read'], grid, 96, 'focus'),
        'focus-early0': crop_box(seen['early0'], grid, 96, 'focus'),
    }
    boxes = {name: box for name, box in boxes.items() if name in methods}
    answers = answer_with_crops(mllm, first.trace, [s.image.crop(box) for box in boxes.values()], 6)
    rows = [dict(sample=s.id, method='base', right=int(first.base.text == s.answers[0]))]
    for (name, box), (answer, _, _) in zip(boxes.items(), answers):
        hit = round(float(fusion.evidence_share(s.box, box)[0]), 2)
        rows.append(dict(sample=s.id, method=name, right=int(answer.text == s.answers[0]), hit=hit))
    return rows


def masks(mllm, s, k):
    "One row: is the answer right, plainly and with a fifth of the visual tokens masked at layer 6?"
    first = first_pass(mllm, s.image, s.question)
    maps = np.nan_to_num(fusion.normalise(first.maps))
    values = dict(
        mask=maps[4] - maps[0],
        paper=contrastive_attention(first.maps, [2, 4], 5).map,
        late=maps[4],
        random=np.random.default_rng(k).random(len(maps[4])),
        highest=maps[0] - maps[4],
    )
    answers = answer_masked(mllm, first.prompt, [lowest(v, 0.2) for v in values.values()], LATE, 6)
    right = {name: int(answer.text == s.answers[0]) for name, answer in zip(values, answers)}
    return dict(sample=s.id, base=int(first.base.text == s.answers[0])) | right


def clean_maps(mllm, samples):
    "((samples, layers, visual) attention without noise, (samples, visual) evidence, the grid)"
    mllm.gate.sinks = None
    firsts = [first_pass(mllm, s.image, s.question) for s in samples]
    grid = firsts[0].prompt.grids[0]
    shares = [fusion.evidence_share(grid.boxes, s.box) for s in samples]
    return np.nan_to_num([first.maps for first in firsts]), np.array(shares), grid


def layer_rows(mllm, n):
    "Per layer, on calibration scenes without noise: attention on the picture, and on the evidence"
    maps, shares, _ = clean_maps(mllm, list(islice(stream('calibration', kinds=('fine',)), n)))
    evidence = (maps * shares[:, None]).sum(-1).mean(0)
    return pd.DataFrame(dict(layer=range(mllm.n_layers), seen=maps.sum(-1).mean(0), evidence=evidence)).round(4)


def foreseen(mllm, samples, cells):
    "How much of the evidence a crop will hold: the formula A = (1 − s)·A + s·N on maps without noise, and ViCrop's window"
    maps, _, grid = clean_maps(mllm, samples)
    noise = np.isin(np.arange(maps.shape[-1]), mllm.gate.schedules['flat'].cells)

    def held(values):
        boxes = [crop_box(v, grid, 96) for v in values]
        return round(float(np.mean([fusion.evidence_share(s.box, b)[0] for s, b in zip(samples, boxes)])), 3)

    rows = []
    for how, share in cells:
        s = np.array(schedule(how, share, mllm.n_layers, LATE))[:, None]
        mixed = np.nan_to_num(fusion.normalise((1 - s) * maps + s * noise / noise.sum()))
        for early in EARLY:
            held_by = dict(held_late=held(mixed[:, LATE]), held_contrast=held(mixed[:, LATE] - mixed[:, early]))
            rows.append(dict(how=how, share=share, early=early) | held_by)
    return pd.DataFrame(rows)


def measured(mllm, n):
    "The pair that boxes name on calibration scenes, under the sinks in force"
    maps, shares = [], []
    for s in islice(stream('calibration', kinds=('fine',)), n):
        first = first_pass(mllm, s.image, s.question)
        grid = first.prompt.grids[0]
        maps.append(grid.of(first.maps))
        shares.append(fusion.evidence_share(grid.boxes, s.box))
    return fusion.layers_by_boxes(maps, shares)


def calibrated(mllm, samples, chosen=100):
    "Rows of crops at measured layers, beside those at the layers that read, without noise and with flat noise"
    rows = []
    for sinks in (None, 'flat'):
        mllm.gate.sinks = sinks
        pair = measured(mllm, chosen)
        about = dict(sinks=sinks or 'none', early='none' if pair.early is None else pair.early, late=pair.late)
        for s in samples:
            first = first_pass(mllm, s.image, s.question)
            maps, grid = np.nan_to_num(fusion.normalise(first.maps)), first.prompt.grids[0]
            left, read = maps[pair.late] - (0 if pair.early is None else maps[pair.early]), maps[[2, 4, 6]].mean(0)
            boxes = dict(
                calibrated=crop_box(left, grid, 96),
                read=crop_box(read, grid, 96),
                focus=crop_box(read, grid, 96, 'focus'),
                oracle=propose(mllm, first, by='oracle', box=s.box).box,
            )
            answers = answer_with_crops(mllm, first.trace, [s.image.crop(box) for box in boxes.values()], 6)
            row = {name: int(answer.text == s.answers[0]) for name, (answer, _, _) in zip(boxes, answers)}
            rows.append(about | dict(sample=s.id, base=int(first.base.text == s.answers[0])) | row)
    return pd.DataFrame(rows)


def main(n, cells):
    mllm = MLLM.load('planted-noise', device='cpu')
    flat = mllm.gate.schedules['flat']
    layer_rows(mllm, 80).to_csv(OUT / 'noise_layers.csv', index=False)
    planned = [(cell.split()[0], float(cell.split()[1])) for cell in ('flat 0.6', *GRID)]
    foreseen(mllm, asked(cells), planned).to_csv(OUT / 'noise_foreseen.csv', index=False)
    few = ('late', 'early0', 'early2', 'early5')
    plan = [('flat 0.6', n, (*few, 'read', 'focus', 'focus-early0'))]
    plan += [
        (cell, 200 if cell == 'flat 0' else cells, (*few, 'read', 'focus') if cell == 'flat 0' else few)
        for cell in GRID
    ]
    rows = []
    for cell, some, methods in plan:
        how, share = cell.split()
        mllm.gate.sinks = None
        if float(share):
            mllm.gate.sinks = Sinks(flat.cells, schedule(how, float(share), mllm.n_layers, LATE))
        for s in asked(some):
            rows += [dict(how=how, share=float(share)) | row for row in crops(mllm, s, methods)]
    pd.DataFrame(rows).to_csv(OUT / 'noise_law.csv', index=False)
    mllm.gate.sinks = 'harmful'
    pd.DataFrame([masks(mllm, s, k) for k, s in enumerate(asked(n))]).to_csv(OUT / 'noise_mask.csv', index=False)
    calibrated(mllm, asked(n)).to_csv(OUT / 'noise_calibrated.csv', index=False)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--n', type=int, default=500, help='questions of the headline claims')
    parser.add_argument('--cells', type=int, default=120, help='questions per cell of the grid')
    parser.add_argument('--calibrated', action='store_true', help='only noise_calibrated.csv')
    args = parser.parse_args()
    if args.calibrated:
        rows = calibrated(MLLM.load('planted-noise', device='cpu'), asked(args.n))
        rows.to_csv(OUT / 'noise_calibrated.csv', index=False)
    else:
        main(args.n, args.cells)
