"Baselines against references written out by hand, in several families; costs and traces"

import math, sys
import numpy as np, pytest, torch
from PIL import Image
from scipy import ndimage
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from fusion_notebooks import baselines
from fusion_notebooks.baselines import FLOWS, GENERAL, METHODS, BaselineAnswer, answer, flow, question_rows
from fusion_notebooks.contrast import first_pass, view_side, window_box
from fusion_notebooks.hooks import early_exit, edit
from fusion_notebooks.engine import capabilities
from fusion_notebooks.masking import scoped
from fusion_notebooks.mllm import Answer, Sample, reader
from conftest import replaced, noise_image
from twins import family

ASK = 'What color is the circle?'
NAMES = ('tiny', 'llava_next', 'qwen2_5_vl', 'gemma3')
CONTRASTS = ('cd', 'vcd', 'dola')
N = 4  # tokens: the prompt's and a few decoded ones


@pytest.fixture(params=NAMES)
def any_mllm(request):
    return request.getfixturevalue('tiny') if request.param == 'tiny' else family(request.param)


def close(a, b):
    return a.ids == b.ids and abs(a.logp - b.logp) < 1e-3 * max(
        1, abs(b.logp)
    )  # the second picture is put behind the keys and values of the first


def picture(mllm):
    return noise_image(0, (96, 48) if mllm.name == 'llava_next' else (96, 96) if mllm.name != 'tiny' else (384, 384))


class eager:
    "The text decoder writes its attention out"

    def __init__(self, mllm):
        self.text = mllm.model.config.get_text_config()

    def __enter__(self):
        self.was, self.text._attn_implementation = self.text._attn_implementation, 'eager'

    def __exit__(self, *_):
        self.text._attn_implementation = self.was


def attentions(mllm, inputs):
    "Per layer (batch, heads, rows, keys)"
    with eager(mllm):
        return mllm.model(**inputs, use_cache=False, output_attentions=True).attentions


def after(mllm, p, ids):
    "Logits of the next token, without a cache; the image token is never said"
    with torch.no_grad():
        l = mllm.model(**mllm.copies(p, 1, list(ids)), use_cache=False).logits[0, -1].float().clone()
    l[mllm.image_token_id] = -torch.inf
    return l.double().numpy()


def log_softmax(l):
    m = l.max()
    return l - m - np.log(np.exp(l - m).sum())


def greedy(mllm, p, scores, n):
    "Token by token, each from forwards of its own"
    ids = []
    while len(ids) < n and 1 not in ids:
        ids.append(int(np.argmax(scores(ids))))
    return ids


def plausible(s, expert, beta=0.1):
    return np.where(np.exp(expert) >= beta * np.exp(expert.max()), s, -np.inf)


def test_relative_attention(any_mllm):
    mllm, im = any_mllm, picture(any_mllm)
    r = answer(mllm, im, ASK, 'vicrop-rel', max_new_tokens=3)
    p, g = mllm.prompt(im, ASK), mllm.prompt(im, GENERAL)
    l = dict(tiny=4).get(mllm.name, 2)  # 14/32 of 8 and of 4 layers
    with torch.no_grad():
        a, b = (attentions(mllm, q.inputs)[l][0, :, -1, q.visual].mean(0).double().numpy() for q in (p, g))
    grid = p.grids[0]
    want = np.divide(a, b, out=np.zeros_like(a), where=b > 1e-30)[grid.index]
    assert np.allclose(r.map, want, rtol=1e-4) and r.box == window_box(want, grid, view_side(mllm))
    assert close(r.answer, mllm.answer([im, im.crop(r.box)], ASK, 3))


def test_gradient_attention(any_mllm):
    mllm, im = any_mllm, picture(any_mllm)
    p, l = mllm.prompt(im, ASK), dict(tiny=4).get(any_mllm.name, 2)
    with eager(mllm), torch.enable_grad():
        out = mllm.model(**p.inputs, use_cache=False, output_attentions=True)
        (g,) = torch.autograd.grad(out.logits[0, -1].log_softmax(-1).max(), out.attentions[l])
    want = (out.attentions[l] * g.relu())[0, :, -1, p.visual].mean(0).detach().double().numpy()
    r = answer(mllm, im, ASK, 'vicrop-grad', max_new_tokens=3)
    assert np.abs(r.map - want[p.grids[0].index]).max() < 1e-4 * want.max() and want.max() > 0
    assert r.cost.backwards == 1
    with eager(mllm):
        again = answer(mllm, im, ASK, 'vicrop-grad', max_new_tokens=3)
    assert np.abs(again.map - r.map).max() < 1e-4 * r.map.max() and again.cost == r.cost


