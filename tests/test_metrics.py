"Scores, intervals and tests: known answers, naive twins, and intervals that cover"

import gzip, json, re, string
from itertools import product
from math import comb
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from fusion_notebooks import metrics

FIXTURES = Path(__file__).parent / 'fixtures/metrics'


def recorded(name):
    "What a reference implementation answered; the file names the repository, the commit and the file, and says how it was run"
    return json.loads(gzip.decompress((FIXTURES / f'{name}.json.gz').read_bytes()))


@pytest.mark.parametrize('name', ['vqa', 'vqa-evalai', 'anls', 'gqa', 'mmbench'])
def test_score_equals_its_reference(name):
    r = recorded(name)
    predictions, answers, want = zip(*(c[:3] for c in r['cases']))
    assert len(want) >= 1000 and re.fullmatch('[0-9a-f]{40}', r['commit']) and 0.1 < np.mean(want) < 0.9
    got = metrics.score(name, predictions, answers)
    wrong = np.flatnonzero(np.abs(got - want) > 1e-12)
    assert not len(wrong), f'{len(wrong)} differ, first {r["cases"][wrong[0]]}: {got[wrong[0]]}'


@pytest.mark.parametrize('name', ['vqa', 'vqa-evalai', 'anls', 'gqa'])
def test_recorded_cases_are_hard(name):
    texts = [t for p, a, *_ in recorded(name)['cases'] for t in (p, *a)]
    for kind in ("dont", "don't", 'the ', 'two', '1,000', 'é', '日本', '😀', '"', '-'):
        assert any(kind in t.lower() for t in texts), kind
    assert (
        '' in texts
        and max(map(len, texts)) > 1000
        and (name in ('anls', 'gqa') or any(t.count('.') > 40 for t in texts))
    )


def test_gqa_against_lmms_eval():
    "lmms-eval drops all punctuation, the paper's rule only final periods: the same where there is no other"
    cases = [
        c for c in recorded('gqa')['cases'] if not set(c[0].strip().rstrip('.') + c[1][0]) & set(string.punctuation)
    ]
    assert len(cases) > 900 and all(official == theirs for _, _, official, theirs in cases)
    other = metrics.score('gqa', ['t shirt', 'yes!'], ['t-shirt', 'yes'])
    assert other.tolist() == [0, 0]


def test_letter_equals_its_reference():
    cases = recorded('mmbench')['cases']
    assert [metrics.letter(p, a[1:]) for p, a, *_ in cases] == [c[3] for c in cases] and {c[3] for c in cases} == {
        *'ABCDEZ',
        '',
    }


def test_circular_equals_its_reference():
    groups = recorded('circular')['cases']
    rows = [(g, *row) for g, (rows, _) in enumerate(groups) for row in rows]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]  # the order of the rows does not matter
    got = metrics.circular(metrics.score('mmbench', [r[1] for r in rows], [r[2] for r in rows]), [r[0] for r in rows])
    assert len(groups) >= 1000 and [got[g] for g in range(len(groups))] == [hit for _, hit in groups]
    with pytest.raises(ValueError, match='1 groups for 2'):
        metrics.circular([1, 0], ['a'])


def test_pope_equals_its_reference():
    r = recorded('pope')
    texts, labels, yes = zip(*r['cases'])
    assert len(texts) >= 1000 and metrics.score('pope', texts, labels).tolist() == [
        float((l == 'yes') == y) for l, y in zip(labels, yes)
    ]
    for first, end, want in r['totals']:
        assert np.allclose(list(metrics.pope(texts[first:end], labels[first:end]).values()), want, atol=1e-12)
    never = metrics.pope(['no', 'no'], ['no', 'no'])
    assert never['accuracy'] == 1 and never['yes_ratio'] == 0 and np.isnan(never['precision']) and np.isnan(never['f1'])


def test_vqa_by_hand():
    "Left-out answerers who said cats leave 3 that agree, those who said dogs leave 2"
    answers = ['2 dogs'] * 3 + ['cats'] * 7
    assert metrics.score('vqa', ['the two dogs'], [answers])[0] == pytest.approx((7 * 1 + 3 * 2 / 3) / 10)
    assert metrics.score('vqa', ['the two dogs', '2 dogs'], [['two dogs'] * 10, ['2 dogs'] * 10]).tolist() == [
        0,
        1,
    ]  # all alike: not normalised
    assert metrics.score('vqa-evalai', ['the two dogs'], [['two dogs'] * 10])[0] == 1
    assert metrics.score('vqa', ['aisle'], [['isle', 'Aisle.'] * 5]).tolist() == [1]


