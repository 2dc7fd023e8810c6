"Every family: tiny models of real architectures against references written by hand"

import math
import numpy as np, pytest, torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from conftest import replaced, noise_image
from twins import FAMILIES, family
from fusion_notebooks import contrast, hooks, engine, masking
from fusion_notebooks.mllm import MLLM, PlainProcessor

PREFIX = {'paligemma'}  # rows of the prompt see each other
ASK, OTHER = 'What color is the circle?', 'Which digit is on the red object at the top left?'
PICTURE, SMALL = noise_image(0, (120, 80)), noise_image(1, (64, 64))


@pytest.fixture(params=FAMILIES)
def mllm(request):
    return family(request.param)


@pytest.fixture(params=FAMILIES)
def double(request):
    return family(request.param, torch.float64)


def logits(mllm, p, ids=()):
    with torch.inference_mode():
        return mllm.model(**mllm.copies(p, 1, list(ids)), use_cache=False).logits[0]


NAIVE = {}  # attention module → function of (logits, first row) that edits them


def naive_attention(module, query, key, value, mask, scaling=None, **kw):
    g = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(g, 1), value.repeat_interleave(g, 1)
    s = torch.einsum('bhqd,bhkd->bhqk', query, key) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if kw.get('softcap'):
        s = kw['softcap'] * torch.tanh(s / kw['softcap'])
    if mask is not None:
        s = s + mask[..., : key.shape[2]]
    silent = NAIVE[module](s) if module in NAIVE else None
    a = s.softmax(-1)
    if silent is not None:
        a[:, :, silent] = 0
    module.seen = a
    return (a @ value).transpose(1, 2).contiguous(), a


AttentionInterface.register('naive', naive_attention)
AttentionMaskInterface.register('naive', eager_mask)


class naive:
    "The model with an attention written out by hand"

    def __init__(self, mllm):
        self.text = mllm.model.config.get_text_config()

    def __enter__(self):
        self.before = self.text._attn_implementation
        self.text._attn_implementation_internal = 'naive'

    def __exit__(self, *_):
        self.text._attn_implementation_internal = self.before
        NAIVE.clear()


def attention_of(mllm, i):
    return next(m for n, m in mllm.layers[i].named_modules() if n in ('self_attn', 'cross_attn'))


# (h, w, first box, last box) of the picture's map, worked out by hand from each processor's rule; the picture is 120 × 80
WHERE = dict(
    llava=(4, 4, (20, 0, 40, 20), (80, 60, 100, 80)),
    vipllava=(4, 4, (20, 0, 40, 20), (80, 60, 100, 80)),
    llava_next=(4, 4, (0, 0, 30, 20), (90, 60, 120, 80)),
    llava_onevision=(4, 4, (0, 0, 30, 20), (90, 60, 120, 80)),
    instructblip=(4, 4, (0, 0, 30, 20), (90, 60, 120, 80)),
    gemma3=(4, 4, (0, 0, 30, 20), (90, 60, 120, 80)),
    paligemma=(4, 4, (0, 0, 30, 20), (90, 60, 120, 80)),
    internvl=(2, 2, (0, 0, 60, 40), (60, 40, 120, 80)),
    idefics3=(2, 2, (0, 0, 60, 40), (60, 40, 120, 80)),
    smolvlm=(2, 2, (0, 0, 60, 40), (60, 40, 120, 80)),
    mllama=(6, 8, (0, 0, 15, 15), (105, 75, 120, 80)),
    qwen2_vl=(4, 6, (0, 0, 20, 20), (100, 60, 120, 80)),
    qwen2_5_vl=(4, 6, (0, 0, 20, 20), (100, 60, 120, 80)),
    qwen3_vl=(4, 6, (0, 0, 20, 20), (100, 60, 120, 80)),
)


def test_boxes(mllm):
    g = mllm.prompt(PICTURE, ASK).grids[0]
    h, w, first, last = WHERE[mllm.name]
    assert (g.h, g.w) == (h, w) and g.size == (120, 80)
    assert np.abs(g.boxes[0] - first).max() < 0.3 and np.abs(g.boxes[-1] - last).max() < 0.3
    two = mllm.prompt([PICTURE, SMALL], ASK)
    assert (
        len(two.grids) == 2 and two.grids[1].size == (64, 64) and not set(two.grids[0].index) & set(two.grids[1].index)
    )
    assert two.path == ('appended' if mllm.name == 'instructblip' else '')


