"A gate closes layers, feeds decoys, survives the fast paths and the disk; the planted models are what they say"

import numpy as np, pytest, torch
from safetensors.torch import save_file
from fusion_notebooks import demo, masking
from fusion_notebooks.hooks import capture, edit
from fusion_notebooks.mllm import Gate, MLLM
from conftest import randomise

SAMPLES = demo.samples(4)


def fresh(seed=0):
    torch.manual_seed(seed)
    model, processor = demo.make_model()
    return MLLM(randomise(model), processor)


def logits(mllm, p):
    with torch.inference_mode():
        return mllm.model(**p.inputs, use_cache=False).logits


def ask(mllm, k=0):
    return mllm.prompt(SAMPLES[k].image, SAMPLES[k].question)


@pytest.fixture(scope='module')
def planted():
    mllm = fresh()
    decoys = demo.decoy_states(mllm, (1, 5))
    Gate(mllm.model, mllm.image_token_id, (0, 2, 4, 6, 7), decoys)
    return mllm


def test_closed_layers_equal_a_knockout():
    plain, gated, closed = fresh(), fresh(), (0, 3, 7)
    Gate(gated.model, gated.image_token_id, closed)
    p = ask(plain)
    assert (logits(gated, p) - logits(plain, p)).abs().max() > 1e-2
    with edit(plain, closed, p.visual, 'knockout'):
        want = logits(plain, p)
    assert (logits(gated, p) - want).abs().max() < 1e-4


def test_a_decoy_is_read_by_the_text_alone():
    "Twin: the attention of that layer gets the other scene's states, and the picture's own rows keep what they would have got"
    plain, gated, i = fresh(), fresh(), 2
    decoy = demo.decoy_states(plain, (i,))[i]
    Gate(gated.model, gated.image_token_id, (), {i: decoy})
    p, own, attention = ask(plain), {}, plain.layers[i].self_attn
    keep = attention.register_forward_hook(lambda m, args, kw, out: own.update(out=out[0]), with_kwargs=True)
    before = logits(plain, p)
    keep.remove()

    def put(m, args, kw):
        h = kw['hidden_states'].clone()
        h[0, p.visual] = decoy
        return args, kw | dict(hidden_states=h)

    def restore(m, args, kw, out):
        o = out[0].clone()
        o[0, p.visual] = own['out'][0, p.visual]
        return (o, *out[1:])

    hooks = [
        attention.register_forward_pre_hook(put, with_kwargs=True),
        attention.register_forward_hook(restore, with_kwargs=True),
    ]
    want = logits(plain, p)
    for h in hooks:
        h.remove()
    assert (want - before).abs().max() > 1e-2 and (logits(gated, p) - want).abs().max() < 1e-4


def test_the_picture_reaches_text_at_open_layers_only(planted):
    "Two pictures, one question: with the open layer knocked out, they are the same to the text"
    a, b = (planted.prompt(s.image, SAMPLES[0].question) for s in SAMPLES[:2])
    assert planted.gate.open == (3,) and (logits(planted, a) - logits(planted, b))[0, -1].abs().max() > 1e-2
    closed = []
    for p in (a, b):
        with edit(planted, planted.gate.open, p.visual, 'knockout'):
            closed.append(logits(planted, p)[0, -1])
    assert (closed[0] - closed[1]).abs().max() < 1e-5
    with capture(planted) as cache:
        logits(planted, a)
    mass = cache.attention[0, :, 0].sum(-1)
    assert (mass[list(planted.gate.closed)] == 0).all() and (mass[[1, 3, 5]] > 0).all()


def test_fast_paths_keep_the_gate(planted):
    kw = dict(how=('zero', 'swap', 'knockout', 'soft'), limit=3)
    fast, naive = masking.sweep(planted, SAMPLES, **kw), masking.sweep(planted, SAMPLES, exact='naive', **kw)
    assert (
        {'branches', 'bank'} <= set(fast.path)
        and np.allclose(fast.logp, naive.logp, atol=1e-4)
        and (fast.prediction == naive.prediction).all()
    )
    assert [a.text for a in planted.answers([ask(planted, k) for k in range(4)])] == [
        planted.answer(ask(planted, k)).text for k in range(4)
    ]


