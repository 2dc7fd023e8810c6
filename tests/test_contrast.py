"Contrast, boxes and refinement against hand-written twins"

import numpy as np, pytest, torch
from fusion_notebooks.contrast import (
    CROPS,
    MASKS,
    PAPER,
    box_around,
    candidate_layers,
    contrastive_attention,
    crop_box,
    focus_box,
    js2,
    first_pass,
    lowest,
    propose,
    refine,
    view_side,
    window_box,
)
from fusion_notebooks.core.errors import BadInput
from fusion_notebooks.fusion import layers_by_boxes, MeasuredLayers
from fusion_notebooks.hooks import capture, edit
from fusion_notebooks.engine import capabilities
from fusion_notebooks.mllm import Grid, reader, token_boxes

from conftest import noise_image

rng = np.random.default_rng(0)
grid = Grid(np.arange(64), 8, 8, token_boxes(8, 8, (384, 384), (0.25, 0.25), (0, 0), (96, 96)), (384, 384), 1.0)


def test_contrast_by_hand():
    maps = rng.random((6, 64))
    c = contrastive_attention(maps, (0, 2, 3, 5), 4)  # 5 is not below post
    p = maps / maps.sum(1, keepdims=True)
    h = {i: np.sqrt(((np.sqrt(p[i]) - np.sqrt(p[4])) ** 2).sum() / 2) for i in (0, 2, 3)}
    assert c.pre == max(h, key=h.get) and np.isclose(c.distance, max(h.values()))
    assert np.allclose(c.map, p[4] - p[c.pre]) and abs(c.map.sum()) < 1e-12
    with pytest.raises(ValueError, match='No candidate'):
        contrastive_attention(maps, (4, 5), 4)


def test_a_layer_that_does_not_look_is_never_chosen():
    maps = rng.random((6, 64))
    maps[2] = 0
    maps[3] = np.nan  # closed to the picture; without visual keys
    c = contrastive_attention(maps, range(4), 4)
    assert c.pre in (0, 1) and np.isfinite(c.map).all() and np.isfinite(c.distance)
    for bad in ((2, 3), 4), (range(2), 2):
        with pytest.raises(ValueError, match='no attention on the picture'):
            contrastive_attention(maps, *bad)


def test_other_distance_and_raw_maps_by_hand():
    from scipy.spatial.distance import jensenshannon

    maps = rng.random((6, 64)) * rng.random((6, 1))
    maps[2, :40] = 0
    p = maps / maps.sum(1, keepdims=True)
    d = {i: jensenshannon(p[i], p[4], base=2) ** 2 for i in range(4)}
    c = contrastive_attention(maps, range(4), 4, 'js2', raw=True)
    assert (
        c.pre == max(d, key=d.get)
        and np.isclose(c.distance, max(d.values()))
        and np.allclose(js2(maps[:4], maps[4]), list(d.values()))
    )
    assert np.allclose(c.map, maps[4] - maps[c.pre]) and abs(c.map.sum()) > 1e-3  # not renormalised
    with pytest.raises(ValueError, match="distance is one of hellinger, js2, not 'l2'"):
        contrastive_attention(maps, range(4), 4, 'l2')


def test_candidate_sets():
    assert candidate_layers(None, 8, 5) == candidate_layers('all', 8, 5) == [0, 1, 2, 3, 4]
    assert (
        candidate_layers('shallow', 32, 28) == [*range(16)]
        and candidate_layers('deep', 32, 28) == [*range(18, 28)]
        and candidate_layers('deep', 8, 7) == [5, 6]
    )
    assert candidate_layers(3, 8, 7) == [3] and candidate_layers((6, 2, 7), 8, 7) == [6, 2]
    with pytest.raises(ValueError, match='No candidate'):
        candidate_layers('deep', 8, 4)
    with pytest.raises(ValueError, match="or one of all, shallow, deep, not 'some'"):
        candidate_layers('some', 8, 4)


