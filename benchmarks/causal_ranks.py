"""Which layers of planted models does the closing of a layer find, question by question?

`python benchmarks/causal_ranks.py [--n 100]` writes results/causal_ranks.csv, a row per question and layer that nbs/07_causal/01_maps.ipynb reads.
A layer is, for this question: needed (open, and the model learned to read the picture there for such questions, `reads_at`),
open (but the model learned such questions while it showed another scene), decoy (another scene, always), or closed.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from fusion_notebooks import causal, demo
from fusion_notebooks.demo.recipes import reads_at
from fusion_notebooks.engine import Branch, BranchedBatch, prefixes
from fusion_notebooks.mllm import MLLM

MODELS = 'planted-2-6', 'planted-2-4-6', 'planted-3'
OUT = Path(__file__).parent / 'results' / 'causal_ranks.csv'
DONORS = 4  # other pictures that take a layer's place


def sort_of(gate, needed, i):
    "What layer i is for a question that needs some layers"
    if i in needed:
        return 'needed'
    if i in gate.closed:
        return 'closed'
    return 'open' if i in gate.open else 'decoy'


def odds_of(mllm, p, token, branches):
    "Log-odds of a token in rows that leave the plain one, in one batch"
    n = int(p.visual[-1]) + 1
    order = sorted(range(len(branches)), key=lambda k: branches[k].enter)
    rows = [Branch(0)] + [branches[k] for k in order]
    batch = BranchedBatch(mllm, rows, prefixes(mllm, [p], n), [p.visual], n)
    logits = batch.forward(mllm.encoded([p])['input_ids'][:, n:])[:, -1]
    found = np.empty(len(branches))
    found[order] = causal.log_odds(logits, token)[1:].tolist()
    return found


def closed(layers):
    "A row that does not see the picture at some layers"
    return Branch(0, min(layers, default=0), bias=dict.fromkeys(layers, -math.inf))


def swapped(own, other, i):
    "A row that reads another picture at layer i alone"
    keys, values = list(own.keys), list(own.values)
    keys[i], values[i] = other.keys[i], other.values[i]
    return Branch(0, i, replace(own, keys=keys, values=values))


def conditional(mllm, p, token):
    "(opened alone, closed while the other open ones are closed), each (layers,) nats that the layer brings"
    layers = list(range(mllm.n_layers))
    alone = [closed([j for j in layers if j != i]) for i in layers]
    before = [closed([j for j in mllm.gate.open if j != i]) for i in layers]
    after = [closed([j for j in layers if j == i or j in mllm.gate.open]) for i in layers]
    odds = odds_of(mllm, p, token, [closed(layers), *alone, *before, *after])
    blind, (alone, before, after) = odds[0], odds[1:].reshape(3, -1)
    return alone - blind, before - after


def by_swaps(mllm, p, found, donors):
    "(layers,) nats that the token loses where another picture takes the place of this one at one layer; mean over donors"
    n = int(p.visual[-1]) + 1
    own, *others = prefixes(mllm, [p, *donors], n)
    rows = [swapped(own, other, i) for other in others for i in range(mllm.n_layers)]
    return found.odds - odds_of(mllm, p, found.token, rows).reshape(len(donors), -1).mean(0)


def judged(mllm, asked, k):
    "Rows of question k"
    s = asked[k]
    p = mllm.prompt(s.image, s.question)
    donors = [mllm.prompt(asked[(k + d) % len(asked)].image, s.question) for d in range(1, DONORS + 1)]
    (found,) = causal.maps(mllm, p)
    alone, given = conditional(mllm, p, found.token)
    swaps = by_swaps(mllm, p, found, donors)
    needed = reads_at(s.kind, s.question, mllm.gate.open)
    right = mllm.decode([found.token]).strip() == s.answers[0]
    rows = []
    for i in range(mllm.n_layers):
        row = dict(sample=s.id, kind=s.kind, right=right, layer=i, sort=sort_of(mllm.gate, needed, i))
        each = dict(exact=found.exact[i], map=found.layers[i], alone=alone[i], given=given[i], swap=swaps[i])
        rows.append(row | {name: round(float(x), 4) for name, x in each.items()})
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--n', type=int, default=100)
    n = parser.parse_args().n
    rows = []
    for name in MODELS:
        mllm, asked = MLLM.load(name), demo.samples(n)
        for k in tqdm(range(n), desc=name):
            rows += [dict(model=name) | row for row in judged(mllm, asked, k)]
    pd.DataFrame(rows).to_csv(OUT, index=False)


if __name__ == '__main__':
    main()
