"Closings equal a forward per edit in every family, their gradients equal small steps, and maps find what was planted"

import subprocess
import sys
import numpy as np
import pandas as pd
import pytest, torch
from conftest import noise_image
from fusion_notebooks import analyses, baselines, causal, demo, hooks, masking, plots, results
from fusion_notebooks.causal import Closing, closings, log_odds, run_closings
from fusion_notebooks.core import catalog
from fusion_notebooks.core.errors import BadInput, NotSupported
from fusion_notebooks.engine import capabilities
from fusion_notebooks.mllm import MLLM
from fusion_notebooks.mllm.state import reader
from test_ladder import SAMPLES
from twins import FAMILIES, family as twin


def prompt_of(mllm, sample):
    return mllm.prompt(sample.image, sample.question)


def naive(mllm, p, token, layers=(), heads=None, before=()):
    "Log-odds of a token by a forward of its own"
    ids = torch.tensor([list(before)], dtype=torch.long)
    inputs = p.inputs | dict(input_ids=torch.cat([p.inputs['input_ids'], ids], 1))
    if before:
        inputs = mllm.copies(p, 1, list(before))
    with torch.inference_mode(), hooks.edit(mllm, list(layers), p.visual, 'knockout', heads=heads):
        return float(log_odds(mllm.model(**inputs).logits[0, -1].float(), token))


@pytest.fixture(scope='module', params=[f for f in FAMILIES if f not in ('mllama', 'instructblip')])
def family(request):
    return twin(request.param)


def test_closings_equal_a_forward_per_edit(family):
    p = prompt_of(family, SAMPLES[0])
    layers = list(family.reading)
    rows = [Closing(layers[-1], heads=(1,)), *map(Closing, layers), Closing(layers[1], heads=(0, 3))]
    found = run_closings(family, p, rows)
    scale = max(1, abs(found.plain))
    assert abs(found.plain - naive(family, p, found.token)) < 2e-5 * scale
    for row, odds in zip(rows, found.odds):
        assert abs(odds - naive(family, p, found.token, [row.layer], row.heads)) < 5e-5 * scale
    assert len({round(odds, 5) for odds in found.odds}) > len(layers)


def test_gradients_equal_small_steps(family):
    p = prompt_of(family, SAMPLES[0])
    i, small = family.reading[1], 0.02
    found = run_closings(family, p, [Closing(i, 0.5)])
    near = run_closings(family, p, [Closing(i, 0.5 - small), Closing(i, 0.5 + small)], gradients=False)
    seen = found.seen[i]
    slope = float((found.own[0] * (seen.closed - seen.out)).sum())
    assert slope == pytest.approx((near.odds[1] - near.odds[0]) / (2 * small), rel=0.03, abs=2e-3)


@pytest.mark.parametrize('name', ['llava', 'qwen2_vl', 'paligemma'])
def test_batches_equal_one_batch(name, monkeypatch):
    mllm = twin(name)
    p = prompt_of(mllm, SAMPLES[0])
    whole = causal.causal_map(mllm, p, steps=3)
    monkeypatch.setattr(closings, 'fitting', lambda *_: 3)
    parts = causal.causal_map(mllm, p, steps=3)
    for name in ('effects', 'shares', 'heads', 'exact'):
        a, b = getattr(whole, name), getattr(parts, name)
        assert np.allclose(a, b, atol=1e-5 * max(1, np.nanmax(abs(a))), equal_nan=True)


def questions(mllm):
    "Prompts of unequal lengths over two pictures, in mixed order"
    texts = (
        'Which colour?',
        'Look at the star. What digit is on it?',
        'What is there to see in this picture, and where?',
    )
    return [mllm.prompt(s.image, text) for text in texts for s in SAMPLES[:2]]


