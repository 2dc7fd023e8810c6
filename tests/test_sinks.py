"Planted sinks draw the share they were given, survive the fast paths and the disk, and are gone without a trace"

import json, numpy as np, pytest, torch
from safetensors.torch import save_file
from transformers.models.llama import modeling_llama
from fusion_notebooks import demo, fusion, masking
from fusion_notebooks.core.errors import BadInput
from fusion_notebooks.contrast import first_pass, propose
from fusion_notebooks.hooks import capture, edit
from fusion_notebooks.mllm import Gate, MLLM, schedule, Sinks
from conftest import randomise

SAMPLES = demo.samples(4)
CELLS = (4, 31, 59)
CLOSED, DECOYS = (0, 3, 7), (1, 5)


def fresh(closed=CLOSED, decoys=DECOYS, seed=0):
    torch.manual_seed(seed)
    mllm = MLLM(randomise(demo.make_model()[0]), demo.make_model()[1])
    states = {i: torch.randn(64, 192, generator=torch.Generator().manual_seed(i)) for i in decoys}
    Gate(mllm.model, mllm.image_token_id, closed, states)
    return mllm


def scene(layers=range(1, 7)):
    return {i: torch.randn(3, 192, generator=torch.Generator().manual_seed(50 + i)) for i in layers}


def logits(mllm, p):
    with torch.inference_mode():
        return mllm.model(**p.inputs, use_cache=False).logits


def ask(mllm, k=0, crop=False):
    image = SAMPLES[k].image
    return mllm.prompt([image, image.crop((0, 0, 200, 200))] if crop else image, SAMPLES[k].question)