def test_geometry_test_can_fail(mllm):
    "Boxes in another order are noticed"
    if mllm.takes_one:
        return
    from fusion_notebooks.mllm.places import _sees_there

    p = mllm.prompt(PICTURE, ASK)
    g = p.grids[0]
    wrong = type(g)(g.index, g.h, g.w, g.boxes[::-1].copy(), g.size, g.kept, g.image)
    assert _sees_there(mllm, p, [g]) and not _sees_there(mllm, p, [wrong])


def test_image_matters(mllm):
    a, b = (logits(mllm, mllm.prompt(im, ASK))[-1] for im in (PICTURE, noise_image(5, (120, 80))))
    assert (a - b).abs().max() > 1e-2
    p = mllm.prompt(PICTURE, ASK)
    for how in ('zero', 'mean', 'swap', 'knockout', 'soft'):
        states = {
            'mean': torch.zeros(mllm.n_layers, p_width(mllm)),
            'swap': torch.randn(mllm.n_layers, len(p.visual), p_width(mllm)),
        }.get(how)
        some = p.visual[::2] if how == 'soft' else p.visual  # all keys of a cross-attention weakened alike is no change
        if how == 'swap':
            states = states[:, : len(some)]
        with hooks.edit(mllm, mllm.cross[:1] or 0, some, how, states=states):
            assert (logits(mllm, p)[-1] - a).abs().max() > 1e-3, how
    assert torch.equal(logits(mllm, p)[-1], a)


def test_kept_features_say_what_the_pixels_say(mllm):
    "One copy takes what the tower made of the picture; asked again, and after another picture, it is still that picture's"
    prompts = [mllm.prompt(noise_image(k, (120, 80)), ASK) for k in (0, 1)]
    want = []
    for p in prompts:
        with torch.inference_mode():
            want.append(mllm.model(**p.inputs, use_cache=False).logits[0])
    assert (want[0][-1] - want[1][-1]).abs().max() > 1e-4
    for k in (0, 1, 0):
        assert (logits(mllm, prompts[k]) - want[k]).abs().max() < 1e-5


def test_tokens_are_counted_by_shape(mllm):
    "A kept count is what the tower would give, for every size"
    if not isinstance(mllm.processor, PlainProcessor):
        return
    for size in ((120, 80), (64, 64), (120, 80)):
        kept = mllm.prompt(noise_image(2, size), ASK).inputs['input_ids']
        mllm.processor._counts = {}
        assert torch.equal(kept, mllm.prompt(noise_image(2, size), ASK).inputs['input_ids']) and mllm.processor._counts


def p_width(mllm):
    return mllm.model.get_input_embeddings().weight.shape[1]


def test_capture_equals_written_out_attention(double):
    "In float64: what remains in float32 is rounding, up to 2e-5 where logits are large"
    mllm = double
    for images in (PICTURE, [PICTURE, SMALL]):
        p = mllm.prompt(images, ASK)
        rows = [p.length - 1, p.length - 3]
        plain = logits(mllm, p)
        with hooks.capture(mllm, rows=rows, heads='all', hidden=True) as cache:
            assert torch.equal(logits(mllm, p), plain)
        with hooks.capture(mllm, hidden=True) as last:
            logits(mllm, p)  # has ways of its own
        assert (
            (last.attention[:, :, 0] - cache.attention[:, :, :, 0].mean(2)).abs().nan_to_num().max() < 1e-6
            and last.attention.isnan().equal(cache.attention[:, :, 0, :1].isnan())
            and torch.equal(last.hidden[:, :, 0], cache.hidden[:, :, 0])
        )
        with naive(mllm):
            logits(mllm, p)
        for i in range(mllm.n_layers):
            got = cache.attention[0, i]
            if mllm.cross and i not in mllm.cross:
                assert got.isnan().all()
                continue
            want = attention_of(mllm, i).seen[0][:, rows]
            assert (got - (want if mllm.cross else want[..., p.visual])).abs().max() < 1e-6