def test_pixel_gradient_by_hand(tiny):
    "A square picture in one view of 96 pixels: cells are blocks of 12 × 12"
    im = noise_image(3)

    def slope(q):
        p = tiny.prompt(im, q)
        x = p.inputs['pixel_values'].clone().requires_grad_()
        tiny.model(**p.inputs | dict(pixel_values=x)).logits[0, -1].log_softmax(-1).max().backward(inputs=[x])
        return x.grad[0].double().norm(dim=0).numpy()

    x = torch.tensor(np.asarray(im.resize((96, 96), Image.Resampling.BILINEAR)) / 255).permute(2, 0, 1)
    w = torch.exp(-(torch.tensor([-1.0, 0, 1], dtype=torch.float64) ** 2) / (2 * 0.8**2))
    kernel = torch.outer(w, w) / w.sum() ** 2
    blur = torch.nn.functional.conv2d(
        torch.nn.functional.pad(x[:, None], (1, 1, 1, 1), mode='reflect'), kernel[None, None]
    )[:, 0]
    high = ndimage.median_filter((x - blur).pow(2).sum(0).sqrt().numpy(), 7)
    want = (slope(ASK) / slope(GENERAL) * (high > np.median(high))).reshape(8, 12, 8, 12).mean((1, 3)).ravel()
    r = answer(tiny, im, ASK, 'vicrop-pure', max_new_tokens=3)
    assert np.allclose(r.map, want, rtol=1e-3, atol=1e-6 * want.max()) and r.cost.backwards == 2


def test_pixel_gradient_of_patches():
    "Qwen hands out patches of 3 × 2 × 4 × 4 values, four in a row for each token"
    mllm, im = family('qwen2_5_vl'), noise_image(3, (96, 96))
    p, g = mllm.prompt(im, ASK), mllm.prompt(im, GENERAL)

    def slope(q):
        x = q.inputs['pixel_values'].clone().requires_grad_()
        mllm.model(**q.inputs | dict(pixel_values=x)).logits[0, -1].log_softmax(-1).max().backward(inputs=[x])
        return x.grad.double().reshape(-1, 3, 2, 4, 4).norm(dim=1).numpy()

    ratio = (slope(p) / slope(g)).reshape(len(p.visual), 4 * 2 * 4 * 4)
    assert p.inputs['pixel_values'].shape == (4 * len(p.visual), 96)
    apart = baselines.pixel_crop._apart(mllm, p)
    kept = (
        baselines.pixel_crop._seen_as(mllm, p, baselines.pixel_crop._detail(im, view_side(mllm)), apart) > 0.5
    ).reshape(len(p.visual), -1)
    assert 0.2 < kept.mean() < 0.8
    r = answer(mllm, im, ASK, 'vicrop-pure', max_new_tokens=2)
    assert np.allclose(r.map, (ratio * kept).mean(1), rtol=1e-3)


def test_colours_are_told_apart(tiny, monkeypatch):
    "Patches with colours first, last, and one patch of padding"

    def pixels(order):
        return lambda mllm, p, images: np.concatenate(
            [
                np.stack(
                    [
                        np.moveaxis(
                            np.asarray(images[0], float).reshape(4, 4, 3)[k], -1, 0 if order == 'first' else -1
                        ).ravel()
                        for k in range(4)
                    ]
                ),
                np.full((1, 12), 9.0),
            ]
        )

    im = noise_image(0, (32, 32)).resize((4, 4))
    want = np.moveaxis(np.asarray(im, float).reshape(4, 4, 3), -1, 1)
    p = type('P', (), dict(images=[im]))
    for order in ('first', 'last'):
        replaced(monkeypatch, baselines, '_pixels', pixels(order))
        monkeypatch.setitem(tiny.__dict__, '_measured', {})
        assert np.array_equal(baselines.pixel_crop._apart(tiny, p)(baselines.pixel_crop._pixels(tiny, p, [im])), want)


def test_what_is_kept_by_size_is_that_of_the_size():
    mllm = family('llava_next')
    p = [mllm.prompt(noise_image(0, size), ASK) for size in ((96, 96), (120, 60), (96, 96))]
    for q in p:
        assert str(baselines.pixel_crop._places(mllm, q)) == str(baselines.pixel_crop._tiles(mllm, q))
        assert all(
            map(
                np.array_equal,
                baselines.pixel_crop._ends(mllm, q),
                [
                    baselines.pixel_crop._pixels(mllm, q, [Image.new('RGB', q.images[0].size, c)])
                    for c in ('black', 'white')
                ],
            )
        )
    assert str(baselines.pixel_crop._places(mllm, p[0])) != str(baselines.pixel_crop._places(mllm, p[1]))