def test_distance_naive():
    rng = np.random.default_rng(0)
    for _ in range(100):
        a, b = (''.join(rng.choice(list('abc'), rng.integers(0, 7))) for _ in range(2))
        d = np.zeros((len(a) + 1, len(b) + 1), int)
        d[:, 0], d[0] = range(len(a) + 1), range(len(b) + 1)
        for i, j in product(range(len(a)), range(len(b))):
            d[i + 1, j + 1] = min(d[i, j + 1] + 1, d[i + 1, j] + 1, d[i, j] + (a[i] != b[j]))
        assert metrics.scores._distance(a, b) == d[-1, -1]


def test_lenient_takes_any_word_of_any_answer():
    "No reference implementation is published: derived by hand from the rule of the public logs"
    assert metrics.score(
        'lenient', ['A red, big car.', 'the sky', 'it'], [['red'], ['blue', 'grey sky'], ['kite']]
    ).tolist() == [1, 1, 0]
    assert metrics.score('lenient', ['', 'RED!', 'reddish'], [['red']] * 3).tolist() == [0, 1, 0]


def test_score_refuses():
    with pytest.raises(ValueError, match='choose one of vqa, vqa-evalai, anls, gqa, mmbench, pope, lenient'):
        metrics.score('bleu', ['a'], ['a'])
    with pytest.raises(ValueError, match='1 predictions for 2'):
        metrics.score('gqa', ['a'], ['a', 'b'])
    with pytest.raises(ValueError, match='prediction 1 is nan'):
        metrics.score('gqa', ['a', np.nan], ['a', 'b'])
    for name, bad in dict(vqa='red', gqa=[], anls=[1], mmbench=('B', 'only A'), pope='maybe', lenient=None).items():
        with pytest.raises(ValueError, match=f'reference 1 is .*{name} takes'):
            metrics.score(name, ['no', 'no'], [dict(vqa=['a', 'b'], mmbench=('A', 'x', 'y')).get(name, ['no']), bad])
    assert all(metrics.score(name, [], []).shape == (0,) for name in metrics.METRICS)
    assert metrics.score('gqa', ['a'], [np.array(['a'])]).tolist() == [1]  # as Parquet gives lists back


def test_log_odds():
    p = np.array([1e-6, 0.2, 0.5, 0.99])
    assert np.allclose(metrics.log_odds(np.log(p)), np.log(p / (1 - p))) and metrics.log_odds(0.0) == pytest.approx(
        9.21
    )
    assert np.isfinite(metrics.log_odds(-800.0))


@pytest.mark.parametrize('n, p', [(12, 0.5), (40, 0.8), (200, 0.95)])
def test_interval_covers(n, p):
    rng = np.random.default_rng(0)
    hits = sum(low <= p <= high for low, high in (metrics.interval(rng.random(n) < p)[1:] for _ in range(300)))
    assert 270 <= hits  # 285 expected


def test_interval_covers_with_clusters_and_would_not_without():
    rng, ids, hits = np.random.default_rng(0), np.repeat(np.arange(40), 5), np.zeros(2)
    for _ in range(200):
        values = np.repeat(rng.normal(0, 1, 40), 5) + rng.normal(0, 0.3, 200)
        hits += [(lambda t: t[1] <= 0 <= t[2])(metrics.interval(values, c)) for c in (ids, None)]
    assert hits[0] >= 180 and hits[1] < 150


def test_interval_edges():
    assert np.isnan(metrics.interval([])).all() and np.isnan(metrics.interval([np.nan])).all()
    mean, low, high = metrics.interval([1.0] * 20)
    assert mean == high == 1 and 1 - low == pytest.approx(3.8416 / 23.8416, abs=1e-3)  # Wilson at 20 of 20
    assert metrics.interval([0.3] * 20, graded=True) == (pytest.approx(0.3),) * 3
    assert metrics.interval([1, 0, np.nan, 1])[0] == pytest.approx(2 / 3)
    assert metrics.interval([0, 1, 1], ['a'] * 3)[1:] == (0, 1)  # one picture
    assert metrics.interval([0, 1] * 20, seed=3) == metrics.interval([0, 1] * 20, seed=3)
    with pytest.raises(ValueError, match='one per value'):
        metrics.interval([1, 2], [1])