def test_capture_in_padded_batches(mllm):
    ps = [mllm.prompt(PICTURE, ASK), mllm.prompt(PICTURE if mllm.cross else SMALL, OTHER)]
    with torch.inference_mode():
        with hooks.capture(mllm) as both:
            mllm.model(**mllm.stack(ps).inputs, use_cache=False)
        for k, p in enumerate(ps):
            with hooks.capture(mllm) as one:
                mllm.model(**p.inputs, use_cache=False)
            n, layers = len(p.visual), list(mllm.cross) or slice(None)
            assert (both.attention[k, layers, ..., :n] - one.attention[0, layers]).abs().max() < 1e-5


@pytest.mark.parametrize('how', ['zero', 'mean', 'swap'])
def test_state_edits(double, how):
    "Against a wrapper of the layer's forward that writes row after row"
    mllm, i = double, 1
    p = mllm.prompt(PICTURE, ASK)
    states = {
        'mean': torch.randn(mllm.n_layers, p_width(mllm)),
        'swap': torch.randn(mllm.n_layers, len(p.visual), p_width(mllm)),
    }.get(how)
    value = lambda k, j: 0.0 if how == 'zero' else states[j] if how == 'mean' else states[j, k]

    def wrapped(forward, j):
        def f(hidden_states, *args, **kw):
            if mllm.cross:
                keys = kw['cross_attention_states'].clone()
                flat = keys.view(-1, keys.shape[-1])
                for k in p.visual.tolist():
                    flat[k] = value(k, j)
                return forward(hidden_states, *args, **kw | dict(cross_attention_states=keys))
            h = hidden_states.clone()
            for k, at in enumerate(p.visual.tolist()):
                h[:, at] = value(k, j)
            return forward(h, *args, **kw)

        return f

    layers = [j for j in mllm.cross if j >= i] if mllm.cross else [i]
    try:
        for j in layers:
            mllm.layers[j].forward = wrapped(mllm.layers[j].forward, j)
        want = logits(mllm, p)
    finally:
        for j in layers:
            del mllm.layers[j].forward
    with hooks.edit(mllm, i, p.visual, how, states=states):
        got = logits(mllm, p)
    assert (got - want).abs().max() < 1e-9 and (got - logits(mllm, p)).abs().max() > 1e-3


@pytest.mark.parametrize('scope', ['single', 'from', 'window'])
@pytest.mark.parametrize('how', ['knockout', 'soft'])
def test_attention_edits(double, how, scope):
    "Against logits of a written-out attention, changed pair by pair"
    mllm = double
    p = mllm.prompt(PICTURE, ASK)
    layers = masking.scoped(mllm, 1, scope)
    start, some = int(p.visual.max()) + 1, p.visual if scope == 'single' and how == 'knockout' else p.visual[::2]

    def change(s):
        for k in some.tolist():
            if mllm.cross:
                s[..., k] = torch.finfo(s.dtype).min if how == 'knockout' else s[..., k] + math.log(0.05)
            else:
                s[..., start:, k] = -torch.inf if how == 'knockout' else s[..., start:, k] + math.log(0.05)
        if mllm.cross and how == 'knockout' and len(some) == s.shape[-1]:
            return slice(None)

    if mllm.cross:
        start = 0
    with naive(mllm):
        NAIVE.update({attention_of(mllm, j): change for j in layers if not mllm.cross or j in mllm.cross})
        want = logits(mllm, p)
    with hooks.edit(mllm, layers, some, how, text_from=None if mllm.cross else start):
        got = logits(mllm, p)
    assert (got - want).abs().max() < 1e-9 and (got[-1] - logits(mllm, p)[-1]).abs().max() > 1e-4


@pytest.mark.parametrize('how', ['none', 'zero', 'knockout', 'soft'])
def test_cached_generation_equals_uncached(mllm, how):
    p, ids = mllm.prompt(PICTURE, ASK), []
    with hooks.edit(mllm, [1, 2], p.visual[:0] if how == 'none' else p.visual, 'zero' if how == 'none' else how):
        got = mllm.generate(p, max_new_tokens=4)[0]
        lp = 0.0
        for t in got.ids:
            step = logits(mllm, p, ids)[-1].float().log_softmax(-1)
            step[mllm.image_token_id] = -torch.inf
            assert int(step.argmax()) == t
            lp, ids = lp + float(step[t]), ids + [t]
    assert abs(lp - got.logp) < 1e-4