@pytest.mark.parametrize('rule', ['components', 'meanstd'])
def test_box_rules_by_hand(rule):
    from scipy import ndimage

    for k in range(30):
        m = np.random.default_rng(k).normal(size=64)
        pos = np.maximum(m, 0).reshape(8, 8)
        if rule == 'meanstd':
            kept = pos > pos.mean() + pos.std()
        else:
            parts, n = ndimage.label(pos >= np.quantile(pos, 0.8))
            kept = np.isin(parts, sorted(range(1, n + 1), key=lambda i: -pos[parts == i].sum())[:3])
        ys, xs = kept.any(1).nonzero()[0], kept.any(0).nonzero()[0]
        assert crop_box(m, grid, 96, rule) == (48 * xs[0], 48 * ys[0], 48 * (xs[-1] + 1), 48 * (ys[-1] + 1))
    assert crop_box(-np.ones(64), grid, 96, rule) == window_box(-np.ones(64), grid, 96)  # nothing stands out
    with pytest.raises(ValueError, match='rule is one of vicrop, components, meanstd, focus'):
        crop_box(m, grid, 96, 'largest')


def test_focus_box_by_hand():
    m = np.zeros((8, 8))
    m[3, 5], m[3, 6], m[3, 0], m[0, 0] = 3, 1, 2, -9  # cells of 48 pixels; 2 is farther than a window
    assert focus_box(m.ravel(), grid, 144) == (276 - 72, 168 - 72, 276 + 72, 168 + 72)  # x = (3·5.5 + 6.5)/4 cells
    assert focus_box(m.ravel()[::-1], grid, 144) == (108 - 72, 216 - 72, 108 + 72, 216 + 72)
    m[3, 7] = 9
    assert focus_box(m.ravel(), grid, 144) == (240, 96, 384, 240)  # moved into the picture
    for k in range(20):  # no window of whole cells holds more
        l, t, r, b = focus_box(v := np.random.default_rng(k).random(64), grid, 96)
        at = max(
            ((y, x) for y in range(7) for x in range(7)),
            key=lambda a: v.reshape(8, 8)[a[0] : a[0] + 2, a[1] : a[1] + 2].sum(),
        )
        assert abs((l + r) / 96 - at[1] - 1) < 1 and abs((t + b) / 96 - at[0] - 1) < 1 and r - l == b - t == 96
    assert focus_box(np.zeros(64), grid, 144) == (0, 0, 144, 144)


def test_side_of_the_view(tiny):
    "That of a fixed view; of a Qwen2-VL the root of the pixels that are not shrunk, and never more than 336"
    from types import SimpleNamespace as S

    assert view_side(tiny) == 96
    qwen = lambda **kw: S(model=S(config=S(vision_config=S())), processor=S(image_processor=S(**kw)))
    assert (
        view_side(qwen(merge_size=1, size=dict(longest_edge=9216))) == 96
        and view_side(qwen(merge_size=2, size=dict(longest_edge=12845056))) == 336
    )
    assert view_side(qwen(size=dict(longest_edge=980))) == 336  # a side, not an area


def test_lowest_is_exact_and_stable():
    v = np.array([0.0, -1, 0, -3, 0, 2])
    assert lowest(v, 0.5).tolist() == [0, 1, 3] and lowest(v, 0).tolist() == [] and len(lowest(-np.abs(v), 0.2)) == 1
    many = -rng.random(100)  # all negative: still exactly the share
    assert len(lowest(many, 0.2)) == 20 and set(lowest(many, 0.2)) == set(np.argsort(many)[:20])