@pytest.mark.parametrize('name', ['llava_next', 'qwen2_5_vl', 'instructblip', 'smolvlm'])
def test_pixels_land_in_their_cells(name):
    "Where the picture is brighter, so are the cells that the processor's pixels are gathered in"
    mllm = family(name)
    im = Image.new('RGB', (96, 96), 'black')
    im.paste('white', (48, 0, 96, 48))
    p = mllm.prompt(im, ASK)
    grid = p.grids[0]
    got = baselines.pixel_crop._on_grid(
        mllm, p, grid, baselines.pixel_crop._seen_as(mllm, p, im, baselines.pixel_crop._apart(mllm, p))
    ).reshape(grid.h, grid.w)
    centre = (grid.boxes[:, :2] + grid.boxes[:, 2:]).reshape(grid.h, grid.w, 2) / 2
    inside = (centre[..., 0] > 60) & (centre[..., 1] < 36), (centre[..., 0] < 36) | (centre[..., 1] > 60)
    assert inside[0].any() and got[inside[0]].min() > 0.6 > 0.4 > got[inside[1]].max()


def test_carve_by_hand(tiny):
    im = noise_image(1)
    r = answer(tiny, im, ASK, 'carve', layers=[3, 4], max_new_tokens=4)
    maps = []
    for q in (ASK, GENERAL):
        p, steps = tiny.prompt(im, q), []
        ids = tiny.answer(p, max_new_tokens=4).ids
        for t in range(len(ids)):  # one forward per step
            with torch.no_grad():
                a = attentions(tiny, tiny.copies(p, 1, ids[:t]))
            steps.append([a[l][0, :, -1, p.visual].mean(0).double().numpy() for l in (3, 4)])
        maps.append(steps)
    want = sum((t + 1) * q / (g + 1e-8) for t, (qs, gs) in enumerate(zip(*maps)) for q, g in zip(qs, gs))
    assert np.allclose(r.map, want, rtol=1e-4)
    over = np.asarray(
        Image.fromarray(want.reshape(8, 8).astype('float32')).resize((384, 384), Image.Resampling.BILINEAR), float
    )
    parts, n = ndimage.label(over >= np.sort(over.ravel())[int(0.8 * over.size)])
    order = sorted(range(1, n + 1), key=lambda k: -over[parts == k].sum())[:3]
    kept = np.isin(parts, order)
    ys, xs = kept.any(1).nonzero()[0], kept.any(0).nonzero()[0]
    box = (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)
    assert np.abs(np.subtract(r.box, box)).max() <= 1
    black = np.asarray(im) * kept[..., None].astype('uint8')
    if r.box == tuple(box):
        scale = max(384 / (box[2] - box[0]), 384 / (box[3] - box[1]))
        if scale**2 * (box[2] - box[0]) * (box[3] - box[1]) <= 4 * 384**2:
            crop = (
                Image.fromarray(black)
                .crop(r.box)
                .resize((int((box[2] - box[0]) * scale), int((box[3] - box[1]) * scale)), Image.Resampling.LANCZOS)
            )
            assert r.crop.size == crop.size and np.abs(np.asarray(crop, int) - np.asarray(r.crop, int)).mean() < 1
    assert close(r.answer, tiny.answer([im, r.crop], ASK, 4))


def test_contrastive_decoding_by_hand(any_mllm):
    mllm, im = any_mllm, picture(any_mllm)
    p, n = mllm.prompt(im, ASK), N

    def amateur(ids):
        with edit(mllm, None, p.visual, 'knockout'):
            return log_softmax(after(mllm, p, ids))

    def scores(ids):
        e = log_softmax(after(mllm, p, ids))
        return plausible(e - np.where(np.isinf(e), 0, amateur(ids)), e)

    r = answer(mllm, im, ASK, 'cd', max_new_tokens=n)
    ids = greedy(mllm, p, scores, n)
    assert r.answer.ids == ids
    assert abs(r.answer.logp - sum(log_softmax(after_plain(mllm, p, ids[:k]))[i] for k, i in enumerate(ids))) < 1e-3


def after_plain(mllm, p, ids):
    with torch.no_grad():
        return mllm.model(**mllm.copies(p, 1, list(ids)), use_cache=False).logits[0, -1].double().numpy()


@pytest.mark.parametrize(
    'name', ['tiny', 'llava_next', 'qwen2_5_vl', 'idefics3', 'smolvlm', 'instructblip', 'paligemma', 'mllama']
)
def test_the_amateur_sees_nothing(name, request, monkeypatch):
    "Another picture leaves the second branch as it is, and changes the first"
    mllm = request.getfixturevalue('tiny') if name == 'tiny' else family(name)
    seen = []

    def decode(mllm, inputs, rule, n):
        with torch.no_grad():
            seen.append(mllm.model(**inputs, use_cache=False).logits[:, -1].float())
        return Answer('', [1], 0.0)

    replaced(monkeypatch, baselines, '_decode', decode)
    for k in range(2):
        baselines.cd(mllm, noise_image(k, (96, 96)), ASK)
    (e, a), (f, b) = seen
    assert (a - b).abs().max() < 1e-4 * a.abs().max() and (e - f).abs().max() > 1e-3 * e.abs().max()