def test_answers_in_batches_equal_one_at_a_time(mllm):
    ps = [mllm.prompt(PICTURE, ASK), mllm.prompt(SMALL, OTHER), mllm.prompt([PICTURE, SMALL], ASK)]
    for a, b in zip(mllm.answers(ps), map(mllm.answer, ps)):
        assert a.ids == b.ids and abs(a.logp - b.logp) < 1e-4
    assert all(abs(a.logp - mllm.answer(ps[2]).logp) < 1e-4 for a in mllm.generate(ps[2], 2))


def test_causality(mllm):
    "Rows never see tokens that come after them; in a prefix language model rows of the prompt do, and the test notices"
    p = mllm.prompt(PICTURE, ASK)
    a, b = logits(mllm, p, [20, 30]), logits(mllm, p, [20, 31])
    assert (a[:-1] - b[:-1]).abs().max() < 1e-5 and (a[-1] - b[-1]).abs().max() > 1e-4
    q = mllm.prompt(PICTURE, ASK)
    q.inputs['input_ids'] = q.inputs['input_ids'].clone()
    q.inputs['input_ids'][0, -2] = 50
    seen = (logits(mllm, q)[:-2] - logits(mllm, p)[:-2]).abs().max()
    assert seen > 1e-4 if mllm.name in PREFIX else seen < 1e-5


def test_lens_and_early_exit(mllm):
    p = mllm.prompt(PICTURE, ASK)
    plain = logits(mllm, p)[-1]
    with hooks.capture(mllm, hidden=True) as cache:
        logits(mllm, p)
    seen = hooks.lens(mllm, cache.hidden[0, :, 0])
    assert (seen[-1] - plain).abs().max() < 2e-5
    for i in (1, mllm.n_layers - 1):
        with hooks.early_exit(mllm, i):
            assert (logits(mllm, p)[-1] - seen[i + 1]).abs().max() < 2e-5


def test_nothing_stays_behind(mllm):
    p = mllm.prompt(PICTURE, ASK)
    before, hooked = (
        logits(mllm, p),
        lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in mllm.model.modules()),
    )
    count = hooked()
    with pytest.raises(KeyError):
        with hooks.capture(mllm), hooks.edit(mllm, None, p.visual, 'knockout'):
            logits(mllm, p)
            raise KeyError
    p.views
    assert (
        hooked() == count
        and torch.equal(logits(mllm, p), before)
        and mllm.model.config.get_text_config()._attn_implementation != hooks.NAME
    )
    with pytest.raises(ValueError, match='no layer'):
        hooks.check_layers(mllm, mllm.n_layers)


@pytest.mark.parametrize('how', ['mask', 'crop'])
def test_refine(mllm, how):
    "Mask equals the two passes by hand; crop equals a prompt with the crop beside the picture"
    pre, post, review = (1, 2, 4) if mllm.cross else (0, 2, 3)
    r = contrast.refine(
        mllm, PICTURE, ASK, how=how, base=30, post=post, review=review if how == 'mask' else None, candidates=[pre]
    )
    p = mllm.prompt(PICTURE, ASK)
    with hooks.capture(mllm) as cache:
        logits(mllm, p)
    A = cache.attention[0, :, 0].double()
    want = (A[post] / A[post].sum() - A[pre] / A[pre].sum()).numpy()
    assert np.abs(r.contrast.map - want).max() < 1e-5 and (r.contrast.pre, r.contrast.post) == (pre, post)
    if how == 'crop':
        answer = mllm.answer([PICTURE, PICTURE.crop(r.box)], ASK)
        assert r.path == 'appended' if mllm.takes_one else r.path in ('reused', 'two passes')
    else:
        low = p.visual[np.argsort(want, kind='stable')[: round(0.2 * len(want))]]
        assert sorted(low.tolist()) == p.visual[r.tokens].tolist()
        with hooks.edit(mllm, review, low, 'zero'):
            answer = mllm.answer(p)
    assert r.base.ids == mllm.answer(p).ids and r.answer.ids == answer.ids and abs(r.answer.logp - answer.logp) < 1e-4