def test_a_gate_lies_beside_the_weights(planted, tmp_path):
    demo.save_model(planted.model, planted.processor, tmp_path)
    planted.gate.save(tmp_path)
    again, p = MLLM.load(tmp_path, device='cpu', dtype=torch.bfloat16), ask(planted)
    assert again.gate.open == (3,) and again.gate.closed == planted.gate.closed and set(again.gate.decoys) == {1, 5}
    assert (logits(again, p).float() - logits(planted, p)).abs().median() < 0.1
    save_file(dict(what=torch.zeros(2)), tmp_path / 'gate.safetensors')
    with pytest.raises(ValueError, match='not a gate'):
        MLLM.load(tmp_path)
    save_file({'decoy.9': torch.zeros(64, 192)}, tmp_path / 'gate.safetensors', dict(closed='0'))
    with pytest.raises(ValueError, match='layer 9'):
        MLLM.load(tmp_path)


HEADS = dict(closed_heads={3: (2, 5)}, decoy_heads={3: (1, 4)})


@pytest.fixture(scope='module')
def by_heads():
    mllm = fresh()
    Gate(mllm.model, mllm.image_token_id, (0, 1, 2, 4, 5, 6, 7), demo.decoy_states(mllm, (3,)), **HEADS)
    return mllm


def test_closed_heads_equal_a_knockout_of_those_heads():
    plain, gated = fresh(), fresh()
    Gate(gated.model, gated.image_token_id, (0, 7), None, {3: (2, 5)})
    p = ask(plain)
    before = logits(plain, p)
    with edit(plain, (0, 7), p.visual, 'knockout'), edit(plain, 3, p.visual, 'knockout', heads=(2, 5)):
        want = logits(plain, p)
    assert (before - want).abs().max() > 1e-2
    assert (logits(gated, p) - want).abs().max() < 1e-4


def test_heads_on_a_decoy_read_another_scene_and_the_others_their_own(by_heads):
    "Of two pictures, text at layer 3 sees a difference through heads 0 and 3 alone"
    assert by_heads.gate.heads_at(3) == ['open', 'decoy', 'closed', 'open', 'decoy', 'closed']
    assert by_heads.gate.open == (3,) and by_heads.gate.decoy_layers == ()
    a, b = (by_heads.prompt(s.image, SAMPLES[0].question) for s in SAMPLES[:2])
    assert (logits(by_heads, a) - logits(by_heads, b))[0, -1].abs().max() > 1e-3
    closed = []
    for p in (a, b):
        with edit(by_heads, 3, p.visual, 'knockout', heads=(0, 3)):
            closed.append(logits(by_heads, p)[0, -1])
    assert (closed[0] - closed[1]).abs().max() < 1e-5
    before = logits(by_heads, a)[0, -1]
    with edit(by_heads, 3, a.visual, 'knockout', heads=(1, 4)):
        assert (logits(by_heads, a)[0, -1] - before).abs().max() > 1e-3  # they do read something
    with edit(by_heads, 3, a.visual, 'knockout', heads=(2, 5)):
        assert (logits(by_heads, a)[0, -1] - before).abs().max() < 1e-5


def test_fast_paths_keep_a_gate_of_heads(by_heads):
    kw = dict(how=('zero', 'swap', 'knockout'), limit=3)
    fast, naive = masking.sweep(by_heads, SAMPLES, **kw), masking.sweep(by_heads, SAMPLES, exact='naive', **kw)
    assert {'branches', 'bank'} <= set(fast.path) and np.allclose(fast.logp, naive.logp, atol=1e-4)


def test_a_gate_of_heads_lies_beside_the_weights(by_heads, tmp_path):
    demo.save_model(by_heads.model, by_heads.processor, tmp_path)
    by_heads.gate.save(tmp_path)
    again = MLLM.load(tmp_path, device='cpu', dtype=torch.bfloat16)
    assert [again.gate.heads_at(i) for i in range(8)] == [by_heads.gate.heads_at(i) for i in range(8)]


@pytest.mark.parametrize(
    'metadata, said',
    [
        (dict(closed_heads='[1]'), 'no table of heads'),
        (dict(closed_heads='{"3": [true]}'), 'no table of heads'),
        (dict(closed_heads='{"3": [6]}'), 'head 6'),
        (dict(decoy_heads='{"2": [1]}'), 'no decoy'),
        (dict(closed_heads='{"x": [1]}'), 'not a gate'),
        (dict(closed_heads='{"3": [1'), 'not a gate'),
    ],
)
def test_damaged_heads_are_refused(planted, tmp_path, metadata, said):
    demo.save_model(planted.model, planted.processor, tmp_path)
    save_file({'decoy.3': torch.zeros(64, 192)}, tmp_path / 'gate.safetensors', dict(closed='0') | metadata)
    with pytest.raises(ValueError, match=said):
        MLLM.load(tmp_path)