def naive(mllm, i, share, shown):
    "Layer i's attention written out row by row: (states, positions) → output"
    attention, gate = mllm.layers[i].self_attn, mllm.gate
    scene = gate.decoys.get(i)

    def projected(h, rotations):
        q, k, v = (
            f(h)[0].view(len(h[0]), 6, 32).transpose(0, 1)
            for f in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return *(x[0] for x in modeling_llama.apply_rotary_pos_emb(q[None], k[None], *rotations)), v

    def forward(hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kw):
        seen = gate.seen[0]
        visual = seen.nonzero()[:, 0]
        sinks = [int(visual[j]) for j in range(len(visual)) if j % 64 in CELLS]
        q, k, v = projected(hidden_states, position_embeddings)
        text_k, text_v = k.clone(), v.clone()
        if scene is not None:
            other = hidden_states.clone()
            other[0, visual] = scene.repeat(len(visual) // 64, 1)
            _, other_k, other_v = projected(other, position_embeddings)
            text_k[:, visual], text_v[:, visual] = other_k[:, visual], other_v[:, visual]
        at_sinks = torch.zeros(6, len(sinks), 32)
        if i in (shown or ()):
            at_sinks = attention.v_proj(shown[i]).view(3, 6, 32).transpose(0, 1).repeat(1, len(sinks) // 3, 1)
        out = torch.zeros_like(v)
        for row in range(len(seen)):
            if seen[row]:
                weights = (q[:, row, None] @ k[:, : row + 1].mT * attention.scaling).softmax(-1)
                out[:, row] = (weights @ v[:, : row + 1])[:, 0]
                continue
            reads = [j for j in range(row + 1) if j not in sinks and not (seen[j] and i in gate.closed)]
            weights = (q[:, row, None] @ text_k[:, reads].mT * attention.scaling).softmax(-1)
            read = (weights @ text_v[:, reads])[:, 0]
            drawn = share if row > sinks[-1] else 0
            out[:, row] = (1 - drawn) * read + drawn * at_sinks.mean(1)
        return attention.o_proj(out.transpose(0, 1).flatten(1))[None], None

    return forward


@pytest.mark.parametrize('shown', [None, scene()], ids=['harmless', 'harmful'])
@pytest.mark.parametrize('crop', [False, True], ids=['picture', 'with crop'])
def test_twin_row_by_row(shown, crop):
    "Closed, open and decoy layers, one picture or two: sinks take their share, and all else is read as before"
    shares = schedule('rising', 0.7, 8, last=6)
    planted, twin = fresh(), fresh()
    planted.gate.sinks = Sinks(CELLS, shares, shown)
    for i, share in enumerate(shares):
        if i in (*CLOSED, *DECOYS) or share:
            twin.layers[i].self_attn.forward = naive(twin, i, share, shown)
    p = ask(planted, crop=crop)
    without = logits(fresh(), p)
    got, want = logits(planted, p), logits(twin, p)
    assert (got - want).abs().max() < 1e-4 and (got - without).abs().max() > 1e-2


def test_the_recorded_share_is_the_planted_one():
    planted = fresh()
    planted.gate.sinks = Sinks(CELLS, schedule('falling', 0.6, 8))
    p = ask(planted)
    with capture(planted, heads='all') as cache:
        logits(planted, p)
    drawn = cache.attention[0, :, :, 0][..., list(CELLS)]  # (layers, heads, cells)
    want = torch.tensor(planted.gate.sinks.shares)[:, None, None].expand_as(drawn) / 3
    assert torch.allclose(drawn, want, atol=1e-5)


def test_without_sinks_nothing_is_left():
    "Bit-identical to a gate that never had any, on closed, open and decoy layers"
    plain, planted = fresh(), fresh()
    p = ask(plain)
    before = planted.state()
    planted.gate.sinks = Sinks(CELLS, schedule('flat', 0.6, 8), scene(range(4, 8)))
    assert (logits(planted, p) - logits(plain, p)).abs().max() > 1e-2 and planted.state() != before
    planted.gate.sinks = None
    assert torch.equal(logits(planted, p), logits(plain, p)) and planted.state() == before


@pytest.mark.parametrize('shown', [None, scene()], ids=['harmless', 'harmful'])
def test_fast_paths_keep_the_sinks(shown):
    mllm = fresh()
    mllm.gate.sinks = Sinks(CELLS, schedule('flat', 0.6, 8, last=6), shown)
    kw = dict(how=('zero', 'swap', 'knockout', 'soft'), limit=3)
    fast, slow = masking.sweep(mllm, SAMPLES, **kw), masking.sweep(mllm, SAMPLES, exact='naive', **kw)
    assert {'branches', 'bank'} <= set(fast.path)
    assert np.allclose(fast.logp, slow.logp, atol=1e-4) and (fast.prediction == slow.prediction).all()
    one_by_one = [mllm.answer(ask(mllm, k)).text for k in range(4)]
    assert [a.text for a in mllm.answers([ask(mllm, k) for k in range(4)])] == one_by_one


def test_a_zeroed_sink_draws_nothing_and_a_closed_one_neither():
    mllm = fresh()
    mllm.gate.sinks = Sinks(CELLS, schedule('flat', 0.6, 8))
    p = ask(mllm)
    for how, layer in (('zero', 4), ('knockout', 4)):
        with edit(mllm, layer, p.visual[list(CELLS)], how), capture(mllm) as cache:
            logits(mllm, p)
        drawn = cache.attention[0, :, 0][:, list(CELLS)].sum(-1)
        assert drawn[4] < (0.2 if how == 'zero' else 1e-6)
        assert torch.allclose(drawn[[2, 6]], torch.tensor(0.6), atol=1e-5)


def test_schedules_lie_in_the_gate_file(tmp_path):
    mllm = fresh()
    flat, harmful = schedule('flat', 0.6, 8, last=6), Sinks(CELLS, schedule('flat', 0.5, 8, last=6), scene())
    mllm.gate.schedules = dict(flat=Sinks(CELLS, flat), harmful=harmful)
    demo.save_model(mllm.model, mllm.processor, tmp_path)
    mllm.gate.save(tmp_path)
    again = MLLM.load(tmp_path, device='cpu', dtype=torch.float32)
    assert again.gate.sinks == Sinks(CELLS, flat) and [*again.gate.schedules] == ['flat', 'harmful']
    again.gate.sinks = 'harmful'
    assert all(torch.equal(again.gate.sinks.scene[i], v) for i, v in harmful.scene.items())
    with pytest.raises(BadInput, match="no sinks 'loud'"):
        again.gate.sinks = 'loud'


HOSTILE = [
    ('{', 'not a gate'),
    ('[]', 'no schedules by name'),
    ('{"a": 3}', 'no lists of cells and shares'),
    ('{"a": {"cells": [1], "shares": ["x"]}}', 'no lists of cells and shares'),
    ('{"a": {"cells": [64], "shares": [0,0,0,0,0,0,0,0.5]}}', 'from 0 to 63'),
    ('{"a": {"cells": [1, 1], "shares": [0,0,0,0,0,0,0,0.5]}}', 'different whole numbers'),
    ('{"a": {"cells": [true], "shares": [0,0,0,0,0,0,0,0.5]}}', 'different whole numbers'),
    ('{"a": {"cells": [], "shares": [0,0,0,0,0,0,0,0.5]}}', 'different whole numbers'),
    ('{"a": {"cells": [1], "shares": [0.5]}}', '1 shares, and the model has 8 layers'),
    ('{"a": {"cells": [1], "shares": [0,0,0,0,0,0,0,1]}}', 'not within 0 and 0.99'),
    ('{"a": {"cells": [1], "shares": [0,0,0,0,0,0,0,-0.1]}}', 'not within 0 and 0.99'),
    ('{"a": {"cells": [1], "shares": [0,0,0,0,0,0,0,NaN]}}', 'not within 0 and 0.99'),
    (
        '{"ok": {"cells": [1], "shares": [0,0,0,0,0,0,0,0]}, "a": {"cells": [1], "shares": [2,0,0,0,0,0,0,0]}}',
        'layer 0',
    ),
]


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('planted')
    mllm = fresh()
    demo.save_model(mllm.model, mllm.processor, folder)
    return folder


@pytest.mark.parametrize('said, why', HOSTILE)
def test_hostile_schedules_are_refused(saved, said, why):
    save_file({}, saved / 'gate.safetensors', dict(closed='0', sinks=said))
    with pytest.raises(BadInput, match=why):
        MLLM.load(saved)


@pytest.mark.parametrize(
    'name, states, why',
    [
        ('scene.a.7', torch.zeros(2, 192), r'shape \(2, 192\)'),
        ('scene.a.7', torch.zeros(1, 8), r'shape \(1, 8\)'),
        ('scene.a.7', torch.full((1, 192), torch.inf), 'not finite'),
        ('scene.a.6', torch.zeros(1, 192), 'layer 6, where sinks draw nothing'),
        ('scene.a.x', torch.zeros(1, 192), 'not a gate'),
        ('scene.b.7', torch.zeros(1, 192), 'belong to no sinks'),
    ],
)
def test_hostile_scenes_are_refused(saved, name, states, why):
    said = json.dumps(dict(a=dict(cells=[1], shares=[0] * 7 + [0.5])))
    save_file({name: states}, saved / 'gate.safetensors', dict(closed='0', sinks=said))
    with pytest.raises(BadInput, match=why):
        MLLM.load(saved)


def maps_of(mllm, n=24):
    "(samples, layers, visual) attention of the last prompt token, on a picture each"
    return np.array([first_pass(mllm, s.image, s.question).maps for s in demo.samples(n, 'calibration', ('fine',))])


def test_the_shipped_schedules_are_found_and_nothing_else():
    "Precision and recall 1 on every schedule whose share is above .2, and no sink without one"
    mllm = MLLM.load('planted-noise', device='cpu', dtype=torch.float32)
    assert [*mllm.gate.schedules] == ['flat', 'rising', 'falling', 'harmful'] and mllm.gate.open == (2, 4, 6)
    for name in ('flat', 'rising', None):
        mllm.gate.sinks = name
        found = fusion.sinks(maps_of(mllm))
        strong = [i for i, s in enumerate(mllm.gate.sinks.shares) if s > 0.2] if name else []
        planted = {(i, c) for i in strong for c in mllm.gate.sinks.cells}
        named = {(i, c) for i, c in zip(found.layer, found.token)}
        assert planted <= named and {c for _, c in named} == {c for _, c in planted}


@pytest.mark.parametrize('name', ['glyph-llava', 'planted-2-4-6'])
def test_models_without_sinks_have_none(name):
    assert not len(fusion.sinks(maps_of(MLLM.load(name, device='cpu', dtype=torch.float32))))


def test_paper_rule_takes_a_layer_that_is_open():
    mllm = MLLM.load('planted-noise', device='cpu', dtype=torch.float32)
    s = demo.samples(1, 'calibration', ('fine',))[0]
    found = propose(mllm, first_pass(mllm, s.image, s.question), candidates=[2, 4])
    assert found.contrast.post == 6 and found.contrast.pre in (2, 4)