def test_mcnemar_is_the_binomial_tail():
    for won, lost in [(9, 1), (5, 5), (12, 3), (0, 4)]:
        a, b = np.repeat([1, 0, 1], [won, lost, 30]), np.repeat([0, 1, 1], [won, lost, 30])
        k, n = max(won, lost), won + lost
        assert metrics.paired(a, b)[3] == pytest.approx(min(1, 2 * sum(comb(n, i) for i in range(k, n + 1)) / 2**n))
    assert metrics.paired([1, 0, 1], [1, 0, 1])[3] == 1


def test_sign_flip_is_exact_for_few_clusters():
    rng = np.random.default_rng(0)
    d, ids = rng.normal(0.3, 1, 16), np.repeat(np.arange(8), 2)
    sums = d.reshape(8, 2).sum(1)
    naive = np.mean([abs(np.dot(s, sums)) >= abs(sums.sum()) - 1e-9 for s in product([1, -1], repeat=8)])
    assert metrics.paired(d, np.zeros(16), ids)[3] == pytest.approx(naive)


def test_paired_keeps_its_level_and_its_sign():
    rng = np.random.default_rng(0)
    p = [metrics.paired(rng.normal(0, 1, 30), np.zeros(30))[3] for _ in range(200)]
    assert np.mean(np.array(p) < 0.05) < 0.1 and np.mean(p) == pytest.approx(0.5, abs=0.08)
    difference, low, high, p = metrics.paired([1] * 30 + [0] * 30, [0] * 20 + [1] * 10 + [0] * 30)
    assert difference == pytest.approx(1 / 3) and 0 < low < difference < high and p < 1e-4
    difference, low, high, p = metrics.paired([1, 0] * 10, [1, 0] * 10)
    assert difference == 0 and low < 0 < high and p == 1  # no difference seen is not no difference
    with pytest.raises(ValueError, match='same samples'):
        metrics.paired([1], [1, 0])


def test_paired_0_1_on_shared_pictures_flips_whole_pictures():
    a, b, ids = np.ones(20), np.zeros(20), np.repeat(np.arange(4), 5)
    assert metrics.paired(a, b)[3] == pytest.approx(2 / 2**20) and metrics.paired(a, b, ids)[3] == pytest.approx(
        2 / 2**4
    )


def test_holm_naive():
    p = np.random.default_rng(0).random(9) ** 3
    naive = [max(min(1, (9 - sum(p < q)) * q) for q in p[p <= r]) for r in p]
    assert np.allclose(metrics.holm(p), naive)
    assert np.allclose(metrics.holm([0.01, np.nan, 0.02]), [0.02, np.nan, 0.02], equal_nan=True) and metrics.holm(
        []
    ).shape == (0,)


def test_curve():
    table = pd.DataFrame(
        [
            dict(
                sample=s,
                image=s // 2,
                layer=i,
                how=how,
                scope='',
                score=float((s + i) % 3 > 0),
                logp=-0.1 * i,
                kind='ab'[s % 2],
            )
            for s in range(30)
            for how, layers in (('zero', (0, 1, 2)), ('none', (-1,)))
            for i in layers
        ]
    )
    curve = metrics.curve(table)
    assert (
        list(curve.columns) == ['layer', 'how', 'scope', 'accuracy', 'low', 'high', 'n']
        and len(curve) == 4
        and (curve.n == 30).all()
    )
    for row in curve.itertuples():
        part = table[(table.layer == row.layer) & (table.how == row.how)]
        assert (row.accuracy, row.low, row.high) == metrics.interval(part.score, part.image)
    assert len(metrics.curve(table, by='kind')) == 8 and 'logp' in metrics.curve(table, 'logp')
    with pytest.raises(ValueError, match="'dataset' is missing"):
        metrics.curve(table, by=['dataset'])
