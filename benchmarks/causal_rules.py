"""How near attribution rules come to exact closings, over layers and over heads: writes results/causal_rules.csv

    python benchmarks/causal_rules.py [--n 24] [MODEL ...]

Rules: the gradient of the plain forward (first order; the softmax is recomputed in closed form, as AtP* asks for,
Kramár et al., arXiv 2403.00745), relevance patching (RelP, Jafari et al., arXiv 2508.21258: norms, attention weights and
activations are frozen, products share), the integral along each layer's own closing by 2, 3 and 5 steps, the default,
and the integral along each head's own closing.
"""

import argparse
import contextlib
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
from fusion_notebooks import causal, demo
from fusion_notebooks.causal import closings
from fusion_notebooks.causal.maps import RULES as STEPS
from fusion_notebooks.mllm import MLLM
from fusion_notebooks.mllm.state import reader
from tqdm import tqdm

MODELS = 'glyph-llava', 'planted-2-6', 'planted-2-4-6'
OUT = Path(__file__).parent / 'results' / 'causal_rules.csv'


def proportional(x, y):
    "y, with a gradient as if it were x times a constant"
    safe = x.detach().where(x.detach() != 0, x.new_ones(()))
    return x * (y.detach() / safe)


def frozen_heads(scores, value, prefix):
    "Heads whose attention weights have no gradient"
    return heads_out(scores.detach(), value, prefix)


heads_out = closings._heads_out


@contextlib.contextmanager
def relevance(mllm):
    "Gradients by RelP's rules"

    def linear(module, args, out):
        return proportional(args[0], out)

    def halved(module, args):
        return (0.5 * args[0] + 0.5 * args[0].detach(),)

    reader(linear), reader(halved)  # what the model computes stays as it is; its gradients do not
    hooks = []
    for name, module in mllm.decoder.named_modules():
        if type(module).__name__.endswith('Norm') or name.endswith('act_fn'):
            hooks.append(module.register_forward_hook(linear))
        if name.endswith('down_proj'):
            hooks.append(module.register_forward_pre_hook(halved))
    try:
        with mock.patch.object(closings, '_heads_out', frozen_heads):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def by_own_path(mllm, p, found, heads, steps=3):
    "(layers, heads) the integral along the closing of each head alone"
    rule = STEPS[steps]
    rows = [(i, h, t, w) for i in mllm.reading for h in range(heads) for t, w in rule if t]
    ran = causal.run_closings(mllm, p, [causal.Closing(i, t, (h,)) for i, h, t, _ in rows], token=found.token)
    out = np.zeros((mllm.n_layers, heads))
    for i in mllm.reading:
        seen = ran.seen[i]
        plain = -(ran.slopes[i] * (seen.closed - seen.out)).sum((1, 2)).cpu().numpy()
        out[i] = rule[0][1] * plain
    for (i, h, _, weight), slope in zip(rows, ran.own):
        seen = ran.seen[i]
        out[i, h] -= weight * float((slope[h] * (seen.closed[h] - seen.out[h])).sum())
    return out


def correlation(ours, exact):
    "Pearson's, where there is something to correlate"
    return np.corrcoef(ours.ravel(), exact.ravel())[0, 1] if exact.std() > 0 and ours.std() > 0 else np.nan


def judged(mllm, sample, rules):
    "A row per rule: correlations with exact closings of one sample"
    p = mllm.prompt(sample.image, sample.question)
    heads = mllm.model.config.get_text_config().num_attention_heads
    each = [causal.Closing(i) for i in mllm.reading]
    each += [causal.Closing(i, heads=(h,)) for i in mllm.reading for h in range(heads)]
    exact = causal.run_closings(mllm, p, each, gradients=False)
    lost = exact.plain - np.array(exact.odds)
    by_layer, by_head = lost[: len(mllm.reading)], lost[len(mllm.reading) :]
    at = list(mllm.reading)
    rows = []
    for name, (context, kw) in rules.items():
        with context(mllm):
            found = causal.causal_map(mllm, p, token=exact.token, **kw)
        over_layers, over_heads = correlation(found.integral[at], by_layer), correlation(found.heads[at], by_head)
        rows.append(dict(rule=name, layers=over_layers, heads=over_heads))
    own = by_own_path(mllm, p, found, heads)[at]
    rows.append(dict(rule='own path of each head, 3 steps', layers=np.nan, heads=correlation(own, by_head)))
    return rows


def plain(mllm):
    "No change of rules"
    return contextlib.nullcontext()


RULES = {
    'first order': (plain, dict(steps=1)),
    'relevance (RelP)': (relevance, dict(steps=1)),
    '2 steps': (plain, dict(steps=2)),
    'default (2 steps, 3 where they miss)': (plain, dict(steps='auto')),
    '3 steps': (plain, dict(steps=3)),
    '3 steps, not completed': (plain, dict(steps=3, complete=False)),
    '5 steps': (plain, dict(steps=5)),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('models', nargs='*', default=MODELS)
    parser.add_argument('--n', type=int, default=24)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        mllm = MLLM.load(name)
        for sample in tqdm(demo.samples(args.n), desc=name):
            rows += [dict(model=name) | row for row in judged(mllm, sample, RULES)]
    table = pd.DataFrame(rows).groupby(['model', 'rule'], sort=False)
    out = table.mean().join(table.size().rename('n')).reset_index().round(3)
    out.to_csv(OUT, index=False)
    print(out.to_string(index=False))


if __name__ == '__main__':
    main()
