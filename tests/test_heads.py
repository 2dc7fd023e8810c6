"Edits of some heads equal attention by hand, in every family, and the engine equals one forward per edit"

import pytest, torch
from fusion_notebooks.core.errors import BadInput
from fusion_notebooks.hooks import attending, edit
from fusion_notebooks.hooks.edits import n_heads
from fusion_notebooks.masking import sweep
from test_ladder import SAMPLES
from twins import FAMILIES, family as twin


def logits(mllm, p):
    with torch.inference_mode():
        return mllm.model(**p.inputs).logits[0, -1].float()


def closed_by_hand(mllm, p, layer, heads, factor):
    "Logits with softmax weights of chosen heads scaled and renormalised, in an attention written out here"
    mine = set(mllm.layers[layer].modules())
    first = int(p.visual[-1]) + 1

    def attention(module, q, k, v, mask, scaling=None, **kw):
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(2, 3) * (scaling or q.shape[-1] ** -0.5)
        if mask is None:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        else:
            allowed = mask if mask.dtype == torch.bool else mask == 0
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        if module in mine:
            for h in heads:
                weights[:, h, first:, p.visual] *= factor
            weights = weights / weights.sum(-1, keepdim=True)
        return (weights @ v).transpose(1, 2).contiguous(), None

    with attending(mllm, 'by_hand', attention):
        return logits(mllm, p)


@pytest.fixture(scope='module', params=[f for f in FAMILIES if f != 'mllama'])
def family(request):
    return twin(request.param)


@pytest.mark.parametrize('how, factor', [('knockout', 0.0), ('soft', 0.05)])
@pytest.mark.parametrize('heads', [[2], [0, 3]])
def test_edit_equals_attention_by_hand(family, heads, how, factor):
    p = family.prompt(SAMPLES[0].image, SAMPLES[0].question)
    plain = logits(family, p)
    layer = family.reading[1]
    with edit(family, layer, p.visual, how, heads=heads):
        got = logits(family, p)
    want = closed_by_hand(family, p, layer, heads, factor)
    scale = max(1, plain.abs().max())
    assert (got - want).abs().max() < 2e-5 * scale
    assert (got - plain).abs().max() > 1e-4
    assert torch.equal(logits(family, p), plain)


def test_sweep_equals_a_forward_per_edit(family):
    layers = [0, family.n_layers - 1]
    fast, naive = (
        sweep(family, SAMPLES[:2], ('knockout', 'soft'), layers=layers, heads='each', exact=exact)
        for exact in ('auto', 'naive')
    )
    both = fast.merge(naive, on=['sample', 'how', 'layer', 'head'])
    assert len(both) == len(fast) == len(naive) == 2 * (1 + 2 * 2 * n_heads(family, 0))
    assert (both.prediction_x == both.prediction_y).all()
    assert ((both.logp_x - both.logp_y).abs() < 1e-5 * both.logp_y.abs().clip(1)).all()
    assert both.groupby(['how', 'layer', 'head']).logp_x.first().nunique() > n_heads(family, 0)


def test_all_heads_are_no_choice(family):
    every = range(n_heads(family, 0))
    chosen, all_of_them = (sweep(family, SAMPLES[:1], 'knockout', heads=heads) for heads in (every, None))
    assert (chosen.logp - all_of_them.logp).abs().max() < 1e-5 * max(1, all_of_them.logp.abs().max())


def test_cross_attention():
    "A head that may read no key reads nothing; the others read what they read before"
    mllm = twin('mllama')
    p = mllm.prompt(SAMPLES[0].image, SAMPLES[0].question)
    layer = mllm.cross[0]
    attention = mllm.layers[layer].cross_attn
    plain = logits(mllm, p)
    read = []
    handle = attention.o_proj.register_forward_pre_hook(lambda module, args: read.append(args[0].clone()))
    logits(mllm, p)
    with edit(mllm, layer, p.visual, 'knockout', heads=[1, 2]):
        edited = logits(mllm, p)
    handle.remove()
    before, after = (x.unflatten(-1, (n_heads(mllm, layer), -1)) for x in read)
    some = [0, 3]
    assert torch.allclose(before[:, :, some], after[:, :, some], atol=1e-6) and before[:, :, 1].any()
    with edit(mllm, layer, p.visual, 'knockout', heads=range(n_heads(mllm, layer))):
        every = logits(mllm, p)
    with edit(mllm, layer, p.visual, 'knockout'):
        assert torch.allclose(every, logits(mllm, p), atol=1e-6)
    assert (edited - plain).abs().max() > 1e-5 and not torch.allclose(edited, every)
    assert torch.equal(logits(mllm, p), plain)


def test_some_rows_of_a_batch():
    mllm = twin('llava')
    p = mllm.prompt(SAMPLES[0].image, SAMPLES[0].question)
    two = {k: torch.cat([v, v]) for k, v in p.inputs.items()}
    with torch.inference_mode():
        plain = mllm.model(**two).logits[:, -1]
        with edit(mllm, 1, p.visual, 'knockout', batch=[1], heads=2):
            edited = mllm.model(**two).logits[:, -1]
    with edit(mllm, 1, p.visual, 'knockout', heads=2):
        alone = logits(mllm, p)
    assert torch.allclose(edited[0], plain[0], atol=1e-5) and torch.allclose(edited[1], alone, atol=1e-4)


@pytest.mark.parametrize(
    'kw, word',
    [
        (dict(how='zero', heads=0), 'all heads share'),
        (dict(how='knockout', heads=9), 'no head 9'),
        (dict(how='knockout', heads=[True]), 'is no head'),
        (dict(how='knockout', heads=[]), 'no head to edit'),
        (dict(how='knockout', heads='all'), "'each'"),
    ],
)
def test_refusals(kw, word):
    with pytest.raises(BadInput, match=word):
        sweep(twin('llava'), SAMPLES[:1], **kw)