def test_visual_contrastive_decoding_by_hand(any_mllm):
    mllm, im = any_mllm, picture(any_mllm)
    p, noisy, n = mllm.prompt(im, ASK), mllm.prompt(im, ASK), N
    kept = 1.0
    for k in range(501):
        kept *= 1 - (1 / (1 + math.exp(6 - 12 * k / 999)) * (0.5e-2 - 1e-5) + 1e-5)
    x = p.inputs['pixel_values']
    noisy.inputs['pixel_values'] = kept**0.5 * x + (1 - kept) ** 0.5 * torch.randn(
        x.shape, generator=torch.Generator().manual_seed(7)
    )
    assert 0.5 < (noisy.inputs['pixel_values'] - x).std()

    def scores(ids):
        e, a = after(mllm, p, ids), after(mllm, noisy, ids)
        return plausible(2 * e - np.where(np.isinf(a), 0, a), log_softmax(e))

    assert answer(mllm, im, ASK, 'vcd', seed=7, max_new_tokens=n).answer.ids == greedy(mllm, p, scores, n)


@pytest.mark.parametrize('layers', ['high', [1, 2, 3]])
def test_dola_by_an_explicit_loop_over_early_exits(any_mllm, layers):
    mllm, im = any_mllm, picture(any_mllm)
    p, n = mllm.prompt(im, ASK), N
    inner = dict(tiny=[4, 6]).get(mllm.name, [2]) if layers == 'high' else layers

    def scores(ids):
        last = log_softmax(after_plain(mllm, p, ids))
        early = []
        for l in inner:
            with early_exit(mllm, l - 1):
                early.append(log_softmax(after_plain(mllm, p, ids)))

        def js(q):
            m = (np.exp(last) + np.exp(q)) / 2
            return (np.exp(last) * (last - np.log(m)) + np.exp(q) * (q - np.log(m))).sum() / 2

        s = last - max(early, key=js)
        s[mllm.image_token_id] = -np.inf
        return plausible(s, log_softmax(after(mllm, p, ids)))

    assert answer(mllm, im, ASK, 'dola', layers=layers, max_new_tokens=n).answer.ids == greedy(mllm, p, scores, n)


def test_divergence_by_hand():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.25, 0.5])
    m = (p + q) / 2
    want = 0.5 * sum(a * np.log(a / c) for a, c in zip(p, m) if a) + 0.5 * sum(
        a * np.log(a / c) for a, c in zip(q, m) if a
    )
    got = baselines.decoding._divergence(torch.tensor(p + 1e-30).log(), torch.tensor(q).log())
    assert abs(got.item() - want) < 1e-12


def over_trust(mllm, p, ids, scale=50.0):
    "The penalty of one answer so far, from the written-out attention of the last layer"
    with torch.no_grad():
        a = attentions(mllm, mllm.copies(p, 1, ids))[-1][0].amax(0).double().numpy()
    a = a / a.sum(-1, keepdims=True)
    if len(ids) <= 10:
        return -a[-1, p.visual.numpy()].sum()
    return max(1e-7 * np.prod([scale * a[i, j] for i in range(j, len(a))]) for j in range(p.length, len(a)))


@pytest.mark.parametrize('n', [1, 3, 10, 11, 16])
def test_over_trust_by_hand(any_mllm, n):
    mllm, p = any_mllm, any_mllm.prompt(picture(any_mllm), ASK)
    tails = torch.from_numpy(np.random.default_rng(n).integers(10, 30, (3, n)))
    want = [over_trust(mllm, p, t.tolist()) for t in tails]
    first = first_pass(mllm, p.images[0], ASK)
    shared = baselines.opera_search._over_trust(mllm, first, tails, 50.0)
    first.trace.prefix = None  # and every trial by itself
    assert (
        np.allclose(shared, want, rtol=1e-3)
        and np.allclose(baselines.opera_search._over_trust(mllm, first, tails, 50.0), want, rtol=1e-3)
        and np.ptp(want)
    )


@pytest.mark.parametrize('weight', [0.0, 1.0, 30.0])
def test_opera_by_hand(any_mllm, weight):
    "Two beams, two candidates, two tokens: all sixteen paths, kept by hand"
    mllm, im = any_mllm, picture(any_mllm)
    p, K = mllm.prompt(im, ASK), 2
    beams, done = [(0.0, [])], []
    for step in range(2):
        more = []
        for total, ids in beams:
            l = log_softmax(after(mllm, p, ids))
            top = np.argsort(-l)[:K].tolist()
            s = log_softmax(np.array([l[t] - weight * over_trust(mllm, p, ids + [t]) for t in top]))
            more += [(total + v, ids + [t]) for t, v in zip(top, s)]
        more.sort(key=lambda m: -m[0])
        done += [(t / len(ids), ids) for t, ids in more[:2] if ids[-1] == 1 or step == 1]
        beams = [m for m in more if m[1][-1] != 1][:2]
    r = answer(mllm, im, ASK, 'opera', beams=2, candidates=K, weight=weight, max_new_tokens=2)
    assert r.answer.ids == max(done)[1]
    assert (
        abs(
            r.answer.logp
            - sum(log_softmax(after_plain(mllm, p, r.answer.ids[:k]))[i] for k, i in enumerate(r.answer.ids))
        )
        < 1e-3
    )