def test_many_crops_and_masks_in_one_batch(mllm, monkeypatch):
    "Each crop is answered as beside the picture alone, whatever its size; each mask as by an edit of its own; and so where memory holds one at a time"
    seen, wide, high = (
        contrast.first_pass(mllm, PICTURE, ASK),
        PICTURE.crop((0, 0, 60, 30)),
        PICTURE.crop((10, 4, 40, 64)),
    )
    got = contrast.answer_with_crops(mllm, seen.trace, [wide, high, wide], 6)
    for crop, (a, path, n) in zip((wide, high), got):
        p = mllm.prompt([PICTURE, crop], ASK)
        b = mllm.generate(p, max_new_tokens=6)[0]
        assert (
            a.ids == b.ids
            and abs(a.logp - b.logp) < 1e-4
            and n == p.length - (int(seen.prompt.visual.max()) + 1 if path == 'reused' else 0)
        )
    assert got[2] == got[0] and (got[0][0].ids != got[1][0].ids or abs(got[0][0].logp - got[1][0].logp) > 1e-6)
    review, some, plain = (
        4 if mllm.cross else 3,
        [np.arange(0, len(seen.prompt.visual), 2), np.arange(len(seen.prompt.visual) // 2)],
        mllm.generate(seen.prompt, max_new_tokens=6)[0],
    )
    masked = contrast.answer_masked(mllm, seen.prompt, some, review, 6)
    for tokens, a in zip(some, masked):
        with hooks.edit(mllm, review, seen.prompt.visual[tokens], 'zero'):
            b = mllm.generate(seen.prompt, max_new_tokens=6)[0]
        assert (
            a.ids == b.ids and abs(a.logp - b.logp) < 1e-4 and (a.ids != plain.ids or abs(a.logp - plain.logp) > 1e-5)
        )
    for module in (contrast, engine):
        replaced(monkeypatch, module, 'fitting', lambda *a: 1)
    again = [
        a for a, *_ in contrast.answer_with_crops(mllm, seen.trace, [wide, high, wide], 6)
    ] + contrast.answer_masked(mllm, seen.prompt, some, review, 6)
    for a, b in zip([a for a, *_ in got] + masked, again):
        assert a.ids == b.ids and abs(a.logp - b.logp) < 1e-4


def test_load_from_a_folder(mllm, tmp_path):
    "As saved by transformers; where the family's processor cannot be built here, the plain one stands in"
    processor = mllm.processor
    mllm.model.save_pretrained(tmp_path)
    if not isinstance(processor, PlainProcessor):
        processor.save_pretrained(tmp_path)
    else:
        processor.image_processor.save_pretrained(tmp_path)
        processor.tokenizer.save_pretrained(tmp_path)
        (tmp_path / 'chat_template.jinja').write_text(processor.chat_template)
    loaded = MLLM.load(str(tmp_path))
    for images in (PICTURE, [PICTURE, SMALL]):
        a, b = loaded.answer(images, ASK), mllm.answer(images, ASK)
        assert a.ids == b.ids and abs(a.logp - b.logp) < 1e-4


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    "Boxes stay exact, maps and edits stay near float32's"
    for name in ('llava_next', 'qwen2_5_vl'):
        full, half = family(name), family(name, dtype)
        p, q = full.prompt(PICTURE, ASK), half.prompt(PICTURE, ASK)
        assert all(np.array_equal(a.boxes, b.boxes) for a, b in zip(p.views, q.views))
        with hooks.capture(full) as a:
            logits(full, p)
        with hooks.capture(half) as b:
            logits(half, q)
        assert (a.attention - b.attention).abs().max() < 0.1 and b.attention.dtype == torch.float32
        for how in ('zero', 'knockout', 'soft'):
            plain = logits(half, q)
            with hooks.edit(half, 1, q.visual, how):
                edited = logits(half, q)
            assert (
                torch.isfinite(edited).all()
                and (edited[-1] - plain[-1]).abs().max() > 1e-2
                and torch.equal(logits(half, q), plain)
            )
