"The sweep equals one forward per edit, for every semantic and scope"

import pytest, torch
from fusion_notebooks.hooks import edit
from fusion_notebooks.hooks import mean_states, visual_states
from fusion_notebooks.masking import scoped, sweep

KEYS = ['sample', 'how', 'scope', 'layer']


def same(a, b):
    both = a.merge(b, on=KEYS, suffixes=('', '_b'))
    assert len(both) == len(a) == len(b)
    assert (both.prediction == both.prediction_b).all()
    assert (both.logp - both.logp_b).abs().max() < 1e-5 * max(1, both.logp.abs().max())


@pytest.mark.parametrize('scope', ['single', 'from', 'window'])
def test_fast_equals_naive(tiny, samples, scope):
    hows = ('knockout', 'soft') if scope != 'single' else ('zero', 'mean', 'swap', 'knockout', 'soft')
    mean = mean_states(tiny, samples)
    fast, naive = (
        sweep(tiny, samples[:2], hows, scope, mean=mean, exact=e, layers=[0, 3, 7], donors=samples[1:])
        for e in ('auto', 'naive')
    )
    same(fast, naive)
    assert fast.groupby('how').path.first().to_dict() == {
        h: 'bank' if h in ('zero', 'mean') else 'plain' if h == 'none' else 'branches' for h in (*hows, 'none')
    } and set(naive.path) == {'plain', 'naive'}
    edited = fast[fast.how != 'none']
    assert edited.groupby(['how', 'layer']).logp.std().notna().all()
    base = fast[fast.how == 'none'].set_index('sample').logp
    assert ((edited.logp - edited['sample'].map(base)).abs() > 1e-4).all()  # every edit moves the answer


def test_sweep_equals_hooks_by_hand(tiny, samples):
    "One row of the table, recomputed with nothing but `edit`"
    s, donor = samples[0], samples[1]
    table = sweep(tiny, [s], ('knockout', 'swap'), layers=[2], donors=[donor]).set_index('how')
    p = tiny.prompt(s.image, s.question)
    base = tiny.answer(p)
    states = visual_states(tiny, tiny.prompt(donor.image, s.question))
    for how, kw in dict(knockout={}, swap=dict(states=states)).items():
        with edit(tiny, 2, p.visual, how, **kw):
            lp = tiny.answer_logits(p, base.ids)[0]
            assert tiny.answer(p).text == table.loc[how, 'prediction']
        assert abs(sum(lp[t, i].item() for t, i in enumerate(base.ids)) - table.loc[how, 'logp']) < 1e-4


def test_swap_at_layer_0_is_the_donor(tiny, samples):
    "With the donor's states from layer 0 on, the prediction is the donor image's own"
    s, donor = samples[0], samples[1]
    got = sweep(tiny, [s], 'swap', layers=[0], donors=[donor]).set_index('how').prediction['swap']
    assert got == tiny.answer(donor.image, s.question).text != tiny.answer(s.image, s.question).text


def test_mean_states_hold_no_single_image(tiny, samples):
    m = mean_states(tiny, samples)
    by_hand = torch.stack([visual_states(tiny, tiny.prompt(s.image, s.question)) for s in samples]).mean((0, 2))
    assert (m - by_hand).abs().max() < 1e-5


def test_scopes(tiny):
    assert scoped(tiny, 2, 'single') == [2] and scoped(tiny, 5, 'from') == [5, 6, 7]
    assert (
        scoped(tiny, 0, 'window') == [0, 1]
        and scoped(tiny, 4, 'window') == [3, 4, 5]
        and scoped(tiny, 4, 'window', 4) == [2, 3, 4, 5]
    )


def test_refusals(tiny, samples):
    for kw, word in (
        (dict(how='zap'), 'No edit'),
        (dict(scope='all'), 'scope is'),
        (dict(layers=8), 'no layer 8'),
        (dict(how='mean'), 'needs mean'),
        (dict(exact='fast'), 'exact is'),
        (dict(how='swap'), 'another picture'),
    ):
        with pytest.raises(ValueError, match=word):
            sweep(tiny, samples[:1], **kw)