def redistributed_by_hand(w, visual, text, start, rho, p, least, ratio, often):
    "Attention weights (heads, rows, keys) of one sample, row by row and head by head; rows from `start` on are text"
    heads, rows, keys = w.shape
    new, asked = w.clone(), [r for r in range(start, rows) if r < text]
    sinks = []
    for j in visual:
        bright = 0
        for r in asked:
            share = sum(w[h, r, j] for h in range(heads)) / sum(w[h, r, visual].sum() for h in range(heads))
            bright += bool(share > ratio / len(visual))
        if bright >= often * len(asked):
            sinks.append(j)
    others = [j for j in visual if j not in sinks]
    changed = 0
    for h in range(heads):
        for r in range(start, rows):
            total, left = w[h, r, visual].sum(), w[h, r, others].sum()
            if not sinks or total < least or left / total < rho:
                continue
            budget = (1 - p) * w[h, r, sinks].sum()
            for j in sinks:
                new[h, r, j] = p * w[h, r, j]
            for j in others:
                new[h, r, j] = w[h, r, j] + budget * w[h, r, j] / left
            changed += 1
    return new, changed


def raised_by_hand(query, key, mask, scaling, visual, start, alpha):
    "Attention weights (heads, rows, keys) of one sample; each row from `start` on was the last one once"
    heads, rows = query.shape[1:3]
    new = torch.zeros(heads, rows, key.shape[2])
    for h in range(heads):
        for r in range(rows):
            logits = scaling * key[0, h // (heads // key.shape[1])] @ query[0, h, r]
            if r >= start:
                for j in visual:
                    logits[j] += alpha * abs(logits[j])
            closed = mask[0, 0, r, : len(logits)] if mask is not None else 0
            new[h, r] = (logits + closed).softmax(-1)
    return new


class by_hand:
    "Eager attention whose weights (heads, rows, keys) are changed by `change(layer, module, query, key, mask, scaling, weights)`"

    def __init__(self, mllm, change):
        self.mllm, self.change = mllm, change
        self.at = {m: i for i, layer in enumerate(mllm.layers) for m in layer.modules()}

    def attention(self, module, query, key, value, attention_mask, scaling=None, **kw):
        eager_forward = sys.modules[type(module).__module__].eager_attention_forward
        out, weights = eager_forward(module, query, key, value, attention_mask, scaling=scaling, **kw)
        new = self.change(self.at[module], module, query, key, attention_mask, scaling, weights[0])
        if new is None:
            return out, weights
        value = value[0].repeat_interleave(len(new) // value.shape[1], 0)
        return (new @ value).transpose(0, 1)[None], weights

    def __enter__(self):
        AttentionInterface.register('by_hand', self.attention)
        AttentionMaskInterface.register('by_hand', eager_mask)
        self.text = self.mllm.model.config.get_text_config()
        self.was, self.text._attn_implementation = self.text._attn_implementation, 'by_hand'

    def __exit__(self, *_):
        self.text._attn_implementation = self.was


def same_answer(mllm, p, got, ids):
    "The log-probability is that of the changed model, which `after_plain` is called within"
    want = sum(log_softmax(after_plain(mllm, p, ids[:k]))[i] for k, i in enumerate(ids))
    assert got.ids == ids and abs(got.logp - want) < 1e-4 * max(1, abs(want))


@pytest.mark.parametrize('name', [*NAMES, 'paligemma', 'idefics3'])
def test_redistribution_by_hand(name, request):
    "Every layer but the last; sinks are those of the prompt while the answer is said"
    mllm = request.getfixturevalue('tiny') if name == 'tiny' else family(name)
    im = picture(mllm)
    p, changed = mllm.prompt(im, ASK), []
    visual, kw = p.visual.tolist(), dict(rho=0.3, p=0.1, least=0.05, ratio=1.0, often=0.35)

    def change(i, module, query, key, mask, scaling, w):
        if i == mllm.n_layers - 1:
            return None
        new, n = redistributed_by_hand(w, visual, p.length, max(visual) + 1, **kw)
        changed.append(n)
        return new

    rule = baselines.reweighting._Redistribution('bright', tau=20.0, **kw)
    with torch.no_grad():
        plain = mllm.model(**p.inputs, use_cache=False).logits[0, -1]
        with baselines.reweighting._reweighing(mllm, p, range(mllm.n_layers - 1), rule):
            got = mllm.model(**p.inputs, use_cache=False).logits[0, -1]
        with by_hand(mllm, change):
            want = mllm.model(**p.inputs, use_cache=False).logits[0, -1]
    assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max())
    assert sum(changed) and (got - plain).abs().max() > 1e-4
    r = answer(mllm, im, ASK, 'var', max_new_tokens=N, **kw)
    with by_hand(mllm, change):
        same_answer(mllm, p, r.answer, greedy(mllm, p, lambda ids: after(mllm, p, ids), N))


def test_published_sinks_give_too(tiny):
    "Massive states, and the first token among the sinks: its attention goes to the picture as well"
    weights, sinks = torch.rand(1, 2, 3, 6).softmax(-1), torch.tensor([[True, False, True, False, False, False]])
    visual = torch.tensor([False, True, True, True, True, False])
    new = baselines.reweighting._redistributed(weights, sinks, visual, 0.2, 0.6, 0.2)
    given = 0.4 * (weights[..., 0] + weights[..., 2])
    for j in (1, 3, 4):
        want = weights[..., j] * (1 + given / (weights[..., 1] + weights[..., 3] + weights[..., 4]))
        assert torch.allclose(new[..., j], want, atol=1e-6)
    assert torch.allclose(new[..., 0], 0.6 * weights[..., 0]) and torch.equal(new[..., 5], weights[..., 5])
    assert torch.allclose(new.sum(-1), torch.ones(1, 2, 3))
    im, boosted = noise_image(0), []
    p = tiny.prompt(im, ASK)

    def massive(layer, args, kw):
        h = args[0].clone()
        h[:, [0, int(p.visual[3])], 5] = 1e5  # of 48 dimensions; τ below the square root of that can be reached
        boosted.append(1)
        return (h, *args[1:]), kw

    rule = baselines.reweighting._Redistribution('massive', 0.0, 0.6, 0.0, tau=5.0, ratio=3.0, often=0.8)
    handle = tiny.layers[1].register_forward_pre_hook(massive, with_kwargs=True)
    try:
        with torch.no_grad(), baselines.reweighting._reweighing(tiny, p, [0, 1], rule):
            tiny.model(**p.inputs, use_cache=False)
    finally:
        handle.remove()
    assert boosted and not rule.sinks[0].any()
    assert rule.sinks[1][0].nonzero()[:, 0].tolist() == [0, int(p.visual[3])]


@pytest.mark.parametrize('name', [*NAMES, 'paligemma', 'idefics3'])
def test_more_attention_by_hand(name, request):
    "The last row's logits at the picture, and the contrast with the answer that sees none"
    mllm = request.getfixturevalue('tiny') if name == 'tiny' else family(name)
    im = picture(mllm)
    p = mllm.prompt(im, ASK)

    def change(i, module, query, key, mask, scaling, w):
        if i == 0:
            return None
        return raised_by_hand(query, key, mask, scaling, p.visual.tolist(), p.length - 1, 0.5)

    def attend(i, logits, visual, now, gone):
        return baselines.reweighting._raised(logits, visual, 0.5)

    with torch.no_grad():
        with baselines.reweighting._reweighing(mllm, p, range(1, mllm.n_layers), attend):
            got = mllm.model(**p.inputs, use_cache=False).logits[0, -1]
        with by_hand(mllm, change):
            want = mllm.model(**p.inputs, use_cache=False).logits[0, -1]
    assert (got - want).abs().max() < 1e-5 * max(1, want.abs().max())

    def amateur(ids):
        with edit(mllm, None, p.visual, 'knockout', text_from=baselines.decoding._first_text_row(mllm, p)):
            return log_softmax(after(mllm, p, ids))

    def seeing(ids):
        with by_hand(mllm, change):
            return log_softmax(after(mllm, p, ids))

    def scores(ids):
        e = seeing(ids)
        return plausible(1.5 * e - 0.5 * np.where(np.isinf(e), 0, amateur(ids)), e)

    layers = range(1, mllm.n_layers)
    r = answer(mllm, im, ASK, 'pai', alpha=0.5, gamma=1.5, layers=layers, max_new_tokens=N)
    ids = greedy(mllm, p, scores, N)
    with by_hand(mllm, change):
        same_answer(mllm, p, r.answer, ids)


@pytest.mark.parametrize('method', ['var', 'pai'])
def test_no_change_is_the_plain_answer(any_mllm, method):
    mllm, im = any_mllm, picture(any_mllm)
    nothing = dict(var=dict(p=1.0, ratio=1.0, often=0.35), pai=dict(alpha=0.0, gamma=1.0))[method]
    base, r = mllm.answer(im, ASK, 5), answer(mllm, im, ASK, method, max_new_tokens=5, **nothing)
    assert r.answer.ids == base.ids and abs(r.answer.logp - base.logp) < 1e-3


@pytest.mark.parametrize('method', ['cd', 'vcd'])
def test_no_contrast_is_the_plain_answer(any_mllm, method):
    mllm, im = any_mllm, picture(any_mllm)
    base, r = mllm.answer(im, ASK, 5), answer(mllm, im, ASK, method, alpha=0, max_new_tokens=5)
    assert r.answer.ids == base.ids and abs(r.answer.logp - base.logp) < 1e-3
    strong = answer(mllm, im, ASK, method, alpha=50.0, beta=1e-3, max_new_tokens=5)
    assert strong.answer.ids != base.ids  # and there is something to contrast


def test_one_plausible_token_is_the_plain_answer(tiny):
    for method in CONTRASTS:
        assert (
            answer(tiny, noise_image(2), ASK, method, beta=1.0, max_new_tokens=5).answer.ids
            == tiny.answer(noise_image(2), ASK, 5).ids
        )


def test_costs_are_counted(tiny):
    im, n = noise_image(0), 3
    p, G = tiny.prompt(im, ASK), tiny.prompt(im, GENERAL).length
    S, cut = p.length, int(p.visual.max()) + 1
    capabilities(tiny, p)  # probed once per model
    for method in METHODS:
        kw = dict(beams=2, candidates=2) if method == 'opera' else {}
        calls = []
        handle = tiny.layers[2].self_attn.register_forward_pre_hook(
            reader(lambda m, args, kw: calls.append(tuple((args[0] if args else kw['hidden_states']).shape[:2]))),
            with_kwargs=True,
        )
        try:
            r = answer(tiny, im, ASK, method, max_new_tokens=n, **kw)
        finally:
            handle.remove()
        assert (r.cost.forwards, r.cost.rows) == (sum(b for b, _ in calls), sum(b * k for b, k in calls)), method
        T = len(r.answer.ids)
        two = (
            tiny.prompt([im, r.crop], ASK).length - cut + T - 1 if r.crop else 0
        )  # rows behind the first picture, and the answer's
        if method in ('cd', 'vcd', 'pai'):
            assert (r.cost.forwards, r.cost.rows) == (2 * T, 2 * (S + T - 1))
        if method in ('dola', 'var'):
            assert (r.cost.forwards, r.cost.rows) == (T, S + T - 1)
        if method == 'vicrop-rel':
            assert (r.cost.forwards, r.cost.rows) == (2 + T, S + G + two)
        if method == 'vicrop-grad':
            assert (r.cost.forwards, r.cost.rows, r.cost.backwards) == (2 + T, 2 * S + two, 1)
        if method == 'vicrop-pure':
            assert (r.cost.forwards, r.cost.rows, r.cost.backwards) == (3 + T, 2 * S + G + two, 2)
        assert r.cost.back == dict([('vicrop-grad', S), ('vicrop-pure', S + G)]).get(method, 0)
        if method == 'opera':
            assert r.cost.forwards == 1 + 2 * n + 2 * (
                1 + 2 * (n - 1)
            )  # beams decode, candidates are tried; no answer ends before n here


def test_every_method_starts_from_a_look(tiny):
    im = noise_image(1)
    first = first_pass(tiny, im, ASK)
    for method in METHODS:
        kw = dict(beams=2, candidates=2) if method == 'opera' else {}
        a, b = (
            answer(tiny, im, ASK, method, max_new_tokens=2, **kw),
            answer(tiny, first, method=method, max_new_tokens=2, **kw),
        )
        saved = a.cost.forwards - b.cost.forwards
        assert (
            a.answer == b.answer
            and a.box == b.box
            and saved == (method.startswith('vicrop') or method in ('carve', 'opera'))
        )
    N = sum(v.numel() for k, v in tiny.model.named_parameters() if '.language_model.layers.' in k)
    assert baselines.Cost(1, 10, 1, 3).flops(tiny) == 2 * N * (10 + 2 * 3) and baselines.Cost(1, 10) + baselines.Cost(
        2, 5, 1, 3
    ) == baselines.Cost(3, 15, 1, 3)


def test_flow_by_hand(any_mllm):
    mllm, im = any_mllm, picture(any_mllm)
    p = mllm.prompt(im, ASK)
    t = flow(mllm, [Sample(im, ASK, id='a')], layers=[1, 2], width=3)
    rows, S = question_rows(mllm, p), p.length
    assert mllm.decode(p.inputs['input_ids'][0, rows].tolist()).replace(' ', '') == ASK.replace(' ', '')
    first = mllm.answer(p, max_new_tokens=1).ids[0]
    prob = lambda: math.exp(log_softmax(after_plain(mllm, p, []))[first])
    base, last = prob(), torch.tensor([S - 1])
    ends = {
        'image→question': (p.visual, rows),
        'image→last': (p.visual, last),
        'question→last': (rows, last),
        'last→last': (last, last),
    }
    assert set(t.flow) == set(FLOWS) and len(t) == 8 and np.allclose(t.base, base, rtol=1e-3)
    for r in t.itertuples():
        cols, rws = ends[r.flow]

        def close(module, args, kw):
            m, _h = kw.get('attention_mask'), args[0] if args else kw['hidden_states']
            full = (
                torch.zeros(1, 1, S, S).masked_fill(~torch.ones(S, S, dtype=torch.bool).tril(), -1e9)
                if m is None
                else m.clone()
                if m.is_floating_point()
                else torch.zeros(m.shape).masked_fill(~m, -1e9)
            )
            for i in rws:
                for j in cols:
                    full[0, 0, i, j] = -1e9
            return args, kw | dict(attention_mask=full)

        handles = [
            mllm.layers[i].register_forward_pre_hook(close, with_kwargs=True)
            for i in scoped(mllm, r.layer, 'window', 3)
        ]
        try:
            want = prob()
        finally:
            [h.remove() for h in handles]
        assert (
            abs(r.p - want) < 1e-4 * max(want, base)
            and abs(r.change - (r.p - base) / base) < 1e-3 * abs(r.change) + 1e-4
        )
    assert t.change.abs().max() > 1e-3


def snapshot(mllm):
    return (
        mllm.model.config.get_text_config()._attn_implementation,
        [q.requires_grad for q in mllm.model.parameters()],
        torch.is_grad_enabled(),
        [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), len(m._backward_pre_hooks))
            for m in mllm.model.modules()
        ],
    )