@pytest.mark.parametrize('steps', [1, 3, 'auto'])
@pytest.mark.parametrize('name', ['llava', 'qwen2_vl', 'qwen3_vl', 'internvl', 'gemma3', 'paligemma'])
def test_several_samples_equal_single_calls(name, steps, monkeypatch):
    "Padded questions over several prefixes give what each sample gives alone; where none can be shared, all go alone"
    mllm = twin(name)
    prompts = questions(mllm)
    assert len({p.length for p in prompts}) > 2
    sizes, run = [], closings._run_some

    def noting(mllm, asked, gradients):
        sizes.append(len(asked))
        return run(mllm, asked, gradients)

    monkeypatch.setattr(closings, '_run_some', noting)
    together = causal.maps_of(mllm, prompts, steps=steps)
    assert max(sizes) == dict(gemma3=2, paligemma=1).get(name, len(prompts))
    for p, (found,) in zip(prompts, together):
        (alone,) = causal.maps(mllm, p, steps=steps)
        assert found.prompt is p and found.token == alone.token and found.odds == pytest.approx(alone.odds, abs=1e-5)
        assert (found.steps == alone.steps).all()
        for part in ('effects', 'shares', 'heads', 'integral', 'exact'):
            a, b = getattr(found, part), getattr(alone, part)
            assert a.shape == b.shape and (np.isnan(a) == np.isnan(b)).all()
            assert np.nanmax(abs(a - b)) < 1e-5 * max(1, np.nanmax(abs(b))), part


def test_pictures_of_two_sizes_and_every_token():
    mllm = twin('qwen2_vl')
    asked = [((96, 48), 'Which digit?'), ((48, 48), 'What color is the circle?'), ((96, 48), 'What is there?')]
    prompts = [mllm.prompt(noise_image(k, size), text) for k, (size, text) in enumerate(asked)]
    assert len({len(p.visual) for p in prompts}) == 2
    answers = [mllm.answer(p, max_new_tokens=3).ids for p in prompts]
    for found, p, answer in zip(causal.maps_of(mllm, prompts, answers, tokens=None), prompts, answers):
        assert [m.token for m in found] == list(answer)
        for k, m in enumerate(found):
            alone = causal.causal_map(mllm, p, tuple(answer[:k]), answer[k])
            assert np.nanmax(abs(m.heads - alone.heads)) < 1e-5 * max(1, np.nanmax(abs(alone.heads)))


def test_batches_are_refused_where_the_picture_sees_the_question():
    prefix_lm, mllm = twin('paligemma'), twin('llava')
    asked = [prompt_of(prefix_lm, s) for s in SAMPLES[:2]]
    with pytest.raises(NotSupported, match='share no batch'):
        causal.maps_of(prefix_lm, asked, batch=2)
    assert len(causal.maps_of(prefix_lm, asked, batch=1)) == 2 and causal.maps_of(mllm, []) == []
    asked = [prompt_of(mllm, s) for s in SAMPLES[:2]]
    with pytest.raises(BadInput, match='batch is a number'):
        causal.maps_of(mllm, asked, batch=0)
    with pytest.raises(BadInput, match='2 samples and 1 answers'):
        causal.maps_of(mllm, asked, answers=[None])


def test_one_token_by_hand():
    "The output of a head without one key, from weights that are renormalised key by key"
    mllm = MLLM.load('glyph-llava')
    p = prompt_of(mllm, demo.samples(1)[0])
    found, by_map = run_closings(mllm, p), causal.causal_map(mllm, p, steps=1)
    for i, h in ((1, 0), (3, 2), (7, 5)):
        seen, slope = found.seen[i], found.slopes[i][h].double()
        weights, values = seen.weights[h].double(), seen.values[h].double()
        rest = seen.rest[h].double()[:, None] * seen.closed[h].double()
        out = weights @ values + rest
        assert torch.allclose(out, seen.out[h].double(), atol=1e-4)
        for j in range(0, len(p.visual), 7):
            left = weights.clone()
            left[:, j] = 0
            without = (left @ values + rest) / (left.sum(-1) + seen.rest[h].double())[:, None]
            loss = -float((slope * (without - out)).sum())
            assert by_map.effects[i, h, j] == pytest.approx(loss, rel=1e-3, abs=1e-6)


