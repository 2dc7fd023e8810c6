"Estimators against models whose fusion layers are true by construction"

from pathlib import Path
import pytest
from fusion_notebooks import demo, fusion, masking, metrics
from fusion_notebooks.mllm import MLLM

PLANTED = sorted(p.parent.name for p in (Path(__file__).parents[1] / 'data/models').glob('*/gate.safetensors'))

ASKED = {s.id: s for s in demo.samples(200)}


def test_there_are_planted_models():
    assert PLANTED


@pytest.fixture(scope='module', params=PLANTED)
def known(request):
    "A planted model's gate and its masking rows: 200 samples, every layer under knockout and swap"
    mllm = MLLM.load(request.param)
    mllm.gate.sinks = None  # with noise: see the last test
    rows = masking.sweep(mllm, list(ASKED.values()), how=['knockout', 'swap'])
    return mllm, rows.assign(score=metrics.score('gqa', rows.prediction, [ASKED[i].answers for i in rows['sample']]))


@pytest.mark.parametrize('how', ['knockout', 'swap'])
def test_every_open_layer_and_no_decoy_is_named(known, how):
    mllm, rows = known
    gate, found = mllm.gate, fusion.fusion_layers(*fusion.masking_curve(rows, how), how=how)
    assert set(gate.open) <= set(found.layers) and not set(gate.decoy_layers) & set(found.layers), (gate, found.layers)
    assert fusion.agreement(found, gate.open, gate.decoy_layers) == dict(precision=1.0, recall=1.0, exact=1.0)
    assert min(found.confidence[i] for i in gate.open) > 0.9


def test_closed_layers_are_named_by_nobody(known):
    mllm, rows = known
    for how in ('knockout', 'swap'):
        assert not set(mllm.gate.closed) & set(fusion.fusion_layers(*fusion.masking_curve(rows, how), how=how).layers)


def test_the_late_hop_is_the_review(known):
    "For the questions that need it"
    mllm, rows = known
    late, needs = tuple(i for i in mllm.gate.open if i > fusion.LATE * mllm.n_layers), demo.reads_at
    rows = rows[
        [
            not late or set(late) <= set(needs(s.kind, s.question, mllm.gate.open))
            for s in map(ASKED.get, rows['sample'])
        ]
    ]
    found = fusion.review_layer(*fusion.masking_curve(rows, ['knockout', 'swap']), how='knockout')
    assert found.layers == late and found.kind == ('information' if late else 'none')


def test_a_decoy_is_looked_at_all_the_same(known):
    "What makes it a decoy: attention goes to visual tokens there"
    from fusion_notebooks import hooks

    mllm, sample = known[0], demo.samples(1)[0]
    p = mllm.prompt(sample.image, sample.question)
    with hooks.capture(mllm) as cache:
        mllm.model(**p.inputs, use_cache=False)
    mass = cache.attention[0, :, 0].sum(-1)
    assert all(mass[i] > 0.01 for i in (*mllm.gate.open, *mllm.gate.decoys)) and all(
        mass[i] < 1e-3 for i in mllm.gate.closed
    )


def test_noise_misleads_the_knockout_and_not_the_swap():
    "Closing a layer whose attention goes to sinks sends it elsewhere: that costs, though nothing of the picture is read there"
    mllm = MLLM.load('planted-noise')
    mllm.gate.sinks = 'flat'
    rows = masking.sweep(mllm, list(ASKED.values()), how=['knockout', 'swap'])
    rows = rows.assign(score=metrics.score('gqa', rows.prediction, [ASKED[i].answers for i in rows['sample']]))
    named = {h: set(fusion.fusion_layers(*fusion.masking_curve(rows, h), how=h).layers) for h in ('knockout', 'swap')}
    assert named['swap'] == set(mllm.gate.open) and 0 in named['knockout'], named