@pytest.mark.parametrize('method', METHODS)
def test_the_model_stays_as_it_was(tiny, method, monkeypatch):
    im, kw = noise_image(0), dict(max_new_tokens=2) | (dict(beams=2, candidates=2) if method == 'opera' else {})
    p = tiny.prompt(im, ASK)
    plain, weights, before = (
        after_plain(tiny, p, []),
        {k: v.clone() for k, v in tiny.model.state_dict().items()},
        snapshot(tiny),
    )
    answer(tiny, im, ASK, method, **kw)
    assert (
        snapshot(tiny) == before
        and all(q.grad is None for q in tiny.model.parameters())
        and np.array_equal(after_plain(tiny, p, []), plain)
    )

    def boom(*args):
        raise RuntimeError('boom')

    for where in (tiny.layers[-1], tiny.head):
        handle = where.register_forward_pre_hook(boom)
        try:
            with pytest.raises(RuntimeError, match='boom'):
                answer(tiny, im, ASK, method, **kw)
        finally:
            handle.remove()
        assert snapshot(tiny) == before
    assert np.array_equal(after_plain(tiny, p, []), plain) and all(
        torch.equal(v, weights[k]) for k, v in tiny.model.state_dict().items()
    )


@pytest.mark.parametrize('around', [torch.no_grad, torch.inference_mode])
def test_gradients_under_no_grad(tiny, around):
    for method in ('vicrop-grad', 'vicrop-pure'):
        want = answer(tiny, noise_image(0), ASK, method, max_new_tokens=2)
        with around():
            got = answer(tiny, noise_image(0), ASK, method, max_new_tokens=2)
        assert np.array_equal(got.map, want.map) and got.answer == want.answer