def test_parts_add_up(family):
    found = causal.causal_map(family, prompt_of(family, SAMPLES[0]))
    reading = list(family.reading)
    assert np.allclose(found.shares.sum(-1), found.heads, equal_nan=True)
    assert np.isnan(found.heads).all(1).sum() == family.n_layers - len(reading)
    assert np.isfinite(found.error[reading]).all()


def test_more_steps_miss_less():
    mllm = MLLM.load('glyph-llava')
    asked = demo.samples(6)
    miss = {}
    for steps in (1, 2, 3, 5):
        missed = []
        for s in asked:
            found = causal.causal_map(mllm, prompt_of(mllm, s), steps=steps, complete=False)
            missed.append(np.nanmax(abs(found.error)))
        miss[steps] = np.mean(missed)
    assert miss[5] < miss[3] < miss[2] and miss[5] < miss[1]
    maps = [causal.causal_map(mllm, prompt_of(mllm, s)) for s in asked]
    assert {*np.concatenate([m.steps for m in maps])} <= {2, 3}


def test_what_is_completed_still_says_how_far_it_was_off():
    mllm = MLLM.load('glyph-llava')
    p = prompt_of(mllm, demo.samples(1)[0])
    completed, plain = (causal.causal_map(mllm, p, steps=2, complete=complete) for complete in (True, False))
    assert np.allclose(completed.integral, plain.integral) and np.allclose(plain.layers, plain.integral)
    assert np.allclose(completed.error, completed.integral - completed.exact)
    left = np.nanmax(abs(completed.layers - completed.exact))
    assert left < 0.5 * np.nanmax(abs(completed.error))


@pytest.mark.parametrize('name', ['glyph-llava', 'glyph-qwen2vl', 'planted-2-6', 'planted-3', 'planted-2-4-6'])
def test_the_integral_follows_the_exact_sweep(name):
    "Pearson's correlation over layers per question, of the integral as its rule has it, before it is completed"
    mllm = MLLM.load(name)
    found = [m for (m,) in causal.maps_of(mllm, demo.samples(3))]
    assert np.mean([np.corrcoef(m.integral, m.exact)[0, 1] for m in found]) > 0.9


def test_every_token_of_an_answer():
    mllm = twin('llava')
    p = prompt_of(mllm, SAMPLES[0])
    answer = mllm.answer(p, max_new_tokens=3)
    whole = causal.maps(mllm, p, answer=answer, tokens=None)
    assert [m.token for m in whole] == answer.ids and len(whole) == 3
    for k, m in enumerate(whole):
        before = tuple(answer.ids[:k])
        plain = naive(mllm, p, m.token, before=before)
        assert m.odds == pytest.approx(plain, abs=1e-4)
        assert m.exact[1] == pytest.approx(plain - naive(mllm, p, m.token, [1], before=before), abs=1e-4)
    assert not np.allclose(whole[0].heads, whole[1].heads)


@pytest.mark.parametrize('name', ['planted-2-6', 'planted-3', 'planted-2-4-6'])
def test_planted_layers(name):
    "By the mean of some questions every open layer stands above every decoy and every closed one"
    mllm = MLLM.load(name)
    mean = np.mean([m.layers for (m,) in causal.maps_of(mllm, demo.samples(16))], 0)
    opened = list(mllm.gate.open)
    assert sorted(np.argsort(-mean)[: len(opened)]) == opened
    assert abs(mean[list(mllm.gate.closed)]).max(initial=0) < 1e-4


def test_the_model_is_as_found():
    mllm = twin('llava')
    p = prompt_of(mllm, SAMPLES[0])
    asking = [w.requires_grad for w in mllm.model.parameters()]
    state, before = mllm.state(), naive(mllm, p, 5)
    causal.maps(mllm, p)

    def broken(module, args):
        raise RuntimeError('broken on purpose')

    handle = mllm.layers[2].register_forward_pre_hook(reader(broken))
    with pytest.raises(RuntimeError, match='on purpose'):
        run_closings(mllm, p, [Closing(1)])
    handle.remove()
    assert mllm.state() == state and naive(mllm, p, 5) == before
    assert [w.requires_grad for w in mllm.model.parameters()] == asking
    assert all(w.grad is None for w in mllm.model.parameters())


