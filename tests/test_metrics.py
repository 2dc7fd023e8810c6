"Scores, intervals and tests: known answers, naive twins, and intervals that cover"
import numpy as np
import pandas as pd
import pytest
from itertools import product
from math import comb
from fusion_notebooks import metrics

def test_gqa_is_exact_match():
    texts = ['Red.', ' red ', 'RED', 'red car', 'red..', '', 'reddish']
    assert metrics.score('gqa', texts, [['blue', 'Red']]*7).tolist() == [1, 1, 1, 0, 0, 0, 0]

def test_lenient_takes_any_word_of_any_answer():
    assert metrics.score('lenient', ['A red, big car.', 'the sky', 'it'], [['red'], ['blue', 'grey sky'], ['kite']]).tolist() == [1, 1, 0]

def test_score_refuses():
    with pytest.raises(ValueError, match='choose one of gqa, lenient'): metrics.score('bleu', ['a'], ['a'])
    with pytest.raises(ValueError, match='1 predictions for 2'): metrics.score('gqa', ['a'], ['a', 'b'])
    assert metrics.score('gqa', [], []).shape == (0,)

def test_log_odds():
    p = np.array([1e-6, .2, .5, .99])
    assert np.allclose(metrics.log_odds(np.log(p)), np.log(p/(1 - p))) and metrics.log_odds(0.) == pytest.approx(9.21)
    assert np.isfinite(metrics.log_odds(-800.))

@pytest.mark.parametrize('n, p', [(12, .5), (40, .8), (200, .95)])
def test_interval_covers(n, p):
    rng = np.random.default_rng(0)
    hits = sum(low <= p <= high for low, high in (metrics.interval(rng.random(n) < p)[1:] for _ in range(300)))
    assert 270 <= hits                                                       # 285 expected

def test_interval_covers_with_clusters_and_would_not_without():
    rng, ids, hits = np.random.default_rng(0), np.repeat(np.arange(40), 5), np.zeros(2)
    for _ in range(200):
        values = np.repeat(rng.normal(0, 1, 40), 5) + rng.normal(0, .3, 200)
        hits += [(lambda t: t[1] <= 0 <= t[2])(metrics.interval(values, c)) for c in (ids, None)]
    assert hits[0] >= 180 and hits[1] < 150

def test_interval_edges():
    assert np.isnan(metrics.interval([])).all() and np.isnan(metrics.interval([np.nan])).all()
    mean, low, high = metrics.interval([1.]*20)
    assert mean == high == 1 and 1 - low == pytest.approx(3.8416/23.8416, abs=1e-3)   # Wilson at 20 of 20
    assert metrics.interval([.3]*20, graded=True) == (pytest.approx(.3),)*3
    assert metrics.interval([1, 0, np.nan, 1])[0] == pytest.approx(2/3)
    assert metrics.interval([0, 1, 1], ['a']*3)[1:] == (0, 1)                             # one picture
    assert metrics.interval([0, 1]*20, seed=3) == metrics.interval([0, 1]*20, seed=3)
    with pytest.raises(ValueError, match='one per value'): metrics.interval([1, 2], [1])

def test_mcnemar_is_the_binomial_tail():
    for won, lost in [(9, 1), (5, 5), (12, 3), (0, 4)]:
        a, b = np.repeat([1, 0, 1], [won, lost, 30]), np.repeat([0, 1, 1], [won, lost, 30])
        k, n = max(won, lost), won + lost
        assert metrics.paired(a, b)[3] == pytest.approx(min(1, 2*sum(comb(n, i) for i in range(k, n + 1))/2**n))
    assert metrics.paired([1, 0, 1], [1, 0, 1])[3] == 1

def test_sign_flip_is_exact_for_few_clusters():
    rng = np.random.default_rng(0)
    d, ids = rng.normal(.3, 1, 16), np.repeat(np.arange(8), 2)
    sums = d.reshape(8, 2).sum(1)
    naive = np.mean([abs(np.dot(s, sums)) >= abs(sums.sum()) - 1e-9 for s in product([1, -1], repeat=8)])
    assert metrics.paired(d, np.zeros(16), ids)[3] == pytest.approx(naive)

def test_paired_keeps_its_level_and_its_sign():
    rng = np.random.default_rng(0)
    p = [metrics.paired(rng.normal(0, 1, 30), np.zeros(30))[3] for _ in range(200)]
    assert np.mean(np.array(p) < .05) < .1 and np.mean(p) == pytest.approx(.5, abs=.08)
    difference, low, high, p = metrics.paired([1]*30 + [0]*30, [0]*20 + [1]*10 + [0]*30)
    assert difference == pytest.approx(1/3) and 0 < low < difference < high and p < 1e-4
    difference, low, high, p = metrics.paired([1, 0]*10, [1, 0]*10)
    assert difference == 0 and low < 0 < high and p == 1                                   # no difference seen is not no difference
    with pytest.raises(ValueError, match='same samples'): metrics.paired([1], [1, 0])

def test_paired_0_1_on_shared_pictures_flips_whole_pictures():
    a, b, ids = np.ones(20), np.zeros(20), np.repeat(np.arange(4), 5)
    assert metrics.paired(a, b)[3] == pytest.approx(2/2**20) and metrics.paired(a, b, ids)[3] == pytest.approx(2/2**4)

def test_holm_naive():
    p = np.random.default_rng(0).random(9)**3
    naive = [max(min(1, (9 - sum(p < q))*q) for q in p[p <= r]) for r in p]
    assert np.allclose(metrics.holm(p), naive)
    assert np.allclose(metrics.holm([.01, np.nan, .02]), [.02, np.nan, .02], equal_nan=True) and metrics.holm([]).shape == (0,)

def test_curve():
    table = pd.DataFrame([dict(sample=s, image=s//2, layer=i, how=how, scope='', score=float((s + i) % 3 > 0), logp=-.1*i, kind='ab'[s % 2])
                          for s in range(30) for how, layers in (('zero', (0, 1, 2)), ('none', (-1,))) for i in layers])
    curve = metrics.curve(table)
    assert list(curve.columns) == ['layer', 'how', 'scope', 'accuracy', 'low', 'high', 'n'] and len(curve) == 4 and (curve.n == 30).all()
    for row in curve.itertuples():
        part = table[(table.layer == row.layer) & (table.how == row.how)]
        assert (row.accuracy, row.low, row.high) == metrics.interval(part.score, part.image)
    assert len(metrics.curve(table, by='kind')) == 8 and 'logp' in metrics.curve(table, 'logp')
    with pytest.raises(ValueError, match="'dataset' is missing"): metrics.curve(table, by=['dataset'])