@pytest.mark.parametrize('name', ['instructblip', 'internvl', 'mllama'])
@pytest.mark.parametrize('method', METHODS)
def test_other_families(name, method):
    "No method knows a family: an answer comes out, or a sentence that says why not"
    mllm, kw = family(name), dict(beams=2, candidates=2) if method == 'opera' else {}
    run = lambda: answer(mllm, noise_image(0, (96, 96)), ASK, method, max_new_tokens=3, **kw)
    if name == 'mllama' and method in ('opera', 'var', 'pai'):
        with pytest.raises(ValueError, match='cross-attention'):
            run()
    else:
        r = run()
        assert (
            isinstance(r, BaselineAnswer)
            and 1 <= len(r.answer.ids) <= 3
            and r.cost.forwards >= len(r.answer.ids)
            and (r.map is None or np.isfinite(r.map).all())
        )


def test_refusals(tiny, samples):
    for kw, word in (
        (dict(method='clip'), "No method 'clip'"),
        (dict(method='vicrop-rel', layer=99), 'no layer'),
        (dict(method='dola', layers='middle'), "layers is 'high'"),
        (dict(method='dola', layers=[77]), 'no layer'),
        (dict(method='opera', max_new_tokens=26), 'up to 25'),
        (dict(method='var', found='eye'), "found is 'massive'"),
        (dict(method='pai', layers=[77]), 'no layer'),
    ):
        with pytest.raises(ValueError, match=word):
            answer(tiny, noise_image(0), ASK, **kw)
    with pytest.raises(ValueError, match='layer 0 shows no'):
        answer(family('mllama'), noise_image(0, (96, 96)), ASK, 'vicrop-rel', layer=0)
    with pytest.raises(ValueError, match='No flow'):
        flow(tiny, samples[:1], flows=('image→mouth',))
    with pytest.raises(ValueError, match='cross-attention'):
        flow(family('mllama'), samples[:1])