def naive_window(m, base, size):
    "ViCrop's window, as its paper and its authors' function have it: cell by cell, side by side"
    h, w = m.shape
    tried = []
    for r in (1, 1.2, 1.4, 1.6, 1.8, 2):
        columns, rows = min(int(base * r / (size[0] / w)), w), min(int(base * r / (size[1] / h)), h)
        if (columns, rows) == (w, h):
            if r == 1:
                return 0, 0, *size
            continue
        sums = {
            (x, y): m[y : y + rows, x : x + columns].sum() for x in range(w - columns + 1) for y in range(h - rows + 1)
        }
        x, y = max(sums, key=sums.get)
        near = [sums[k] for k in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)) if k in sums]
        tried.append(((sums[x, y] - np.mean(near)) / (columns * rows), -len(tried), (x, y), (columns, rows), base * r))
    _, _, at, cells, side = max(tried)
    box = []
    for axis, n in enumerate((w, h)):
        cell = size[axis] / n
        middle = int(at[axis] * cell + cells[axis] * cell / 2)
        middle = max(middle, side // 2)
        middle = min(middle, size[axis] - side // 2)
        box.append((max(0, middle - side // 2), min(size[axis], middle + side // 2)))
    return box[0][0], box[1][0], box[0][1], box[1][1]


def square_grid(n, size):
    view = (24 * n, 24 * n)
    scale = (view[0] / size[0], view[1] / size[1])
    return Grid(np.arange(n * n), n, n, token_boxes(n, n, size, scale, (0, 0), view), size, 1.0)


@pytest.mark.parametrize(
    'size, cells, base', [((384, 384), 8, 96), ((500, 375), 24, 336), ((640, 300), 24, 336), ((90, 80), 8, 96)]
)
def test_window_equals_its_naive_twin(size, cells, base):
    "Also where a window is longer than a side of the picture, or than both"
    where = square_grid(cells, size)
    for k in range(60):
        m = (
            np.random.default_rng(k).integers(0, 9, (cells, cells)) / 8.0
        )  # sums without rounding: ties are ties in both
        m[k % cells, (3 * k) % cells] += 20
        assert window_box(m.ravel(), where, base) == naive_window(m, base, size)


def test_a_window_takes_all_of_a_side_that_is_shorter():
    "The published numbers: 500 × 375, window 402"
    m = np.zeros((24, 24))
    m[:, 12] = 1
    m[10, 3:22] = 0.9
    left, top, right, bottom = window_box(m.ravel(), square_grid(24, (500, 375)), 335, ratios=(1.2,))
    assert (top, bottom) == (0, 375) and right - left == 402


def test_boxes_stay_inside():
    for c in ((0, 0), (384, 384), (10, 200)):
        for side in (1, 96, 1000):
            l, t, r, b = box_around(c, side, (384, 300))
            assert 0 <= l < r <= 384 and 0 <= t < b <= 300 and r - l == b - t


def close(a, b):
    assert a.ids == b.ids and abs(a.logp - b.logp) < 1e-5 * max(1, abs(b.logp))


@pytest.fixture(scope='module')
def seen(tiny, samples):
    return first_pass(tiny, samples[0].image, samples[0].question)


def test_signed_sum_by_hand(tiny, samples, seen):
    "Noise that all layers share goes; layer by layer and token by token"
    im, ask, grid = samples[0].image, samples[0].question, seen.prompt.grids[0]
    for candidates in ((2, 4), (0, 3)):
        first, n = candidates[0], len(seen.maps)
        values = np.zeros(seen.maps.shape[1])
        for i, layer in enumerate(seen.maps):
            for token, a in enumerate(layer):
                sign = 1 / (n - first) if i >= first else -1 / first
                values[token] += sign * a / layer.sum()
        r = refine(tiny, seen, by='signed', candidates=candidates)
        assert r.box == crop_box(grid.of(values), grid, 96, 'vicrop')
        close(r.answer, tiny.answer([im, im.crop(r.box)], ask))


def test_mask_by_hand(tiny, seen):
    r = refine(tiny, seen, how='mask', review=5, candidates=(1, 2))
    c = contrastive_attention(seen.maps, (1, 2), 4)
    assert (r.contrast.pre, r.contrast.post) == (c.pre, 4)
    worst = np.argsort(c.map, kind='stable')[:13]

    def zero(layer, args):
        h = args[0]
        if h.shape[1] > 1:
            h = h.clone()
            h[:, seen.prompt.visual[np.sort(worst)]] = 0
        return (h, *args[1:])

    handle = tiny.layers[5].register_forward_pre_hook(zero)
    try:
        want = tiny.answer(seen.prompt)
    finally:
        handle.remove()
    assert r.answer == want != seen.base and (r.tokens == np.sort(worst)).all()


def test_mask_reads_before_it_edits(tiny, seen):
    "The maps that choose the tokens are the same in the edited pass: one pass does"
    r = refine(tiny, seen, how='mask', review=5)
    with edit(tiny, 5, seen.prompt.visual[r.tokens], 'zero'), capture(tiny) as cache:
        tiny.answer(seen.prompt)
    now = cache.attention[0, :, 0].numpy()
    assert np.abs(now[:5] - seen.maps[:5]).max() < 1e-6 and np.abs(now[5:] - seen.maps[5:]).max() > 1e-5


def test_options_of_the_crop_by_hand(tiny, samples, seen):
    im, ask = samples[0].image, samples[0].question
    for kw in (
        dict(rule='meanstd', distance='js2'),
        dict(rule='components', raw=True, candidates='shallow'),
        dict(by='read', candidates=(1, 4)),
        dict(by='focus', candidates=(1, 4)),
        dict(rule='focus'),
    ):
        r = refine(tiny, seen, **kw)
        p = seen.prompt.grids[0]
        values = (
            seen.maps[[1, 4]] / seen.maps[[1, 4]].sum(1, keepdims=True)
            if 'by' in kw
            else contrastive_attention(
                seen.maps, kw.get('candidates'), 7, kw.get('distance', 'hellinger'), kw.get('raw', False)
            ).map[None]
        )
        assert r.box == (
            focus_box(p.of(values.mean(0)), p, 144)
            if 'focus' in kw.values()
            else crop_box(p.of(values.mean(0)), p, 96, kw.get('rule', 'vicrop'))
        )
        close(r.answer, tiny.answer([im, im.crop(r.box)], ask))
    r = refine(tiny, seen, order='before')
    assert (
        r.answer == tiny.answer([r.crop, im], ask) and r.answer != refine(tiny, seen).answer and r.path == 'two passes'
    )
    for kw, word in (
        (dict(order='answer_with_crops'), "order is 'after' or 'before'"),
        (dict(rule='x'), 'rule is one of'),
        (dict(candidates='x'), 'candidates are'),
        (dict(distance='x'), 'distance is'),
    ):
        with pytest.raises(ValueError, match=word):
            refine(tiny, seen, **kw)


def test_paper_mode_by_hand(tiny, seen):
    "Raw difference, the logs' distance, all layers, λ = 1e-9, sampling at T = 0.2"
    assert PAPER == dict(raw=True, distance='js2', candidates='all', strength=1e-9, temperature=0.2)
    r = refine(tiny, seen, how='mask', review=5, seed=3, **PAPER)
    c = contrastive_attention(seen.maps, range(4), 4, 'js2', raw=True)
    assert (r.contrast.pre, r.contrast.post) == (c.pre, 4) and r.tokens.tolist() == lowest(c.map, 0.2).tolist()
    with edit(tiny, 5, seen.prompt.visual[r.tokens], 'zero', 1e-9):
        want = tiny.generate(seen.prompt, temperature=0.2, seed=3)[0]
    assert r.answer == want and r.base == tiny.generate(seen.prompt, temperature=0.2, seed=3)[0]
    state = torch.random.get_rng_state()
    hot = [tiny.generate(seen.prompt, temperature=5.0, seed=k)[0].ids for k in (0, 0, 1)]
    assert hot[0] == hot[1] != hot[2] and torch.equal(state, torch.random.get_rng_state())
    crop = refine(tiny, seen, seed=3, **PAPER)
    assert (
        crop.answer
        == tiny.generate(
            tiny.prompt([seen.prompt.images[0], crop.crop], seen.prompt.question), temperature=0.2, seed=3
        )[0]
    )


def test_crop_by_hand(tiny, samples, seen):
    r = refine(tiny, samples[0].image, samples[0].question, how='crop')
    crop = samples[0].image.crop(r.box)
    close(r.answer, tiny.answer([samples[0].image, crop], samples[0].question))
    assert r.base == seen.base and r.path == 'reused'
    close(r.base, tiny.answer(samples[0].image, samples[0].question))
    assert r.crop.tobytes() == crop.tobytes()


def test_one_pass_each(tiny, samples, monkeypatch):
    "mask runs the prompt's rows once; crop runs the picture's rows once, and the second time only what the crop adds"
    rows = []
    handle = tiny.layers[0].register_forward_pre_hook(
        reader(lambda layer, args, kw: rows.append((args[0] if args else kw['hidden_states']).shape[1])),
        with_kwargs=True,
    )
    try:
        p = tiny.prompt(samples[0].image, samples[0].question)
        capabilities(tiny, p)
        rows.clear()
        refine(tiny, samples[0].image, samples[0].question, how='mask')
        assert rows[0] == p.length and set(rows[1:]) == {1}
        rows.clear()
        refine(tiny, samples[0].image, samples[0].question, how='crop')
        assert rows[:2] == [p.length, p.length + 64 - 68] and set(rows[2:]) == {1}
    finally:
        handle.remove()


@pytest.mark.parametrize('how,by', [('mask', b) for b in MASKS] + [('crop', b) for b in CROPS])
def test_every_control_runs(tiny, samples, seen, how, by):
    measured = MeasuredLayers(0, 2, 'boxes') if by == 'calibrated' else None
    chosen = dict(how=how, by=by, box=samples[0].box, seed=1, layers=measured)
    r = refine(tiny, seen, **chosen)
    assert (
        r.how == how
        and (r.tokens is None) == (how == 'crop')
        and (how == 'mask' or r.crop.size[0] == r.box[2] - r.box[0])
    )
    assert refine(tiny, seen, **chosen).answer == r.answer


def test_soft_mask(tiny, seen):
    r = refine(tiny, seen, how='mask', soft=True, strength=1.0)
    assert abs(r.answer.logp - seen.base.logp) < 1e-4  # a factor of 1 changes nothing
    assert abs(refine(tiny, seen, how='mask', soft=True, strength=0.01).answer.logp - seen.base.logp) > 1e-4


def test_refusals(tiny, seen):
    for kw, word in (
        (dict(how='blur'), 'how is'),
        (dict(by='luck'), 'by for crop'),
        (dict(by='oracle'), 'needs box'),
        (dict(how='mask', review=3, post=3), 'must lie below'),
        (dict(post=99), 'no layer'),
        (dict(candidates=[7], post=3), 'No candidate'),
    ):
        with pytest.raises(ValueError, match=word):
            refine(tiny, seen, **kw)


def test_measured_layers_equal_the_same_layers_given(tiny):
    "by='calibrated' is the paper's difference at the layers that were measured, and the late map where nothing is subtracted"
    image, ask = noise_image(3, (96, 96)), 'What is it?'
    first = first_pass(tiny, image, ask)
    pair, alone = MeasuredLayers(1, 4, 'boxes'), MeasuredLayers(None, 4, 'boxes')
    for how, last in (('crop', {}), ('mask', dict(review=6))):
        by_hand = propose(tiny, first, how, candidates=[1], post=4, **last)
        late = propose(tiny, first, how, by='late', candidates=[1], post=4, **last)
        for layers, want in ((pair, by_hand), (alone, late)):
            got = propose(tiny, first, how, by='calibrated', layers=layers, **last)
            assert got.box == want.box and (how == 'crop' or (got.tokens == want.tokens).all())
            answer = refine(tiny, first, how=how, by='calibrated', layers=layers, max_new_tokens=3, **last)
            assert answer.box == want.box and answer.contrast.pre == (1 if layers is pair else -1)


def test_measuring_by_boxes_equals_trying_every_pair():
    "Against one number after the other, with a layer that does not look; pictures may differ in their tokens"
    rng = np.random.default_rng(3)
    maps = [rng.random((5, n)) for n in (9, 9, 12)]
    for some in maps:
        some[2] = 0
    shares = [np.eye(some.shape[1])[k] for k, some in enumerate(maps)]

    def held(late, early):
        found = []
        for some, share in zip(maps, shares):
            a = [values / (values.sum() or 1) for values in some]
            left = np.clip(a[late] - (0 if early is None else a[early]), 0, None)
            found.append((left * share).sum() / (left.sum() or 1))
        return np.mean(found)

    for below in (None, 4, 2):
        late = [k for k in range(below or 5) if k != 2]
        pair = max(((i, k) for k in late for i in range(k)), key=lambda p: held(p[1], p[0]))
        best = max(late, key=lambda k: held(k, None))
        got = layers_by_boxes(maps, shares, below, least=0)
        if held(*pair[::-1]) < held(best, None):
            pair = None, best
        assert (got.early, got.late) == pair and abs(got.held - held(got.late, got.early)) < 1e-9


def test_the_first_layer_alone_may_be_the_measured_one(tiny):
    "Nothing lies below it, and nothing is subtracted"
    image, ask = noise_image(3, (96, 96)), 'What is it?'
    first = first_pass(tiny, image, ask)
    box = propose(tiny, first, 'crop', by='calibrated', layers=MeasuredLayers(None, 0, 'boxes')).box
    grid = first.prompt.grids[0]
    assert box == crop_box(grid.of(first.maps[0]), grid, view_side(tiny))
    r = refine(tiny, image, ask, how='mask', by='calibrated', layers=MeasuredLayers(None, 0, 'boxes'), max_new_tokens=3)
    assert (r.tokens == lowest(first.maps[0], 0.2)).all() and r.contrast.post == 0


def test_measured_layers_are_refused_where_they_do_not_belong(tiny):
    image, pair = noise_image(3, (96, 96)), MeasuredLayers(1, 4, 'boxes')
    for kw in (dict(by='calibrated'), dict(by='contrast', layers=pair), dict(by='calibrated', layers=pair, post=5)):
        with pytest.raises(BadInput, match='layers='):
            refine(tiny, image, 'What is it?', **kw)
    with pytest.raises(BadInput, match='below review layer 3'):
        refine(tiny, image, 'What is it?', how='mask', by='calibrated', layers=pair, review=3)