def test_refusals():
    mllm = twin('llava')
    p = prompt_of(mllm, SAMPLES[0])
    with pytest.raises(BadInput, match="steps is 'auto', 1, 2, 3, 5"):
        causal.causal_map(mllm, p, steps=4)
    with pytest.raises(BadInput, match='several ways'):
        causal.maps(mllm, p, answer='red')
    with pytest.raises(BadInput, match='no token'):
        causal.maps(mllm, p, answer=[])
    with hooks.edit(mllm, 1, p.visual, 'zero'), pytest.raises(NotSupported, match='a hook'):
        causal.maps(mllm, p)
    cross = twin('mllama')
    with pytest.raises(NotSupported, match='cross-attention'):
        causal.maps(cross, prompt_of(cross, SAMPLES[0]))
    keyless = twin('instructblip')
    with pytest.raises(NotSupported, match='kept keys'):
        causal.maps(keyless, prompt_of(keyless, SAMPLES[0]))
    open_prefix = twin('paligemma')
    asked = prompt_of(open_prefix, SAMPLES[0])
    assert not capabilities(open_prefix, asked).closed
    with pytest.raises(NotSupported, match='first token'):
        causal.maps(open_prefix, asked, answer=[5, 6], tokens=2)


def logits(mllm, p):
    with torch.inference_mode():
        return mllm.model(**p.inputs).logits[0, -1].float()


@pytest.mark.parametrize('name', ['llava', 'qwen2_vl', 'paligemma', 'mllama'])
def test_what_stays_open(name):
    "Kept layers, heads and tokens equal edits of all the others, and everything kept is the plain forward"
    mllm = twin(name)
    p = prompt_of(mllm, SAMPLES[0])
    reading = list(mllm.cross or mllm.reading)
    plain = logits(mllm, p)
    first = None if mllm.cross else int(p.visual.max()) + 1
    every = [(i, h) for i in reading for h in range(hooks.edits.n_heads(mllm, i))]
    for opened in (dict(layers=reading), dict(heads=every), dict(tokens=range(len(p.visual)))):
        with causal.only(mllm, p, **opened):
            assert torch.equal(logits(mllm, p), plain)
    with hooks.edit(mllm, reading, p.visual, 'knockout'):
        blind = logits(mllm, p)
    for opened in (dict(layers=[]), dict(heads=[]), dict(tokens=[])):
        with causal.only(mllm, p, **opened):
            assert torch.allclose(logits(mllm, p), blind, atol=1e-5)
    with causal.only(mllm, p, tokens=[0, 3]), torch.inference_mode():
        kept = logits(mllm, p)
    others = [j for j in range(len(p.visual)) if j not in (0, 3)]
    with hooks.edit(mllm, reading, p.visual[others], 'knockout', text_from=first):
        assert torch.allclose(logits(mllm, p), kept, atol=1e-5)
    with causal.only(mllm, p, heads=[c for c in every if c != every[1]]):
        kept = logits(mllm, p)
    with hooks.edit(mllm, every[1][0], p.visual, 'knockout', heads=every[1][1]):
        assert torch.allclose(logits(mllm, p), kept, atol=1e-5)
    assert not torch.allclose(kept, blind) and torch.equal(logits(mllm, p), plain)


def test_open_layers_are_enough():
    "On a planted model the open layers keep the answer, and as many others do not"
    mllm = MLLM.load('planted-2-6')
    kept = {'ranked': [], 'random': []}
    for k, s in enumerate(demo.samples(12)):
        p = prompt_of(mllm, s)
        (found,) = causal.maps(mllm, p)
        table = causal.curves(mllm, p, found.token, causal.ranked(found, 'layers'), 'layers', [0, 2, 8], seed=k)
        whole = table[(table['count'] == 8) & (table.curve == 'insertion')]
        assert whole.same.all() and np.allclose(whole.odds, found.odds, atol=1e-3)
        two = table[(table['count'] == 2) & (table.curve == 'insertion')].set_index('order').odds
        for order in kept:
            kept[order].append(two[order])
    assert np.mean(kept['ranked']) > np.mean(kept['random']) + 2


