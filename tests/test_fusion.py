"Maps and curves: naive twins, curves known by construction, the public logs"

import subprocess
import sys
import warnings
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from fusion_notebooks import fusion
from fusion_notebooks.fusion import fusion_layers, review_layer

REFERENCE = Path(__file__).parent.parent / 'data/reference'
PAPER = {2, 4, 8, 11, 12, 13}


def table(*accuracy, **more):
    return pd.DataFrame(dict(layer=range(len(accuracy)), accuracy=accuracy, **more))


def jaccard(a, b):
    return len(set(a) & set(b)) / len(set(a) | set(b))


@pytest.fixture(scope='module')
def logs():
    rows, bases = (pd.read_csv(REFERENCE / f'{f}.csv') for f in ('layer_masking', 'unmasked'))

    def read(model):
        mine = rows[rows.model == model]
        return (
            mine,
            bases[bases.model == model].set_index('dataset').accuracy.to_dict(),
            dict(n=1000, n_layers=int(mine.n_layers.iloc[0])),
        )

    return read


def samples(p, base=0.9, n=200, seed=0, questions=1):
    "Sample rows of accuracy p[i] per layer, and their unmasked rows"
    rng = np.random.default_rng(seed)
    luck = np.repeat(rng.random((n // questions, 1)), questions, 0)  # questions on one image succeed and fail together
    curve = pd.concat(
        [
            pd.DataFrame(
                dict(layer=i, sample=range(n), image=np.arange(n) // questions, accuracy=(luck[:, 0] < q).astype(float))
            )
            for i, q in enumerate(p)
        ]
    )
    return curve, pd.DataFrame(dict(sample=range(n), accuracy=(luck[:, 0] < base).astype(float)))


def test_no_torch():
    code = 'import sys, fusion_notebooks.fusion, fusion_notebooks.metrics, fusion_notebooks.plots; assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)


# maps


def test_hellinger_and_profile_equal_the_formula():
    maps = np.random.default_rng(0).random((3, 5, 7))
    for sample, row in zip(maps, fusion.profile(maps)):
        for layer, value in zip(sample, row):
            p, q = layer / layer.sum(), sample[-1] / sample[-1].sum()
            assert value == pytest.approx(sum((a**0.5 - b**0.5) ** 2 for a, b in zip(p, q)) ** 0.5 / 2**0.5)
    assert (fusion.profile(maps)[:, -1] == 0).all() and np.allclose(fusion.profile(maps[0]), fusion.profile(maps)[0])
    assert np.allclose(fusion.hellinger(maps, 17 * maps), 0) and np.allclose(
        fusion.hellinger(maps[0], maps[1]), fusion.hellinger(maps[1], maps[0])
    )


def test_empty_map_is_nan_and_negative_map_an_error():
    assert np.isnan(fusion.profile([[0, 0], [1, 1]])[0]) and np.isnan(fusion.evidence_mass([[0, 0]], [1, 0]))[0]
    with pytest.raises(ValueError, match='negative'):
        fusion.normalise([1, -1])


def test_bfloat16_tensors_are_read():
    torch = pytest.importorskip('torch')
    assert fusion.normalise(torch.tensor([1.0, 3.0], dtype=torch.bfloat16, requires_grad=True)).tolist() == [0.25, 0.75]


def test_evidence_share_counts_pixels():
    rng = np.random.default_rng(0)
    boxes = np.array([(10 * x, 8 * y, 10 * x + 10, 8 * y + 8) for y in range(4) for x in range(5)])
    for _ in range(20):
        left, right = np.sort(rng.integers(0, 51, 2))
        top, bottom = np.sort(rng.integers(0, 33, 2))
        pixels = np.zeros((32, 50))
        pixels[top:bottom, left:right] = 1
        naive = [pixels[b[1] : b[3], b[0] : b[2]].mean() for b in boxes]
        assert np.allclose(fusion.evidence_share(boxes, (left, top, right, bottom)), naive)
    assert fusion.evidence_share([[5, 5, 5, 9]], (0, 0, 9, 9)).tolist() == [0]  # a token of no area


def test_evidence_mass_of_uniform_attention_is_chance():
    share = np.random.default_rng(0).random(12)
    assert np.allclose(fusion.evidence_mass(np.ones((4, 3, 12)), share), share.mean())


def test_noise_share_naive():
    rng = np.random.default_rng(0)
    for _ in range(20):
        maps, share = rng.random((12, 30)) + 2 * (rng.random(30) < 0.15), (rng.random(30) < 0.2).astype(float)
        deep = [i for i in range(12) if i > 0.16 * 12]
        count = sum(
            share[t] == 0
            and sum(t in sorted(range(30), key=lambda j: -maps[i, j])[:3] for i in deep) >= 0.8 * len(deep)
            for t in range(30)
        )
        assert fusion.noise_share(maps, share) == pytest.approx(count / 30)


def test_layers_that_do_not_look_have_no_map_and_no_noise():
    maps = np.random.default_rng(0).random((6, 9))
    maps[[1, 5]] = 0
    seen = fusion.profile(maps)
    assert (
        np.isnan(seen[[1, 5]]).all() and seen[4] == 0 and np.allclose(seen[:4:2], fusion.hellinger(maps[:4:2], maps[4]))
    )  # the last map there is
    assert (
        fusion.noise_share(maps, np.zeros(9)) == fusion.noise_share(maps[[0, 2, 3, 4]], np.zeros(9), after=0.2)
        and fusion.noise_share(0 * maps, np.zeros(9)) == 0
    )


def test_pointing_auroc_and_iou_equal_counting():
    rng = np.random.default_rng(1)
    for _ in range(20):
        maps, share = (
            rng.integers(-3, 4, (4, 10)).astype(float),
            np.round(rng.random(10) * (rng.random(10) < 0.4), 2),
        )  # signed, with ties
        if not share.any():
            continue
        inside = [t for t in range(10) if share[t] >= share.max() / 2]
        for m, hit, area, overlap in zip(
            maps, fusion.pointing(maps, share), fusion.auroc(maps, share), fusion.iou(maps, share)
        ):
            best = max(range(10), key=lambda t: (m[t], -t))
            assert hit == float(share[best] > 0)
            assert area == pytest.approx(
                np.mean([(m[a] > m[b]) + 0.5 * (m[a] == m[b]) for a in inside for b in range(10) if b not in inside])
            )
            top = sorted(range(10), key=lambda t: (-m[t], t))[: len(inside)]
            assert overlap == pytest.approx(len({*top} & {*inside}) / len({*top} | {*inside}))


def test_scores_of_nothing_are_nan():
    maps = np.array([[0.2, 0.8], [np.nan, np.nan]])
    for f in (fusion.pointing, fusion.auroc, fusion.iou):
        assert np.isnan(f(maps, [0, 0])).all() and np.isnan(f(maps, [np.nan] * 2)).all()  # no evidence, no box
        assert np.isfinite(f(maps, [0, 1])[0]) and np.isnan(f(maps, [0, 1])[1])
    assert np.isnan(fusion.auroc(maps, [1, 1])[0])  # nothing else to tell it from


def test_looks_are_the_paper_s_contrast_and_vicrop_s_ratio():
    rng = np.random.default_rng(0)
    maps, general, share = rng.random((5, 12)), rng.random((5, 12)), np.eye(12)[3]
    general[:, 0] = 0
    p, g, found = (
        maps / maps.sum(1, keepdims=True),
        general / general.sum(1, keepdims=True),
        fusion.looks(maps, general),
    )
    for l in range(1, 5):
        i = max(range(l), key=lambda i: float(fusion.hellinger(p[i], p[l])))
        assert np.allclose(found['early'][l], p[i]) and np.allclose(found['contrast'][l], p[l] - p[i])
    assert (
        np.isnan(found['contrast'][0]).all()
        and np.allclose(found['relative'][:, 1:], (p / np.where(g, g, 1))[:, 1:])
        and 'relative' not in fusion.looks(maps)
    )
    scores = fusion.evidence_scores(maps, share)
    positive = np.maximum(found['contrast'][1:], 0)
    assert np.allclose(scores['contrast mass'][1:], positive[:, 3] / positive.sum(1)) and np.isnan(
        scores['contrast mass'][0]
    )
    assert np.allclose(scores['late mass'], fusion.evidence_mass(maps, share)) and len(scores) == 3 * 4


def test_contrast_equals_the_library_s():
    contrast = pytest.importorskip('fusion_notebooks.contrast')
    maps = np.random.default_rng(2).random((6, 20))
    assert np.allclose(fusion.looks(maps)['contrast'][4], contrast.contrastive_attention(maps, range(6), 4).map)


def test_sinks_share_the_first_token_s_dimension():
    states = np.random.default_rng(0).normal(size=(6, 1024)).astype('float32')
    first = states[0].copy()
    first[5] = 300
    states[2, 5], states[3, 9] = -300, 300
    assert fusion.massive(states, first).tolist() == [False, False, True, False, False, False]
    assert (
        not fusion.massive(states, states[0]).any() and not fusion.massive(states[:, :400], first[:400]).any()
    )  # at most the root of the width


# curves known by construction


@pytest.mark.parametrize('how', ['zero', 'mean', 'swap'])
def test_state_edits_show_as_a_rise_to_the_next_layer(how):
    found = fusion_layers(table(0.1, 0.1, 0.1, 0.5, 0.5, 0.5, 0.9, 0.9), 0.9, how=how, n=500)
    assert found.layers == (2, 5) and list(found.table.columns[:4]) == ['layer', 'drop', 'low', 'high']
    assert found.table['drop'][2] == pytest.approx(0.4) and min(found.confidence[i] for i in found.layers) > 0.99


@pytest.mark.parametrize('how', ['knockout', 'soft'])
def test_knockout_shows_as_a_dip_at_the_layer(how):
    found = fusion_layers(table(0.9, 0.9, 0.3, 0.9, 0.9, 0.6, 0.9), 0.9, how=how, n=500)
    assert found.layers == (2, 5)
    assert fusion_layers(table(0.1, 0.1, 0.5, 0.5, 0.9), 0.9, how='knockout', scope='from', n=500).layers == (1, 3)


def test_coming_back_from_a_dip_is_no_information():
    assert fusion_layers(table(0.1, 0.1, 0.9, 0.9, 0.2, 0.9), 0.9, how='zero', n=1000).layers == (1,)


def test_percent_and_shares_agree():
    share, percent = (
        fusion_layers(
            table(0.1, 0.1, 0.5, 0.9, 0.9).assign(accuracy=lambda t: s * t.accuracy), 0.9 * s, how='swap', n=300
        )
        for s in (1, 100)
    )
    assert share.layers == percent.layers == (1, 2) and np.allclose(100 * share.table.low, percent.table.low)


def test_last_layer_counts_against_the_base():
    assert fusion_layers(table(0.2, 0.2, 0.2), 0.8, how='swap', n=500).layers == (2,)
    assert (
        fusion_layers(table(0.2, 0.2, 0.2), 0.8, how='swap', n=500, n_layers=12).layers == ()
    )  # layers 3 to 11 were not measured


@pytest.mark.parametrize('rule', ['information', 'paper'])
@pytest.mark.parametrize('how', ['swap', 'knockout'])
def test_nothing_is_an_answer(rule, how):
    for curve, base in ((table(*[0.8] * 8), 0.8), (table(*[0.0] * 8), 0.0), (table(0.8), 0.8)):
        for n in (500, None):
            assert fusion_layers(curve, base, how=how, rule=rule, n=n).layers == ()
            assert review_layer(curve, base, n=n).layers == ()


def test_agreement_counts_open_layers_and_decoys_only():
    for found in ((), (0,), (2, 6), (2, 6, 7), (1, 2), fusion_layers(table(0.9, 0.9, 0.2, 0.9), 0.9, n=500)):
        named = set(getattr(found, 'layers', found)) & {1, 2, 4, 6}
        got = fusion.agreement(found, (2, 6), (1, 4))
        assert got['recall'] == len(named & {2, 6}) / 2 and got['exact'] == (named == {2, 6})
        assert got['precision'] == len(named & {2, 6}) / len(named) if named else np.isnan(got['precision'])


def test_single_layer():
    assert fusion_layers(table(0.1), 0.9, how='knockout', n=500).layers == (0,)
    assert review_layer(pd.DataFrame(dict(layer=[5], accuracy=[0.1])), 0.9, n=500).dip == ()


def test_repeats_are_averaged_and_nan_left_out():
    curve = pd.concat([table(0.1, 0.1, 0.9, 0.9, run=0), table(0.3, 0.1, np.nan, 0.9, run=1)])
    found = fusion_layers(curve, 0.9, how='swap', n=500)
    assert found.layers == (1,) and found.table['drop'][1] == pytest.approx(0.9 - 0.2)


def test_missing_layer_is_bridged_and_a_hole_is_not():
    full = table(0.1, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9)
    assert fusion_layers(full.drop(4), 0.9, how='swap', n=500).layers == (3,)
    assert fusion_layers(full[full.layer % 2 == 0], 0.9, how='swap', n=500, n_layers=10).layers == (
        2,
    )  # step 2 covers layers 2 and 3
    assert fusion_layers(full.drop([3, 4, 5]), 0.9, how='swap', n=500).layers == ()


def test_datasets_weigh_the_same_and_missing_cells_compare_nothing():
    easy, hard = table(0.5, 0.5, 0.9, 0.9, dataset='easy'), table(0.1, 0.1, 0.3, 0.3, dataset='hard')
    found = fusion_layers(pd.concat([easy, hard]), dict(easy=0.9, hard=0.3), how='swap', n=500)
    assert found.layers == (1,) and found.table['drop'][1] == pytest.approx(0.3)
    flat = pd.concat(
        [table(*[0.9] * 4, dataset='easy'), table(*[0.3] * 4, dataset='hard').iloc[:3]]
    )  # the mean rises at 3, no dataset does
    assert fusion_layers(flat, dict(easy=0.9, hard=0.3), how='swap', n=5000).layers == ()
    with pytest.warns(UserWarning, match="'hard' left out"):
        fusion_layers(
            pd.concat([table(*[0.9] * 8, dataset='easy'), table(0.1, 0.1, dataset='hard')]),
            dict(easy=0.9, hard=0.3),
            how='swap',
            n=500,
        )


def test_without_n_there_is_no_interval():
    found = fusion_layers(table(0.1, 0.1, 0.9), 0.9, how='swap')
    assert found.layers == (1,) and found.table.low.isna().all() and np.isnan(found.confidence[1])
    assert fusion_layers(table(0.1, 0.1, 0.9, n=100), 0.9, how='swap').table.low.notna().all()  # a column n will do


@pytest.mark.parametrize(
    'change, sentence',
    [
        (dict(layer=[0, 1, 28]), 'layer 28 does not exist in a model of 28'),
        (dict(layer=[-1, 0, 1]), 'layer -1 does not exist'),
        (dict(layer=[0, 1, 1.5]), 'layer 1.5'),
        (dict(accuracy=[0.1, 0.2, 120.0]), 'outside 0 to 100'),
        (dict(accuracy=[np.nan] * 3), 'no row'),
        (dict(accuracy=[10.0, 20.0, 30.0]), 'one unit'),
        (dict(how=['zero', 'zero', 'swap']), "'how' holds"),
    ],
)
def test_errors_are_one_sentence(change, sentence):
    for read in (fusion_layers, review_layer):
        with pytest.raises(ValueError, match=sentence) as error:
            read(table(0.1, 0.2, 0.3).assign(**change), 0.9, how='mean', n_layers=28)
        assert '\n' not in str(error.value)


def test_other_errors():
    with pytest.raises(ValueError, match="'layer' is missing"):
        fusion_layers(pd.DataFrame(dict(accuracy=[1.0])), 0.9)
    with pytest.raises(ValueError, match="'b' has no unmasked"):
        fusion_layers(table(0.1, 0.2, dataset='b'), dict(a=0.5))
    with pytest.raises(ValueError, match='rule'):
        fusion_layers(table(0.1), 0.5, rule='magic')
    with pytest.raises(ValueError, match='semantic'):
        fusion_layers(table(0.1), 0.5, how='ablate')
    with pytest.raises(ValueError, match='same sample ids'):
        fusion_layers(samples([0.5])[0], pd.DataFrame(dict(sample=['x'], accuracy=[1.0])))
    with pytest.raises(ValueError, match="how='soft'"):
        fusion.masking_curve(pd.DataFrame(dict(how=['none'], score=[1.0])), 'soft')


# sample rows


def test_pairing_narrows_and_clusters_widen():
    width = lambda curve, base: float(
        (lambda t: t.high - t.low)(fusion_layers(curve, base, how='knockout').table).mean()
    )
    curve, base = samples([0.85, 0.5, 0.85, 0.85])
    assert width(curve, base) < 0.8 * width(
        curve.drop(columns=['sample', 'image']).groupby('layer', as_index=False).mean().assign(n=200), 0.9
    )
    clustered, base = samples([0.85, 0.5, 0.85, 0.85], questions=4)
    assert width(clustered, base) > 1.5 * width(clustered.drop(columns='image'), base)


def test_one_image_proves_nothing():
    curve, base = samples([0.95, 0.1, 0.95], n=12, questions=12)
    curve['accuracy'], base['accuracy'] = (curve.layer != 1).astype(float), 1.0
    assert fusion_layers(curve, base, how='knockout').layers == () and fusion_layers(
        curve.drop(columns='image'), base, how='knockout'
    ).layers == (1,)


def test_incomplete_sweep():
    curve, base = samples([0.9, 0.3, 0.9, 0.9])
    assert fusion_layers(curve[(curve.layer != 1) | (curve['sample'] < 120)], base, how='knockout').layers == (1,)


def test_false_positives_and_coverage():
    p, wrong, inside = [0.2, 0.2, 0.6, 0.6, 0.8, 0.8, 0.8, 0.8], 0, 0
    drops = np.diff([*p, 0.8])  # the truth that `drop` estimates where the curve rises
    for seed in range(40):
        rng = np.random.default_rng(seed)
        curve = pd.concat(
            [
                pd.DataFrame(dict(layer=i, sample=range(150), accuracy=(rng.random(150) < q).astype(float)))
                for i, q in enumerate(p)
            ]
        )
        base = pd.DataFrame(dict(sample=range(150), accuracy=(rng.random(150) < 0.8).astype(float)))
        found = fusion_layers(curve, base, how='swap', seed=seed)
        wrong += not set(found.layers) <= {1, 3}
        inside += all(found.table.low[i] <= drops[i] <= found.table.high[i] for i in (1, 3))
    assert wrong <= 4 and inside >= 36  # 5 % is the target for each


def test_store_table_splits_into_curve_and_base():
    curve, base = samples([0.9, 0.3, 0.9])
    stored = pd.concat(
        [
            curve.assign(how='knockout', scope='single'),
            curve.assign(how='knockout', scope='from'),
            base.assign(how='none', scope='', layer=-1),
        ]
    ).rename(columns=dict(accuracy='score'))
    assert fusion_layers(*fusion.masking_curve(stored, 'knockout', 'single')).layers == (1,)
    with pytest.raises(ValueError, match="'scope' holds"):
        fusion_layers(*fusion.masking_curve(stored, 'knockout'))


def test_the_same_seed_gives_the_same_statement():
    curve, base = samples([0.9, 0.3, 0.85, 0.9])
    a, b, c = (fusion_layers(curve, base, seed=s).table for s in (0, 0, 1))
    assert a.equals(b) and not a.equals(c)


# review


def test_review_layer_by_construction():
    late = (0.1, 0.1, 0.1, 0.1, 0.5, 0.5, 0.9, 0.9, 0.3, 0.9)
    found = review_layer(table(*late), 0.9, n=500)
    assert (
        found.layers == (8,)
        and found.dip[0] == pytest.approx(0.6 / 0.9)
        and found.dip[1] < 0.6 / 0.9 < found.dip[2]
        and found.confidence[8] > 0.99
    )
    assert review_layer(table(*late[:-1]), 0.9, n=500).layers == (8,)  # the base stands behind the last layer
    assert review_layer(table(0.9, 0.9, 0.2, 0.9, 0.9, 0.9, 0.9, 0.9), 0.9, n=500).layers == ()  # a dip, but early
    assert (
        review_layer(table(0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.1, 0.2), 0.9, n=500).layers == ()
    )  # late, but nothing had recovered
    assert review_layer(table(*[0.9] * 7, 0.2, 0.2, 0.9), 0.9, n=500).layers == ()  # not isolated


def test_two_late_dips_are_both_named_the_deeper_first():
    two = (0.1, 0.1, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.4, 0.9, 0.2, 0.9)
    found = review_layer(table(*two), 0.9, n=500)
    assert (
        found.layers == (10, 8)
        and found.dip[0] == pytest.approx(0.7 / 0.9)
        and min(found.confidence[i] for i in (8, 10)) > 0.99
    )
    assert (
        review_layer(table(*two[:8], 0.9, 0.9, 0.2, 0.9), 0.9, n=500).layers == (10,)
        and review_layer(table(*two[:8], *[0.9] * 4), 0.9, n=500).layers == ()
    )
    assert review_layer(table(*two[:8], 0.8, 0.9, 0.8, 0.9), 0.9, n=500).layers == ()  # ripples


@pytest.mark.parametrize('p', [np.linspace(0.1, 0.9, 24), np.linspace(0.9, 0.1, 24), np.linspace(0.0, 0.9, 24) ** 2])
def test_monotone_curves_have_no_review_layer(p):
    assert (
        review_layer(table(*p), 0.9, n=500).layers == ()
        and fusion_layers(table(*p), 0.9, how='zero', rule='paper', n=500).layers == ()
    )


def test_steps_of_a_curve_that_still_rises_are_no_review_layer():
    rising = (0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.5, 0.2, 0.6, 0.9)  # a dip of a third of the base, from half of it
    assert review_layer(table(*rising), 0.9, n=5000).layers == () and review_layer(
        table(*rising[:6], 0.8, 0.5, 0.8, 0.9), 0.9, n=5000
    ).layers == (7,)


def test_a_dip_is_information_only_if_knockout_or_swap_shows_it():
    late, flat = (0.1, 0.1, 0.1, 0.1, 0.5, 0.5, 0.9, 0.9, 0.3, 0.9), (0.9,) * 10
    seen = dict(
        knockout=(*flat[:8], 0.5, 0.9), swap=(*(0.1,) * 5, 0.5, 0.5, 0.5, 0.5, 0.9)
    )  # a dip at 8; a rise from 8 to 9

    def kind(*hows, how='zero'):
        return review_layer(
            pd.concat([table(*late, how='zero'), *(table(*c, how=h) for h, c in hows)]), 0.9, how=how, n=500
        )

    assert (
        kind(('knockout', flat), ('swap', seen['swap'])).kind
        == kind(('knockout', seen['knockout'])).kind
        == 'information'
    )
    assert (
        kind(('knockout', flat), ('swap', (*(0.1,) * 5, *flat[:5]))).kind == 'edit'
        and not kind(('knockout', flat)).note
    )
    assert (
        kind().kind == 'edit' and 'knockout' in kind().note and kind(('mean', late)).kind == 'edit'
    )  # another state edit is no witness
    assert (
        kind(('knockout', seen['knockout']), how='knockout').kind == 'information'
        and kind(('knockout', flat), how='knockout').kind == 'none'
    )
    assert kind(('knockout', flat), how=None).layers == () and kind(
        ('knockout', seen['knockout']), how=None
    ).layers == (8,)  # knockout where it is there, else zero, else what there is
    assert kind(('mean', flat), how=None).layers == (8,) and review_layer(
        table(*late, how='swap'), 0.9, n=500
    ).layers == review_layer(table(*late), 0.9, n=500).layers == (8,)
    found = kind(('knockout', flat))
    assert (
        found.layers == (8,)
        and found.table.set_index('layer').kind[8] == 'edit'
        and (found.table.kind != '').sum() == 1
    )


def test_a_curve_that_never_recovers_is_said_to():
    for p in ([0.1] * 12, [0.1, 0.3] * 6, np.linspace(0, 0.5, 12)):
        found, shallow = (
            review_layer(table(*p), 0.9, n=500),
            fusion_layers(table(*p), 0.9, how='zero', rule='paper', n=500),
        )
        assert (
            found.layers == shallow.layers == ()
            and found.kind == shallow.kind == 'never recovers'
            and 'never recovers' in found.note
            and not found.table.chosen.any()
        )
        assert found.recovered == pytest.approx(max(p[8:]) / 0.9)
    assert review_layer(table(*[0.1] * 10, 0.85, 0.1), 0.9, n=500).kind != 'never recovers'
    assert review_layer(table(0.1, 0.2), 0.9, n=500, n_layers=20).kind == 'none'  # its late layers were not measured


def test_no_more_than_ten_layers():
    teeth = np.tile([0.9, 0.1], 20) + np.arange(40) / 1000
    found = fusion_layers(table(*teeth), 0.9, how='zero', rule='paper', n=1000)
    assert found.layers == tuple(range(1, 20, 2)) and fusion_layers(
        table(*teeth), 0.9, how='zero', rule='paper', n=1000, most=3
    ).layers == (1, 3, 5)


def test_noise_is_no_review_layer():
    assert sum(bool(review_layer(*samples([0.9] * 20, n=60, seed=s)).layers) for s in range(20)) == 0


# the public logs


def quiet(f, *args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # a dataset with three layers is left out
        return f(*args, **kw)


REVIEWS = {
    'LLaVA-1.5-7B': (29,),
    'LLaVA-1.6-vicuna-7B': (29,),
    'Qwen2-VL-7B': (),
    'Qwen2.5-VL-7B': (),
    'InstructBLIP-vicuna-7B': (),
}


@pytest.mark.parametrize('model', REVIEWS)
def test_review_layer_of_real_models(logs, model):
    curve, base, kw = logs(model)
    found = quiet(review_layer, curve, base, rule='paper', **kw)
    assert found.layers == REVIEWS[model]
    assert found.kind == ('edit' if found.layers else 'never recovers' if model.startswith('Instruct') else 'none')


@pytest.mark.parametrize('n', [1000, None])
def test_the_review_of_llava_ranks_above_every_late_dip_of_qwen(logs, n):
    of = lambda model: (lambda c, b, kw: quiet(review_layer, c, b, **kw | dict(n=n)))(*logs(model))
    llava, qwen = [of(m) for m in ('LLaVA-1.5-7B', 'LLaVA-1.6-vicuna-7B')], of('Qwen2-VL-7B')
    assert min(found.dip[0] for found in llava) > 3 * qwen.table['drop'].max()
    if n:
        assert min(found.dip[1] for found in llava) > qwen.table.high.max() and min(
            f.confidence[29] for f in llava
        ) > 0.99 > max(qwen.confidence.values())


@pytest.mark.parametrize('model', ['LLaVA-1.5-7B', 'LLaVA-1.6-vicuna-7B'])
@pytest.mark.parametrize('n', [1000, None])
def test_fusion_layers_of_real_models(logs, model, n):
    curve, base, kw = logs(model)
    found = quiet(fusion_layers, curve, base, how='zero', rule='paper', **kw | dict(n=n))
    relative = (curve.accuracy / curve.dataset.map(base)).groupby(curve.layer).mean()
    assert 0 < len(found.layers) <= 10 and max(found.layers) <= 0.6 * 32
    assert jaccard(found.layers, PAPER) > max(jaccard(range(18), PAPER), jaccard(relative.nsmallest(8).index, PAPER))


@pytest.mark.parametrize('model', REVIEWS)
def test_at_most_ten_layers_and_none_deep(logs, model):
    curve, base, kw = logs(model)
    found = quiet(fusion_layers, curve, base, how='zero', rule='paper', **kw)
    assert len(found.layers) <= 10 and all(i <= 0.6 * kw['n_layers'] for i in found.layers)
    assert (found.kind == 'never recovers') == model.startswith('Instruct')


@pytest.mark.parametrize('model', REVIEWS)
def test_statements_hold_without_any_one_dataset_and_under_noise(logs, model):
    "The marks were set with these logs in view: this says how near to an edge they are"
    curve, base, kw = logs(model)
    whole, rng, full = (
        quiet(review_layer, curve, base, **kw),
        np.random.default_rng(0),
        [d for d in base if (curve.dataset == d).sum() > 3],
    )
    parts = [(curve[curve.dataset != d], kw) for d in full if len(full) > 1]
    parts += [
        (curve.assign(accuracy=100 * rng.binomial(100, curve.accuracy / 100) / 100), kw | dict(n=100)) for _ in range(5)
    ]
    for part, more in parts:
        found, shallow = (
            quiet(review_layer, part, base, **more),
            quiet(fusion_layers, part, base, how='zero', rule='paper', **more),
        )
        assert (found.layers, found.kind) == (whole.layers, whole.kind) and len(shallow.layers) <= 10
        if found.layers:
            assert jaccard(shallow.layers, PAPER) > max(0.5, jaccard(range(18), PAPER))


def test_rows_of_layers_that_do_not_exist(logs):
    curve, base, kw = logs('Qwen2-VL-7B')
    with pytest.raises(ValueError, match='layer 31 does not exist in a model of 28 decoder layers'):
        review_layer(pd.concat([curve, curve.tail(1).assign(layer=31)]), base, **kw)