def test_sufficiency_refuses():
    mllm = twin('llava')
    p = prompt_of(mllm, SAMPLES[0])
    for opened in (dict(heads=[(0, 9)]), dict(heads=[(0, 1), (0, 1)]), dict(tokens=[99]), dict(layers=[9])):
        with pytest.raises(BadInput), causal.only(mllm, p, **opened):
            pass
    with pytest.raises(BadInput, match='parts'):
        causal.ranked(causal.causal_map(mllm, p), 'rows')


def test_the_crop_is_a_method_once_it_is_asked_for():
    "Loading the package leaves the catalog, and so the keys of studies, as they are"
    code = (
        'from fusion_notebooks import causal; from fusion_notebooks.core import catalog; print(list(catalog.METHODS))'
    )
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert 'vicrop-rel' in said and 'crop-causal' not in said
    before = dict(catalog.METHODS), dict(baselines.METHODS)
    mllm, s = MLLM.load('glyph-llava'), demo.samples(1, kinds=('fine',))[0]
    try:
        causal.add_crop_method()
        found = baselines.answer(mllm, s.image, s.question, method='crop-causal')
    finally:
        for registry, old in zip((catalog.METHODS, baselines.METHODS), before):
            registry.clear()
            registry.update(old)
    grid = prompt_of(mllm, s).grids[0]
    (by_map,) = causal.maps(mllm, s.image, s.question)
    assert np.allclose(found.map, grid.of(by_map.map), atol=1e-3)
    assert found.crop.size == (found.box[2] - found.box[0], found.box[3] - found.box[1])
    assert found.cost.backwards >= 1 and found.answer.text


def test_ranked_heads_by_hand():
    "Means, order and the heads that carry the effect, on numbers that are made up here"
    rng = np.random.default_rng(0)
    rows = []
    for k in range(40):
        noise = rng.normal(0, 0.1, (2, 3))
        for layer, heads in ((1, [0.0, 4.0, 0.0]), (5, [1.0, 0.0, -1.0])):
            rows.append(dict(sample=str(k), layer=layer, heads=np.array(heads) + noise[layer // 5]))
    table = results.head_table(pd.DataFrame(rows))
    assert [tuple(x) for x in table[['layer', 'head']].to_numpy()[[0, 1, -1]]] == [(1, 1), (5, 0), (5, 2)]
    assert table.effect[0] == pytest.approx(4, abs=0.1) and table.low[0] < table.effect[0] < table.high[0]
    assert len(results.carrying_heads(table, 0.5)) == 1 and len(results.carrying_heads(table, 0.95)) == 2
    assert results.heads_sentence(table, 0.95).startswith('2 of 6 heads, at layers 1 5, carry')
    assert 'No head' in results.heads_sentence(table.assign(low=-1.0))


def test_rows_of_the_analysis():
    mllm = MLLM.load('planted-3')
    asked = demo.samples(8)
    rows = analyses.causal_rows(mllm, asked)
    assert len(rows) == 8 * mllm.n_layers
    assert np.allclose(np.stack(rows.heads.to_numpy()).sum(1), rows.effect, atol=1e-3)
    assert rows.groupby('layer').exact.mean().idxmax() in mllm.gate.open
    closed = rows[rows.layer.isin(mllm.gate.closed)]
    assert abs(closed.exact).max() < 1e-3 and abs(closed['first']).max() < 1e-3
    record = analyses.heads_record(rows)
    assert record['n'] == 8 and record['heads'][0]['layer'] in mllm.gate.open
    fig = plots.causal_exact(rows)
    assert len(fig.axes) == 2


def test_low_precision():
    "In bfloat16 a map says the same, as far as its numbers go"
    mllm = MLLM.load('glyph-llava', dtype=torch.bfloat16)
    full = MLLM.load('glyph-llava')
    s = demo.samples(1)[0]
    (low,), (high,) = causal.maps(mllm, s.image, s.question), causal.maps(full, s.image, s.question)
    assert low.token == high.token and np.corrcoef(low.exact, high.exact)[0, 1] > 0.95
    assert np.corrcoef(low.heads.ravel(), high.heads.ravel())[0, 1] > 0.9


def test_known_heads():
    "Heads whose output is cut off by construction carry nothing; those that carry the answer are among the others"
    mllm = MLLM.load('planted-3')
    cut = [1, 4]
    attention = mllm.layers[3].self_attn
    with torch.no_grad():
        for h in cut:
            attention.o_proj.weight[:, h * attention.head_dim : (h + 1) * attention.head_dim] = 0
    found = [m for (m,) in causal.maps_of(mllm, demo.samples(12))]
    heads = np.stack([m.heads for m in found])
    assert abs(heads[:, 3, cut]).max() == 0 and abs(np.stack([m.effects[3, cut] for m in found])).max() == 0
    mean = heads.mean(0)
    layer, head = np.unravel_index(mean.argmax(), mean.shape)
    assert layer == 3 and head not in cut


@pytest.mark.parametrize('name', ['llava', 'qwen2_vl'])
def test_swap_maps_equal_swaps_and_small_steps(name):
    from fusion_notebooks.causal import swaps

    mllm = twin(name)
    p = prompt_of(mllm, SAMPLES[0])
    donor = mllm.prompt(SAMPLES[1].image, SAMPLES[0].question)
    found = causal.swap_map(mllm, p, donor, steps=1)
    states = masking.visual_states(mllm, donor)
    for i in range(mllm.n_layers):
        with torch.inference_mode(), hooks.edit(mllm, i, p.visual, 'swap', states=states):
            odds = float(log_odds(mllm.model(**p.inputs).logits[0, -1].float(), found.token))
        assert found.exact[i] == pytest.approx(found.odds - odds, abs=5e-5 * max(1, abs(odds)))
    assert abs(found.exact).max() > 1e-3
    n = int(p.visual[-1]) + 1
    own, other = swaps.prefixes(mllm, [p, donor], n)
    small = 0.002
    near = [swaps._slopes(mllm, p, *swaps._mixed(own, other, t), found.token)[1] for t in (-small, small)]
    assert found.layers[0] == pytest.approx((near[0] - near[1]) / (2 * small), rel=0.01, abs=1e-3)
    assert np.isnan(found.effects).any() == (len(mllm.reading) < mllm.n_layers)


def test_swap_maps_refuse_what_is_not_keys_and_values():
    mllm = twin('llava')
    p = prompt_of(mllm, SAMPLES[0])
    with pytest.raises(BadInput, match='same question'):
        causal.swap_map(mllm, p, mllm.prompt(SAMPLES[1].image, 'Another question, is it?'))
    with pytest.raises(BadInput, match='steps is 1, 2, 3, 5'):
        causal.swap_map(mllm, p, p, steps='auto')
    two = mllm.prompt([SAMPLES[0].image, SAMPLES[1].image], SAMPLES[0].question)
    apart = int(two.visual[-1]) - int(two.visual[0]) + 1 != len(two.visual)
    if apart:
        with pytest.raises(NotSupported, match='between'):
            causal.swap_map(mllm, two, two)
    prefix_lm = twin('paligemma')
    p = prompt_of(prefix_lm, SAMPLES[0])
    with pytest.raises(NotSupported):
        causal.swap_map(prefix_lm, p, p)


def test_heads_that_read_are_the_first_of_a_planted_model():
    "At its open layer two heads read the picture, two a decoy, two nothing; another layer has decoy heads, too"
    mllm = MLLM.load('planted-heads')
    rows = analyses.causal_rows(mllm, demo.samples(16))
    table = results.head_table(rows)
    opened = [(i, h) for i in mllm.gate.open for h, kind in enumerate(mllm.gate.heads_at(i)) if kind == 'open']
    first = [(int(r.layer), int(r.head)) for r in table.head(len(opened)).itertuples()]
    assert len(opened) == 2 and set(first) == set(opened)
    closed = [r.effect for r in table.itertuples() if mllm.gate.heads_at(r.layer)[r.head] == 'closed']
    assert np.abs(closed).max() < 1e-4
