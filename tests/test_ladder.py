"The ladder equals one forward per edit in every kind of model, and says where it cannot be used"
import pytest, torch
from conftest import noise_image
from fusion_notebooks import masking, mllm as room
from fusion_notebooks.contrast import refine
from fusion_notebooks.hooks import early_exit, edit
from fusion_notebooks.masking import Facts, answer_of, bank, exits, facts, mean_states, record, stems, sweep
from fusion_notebooks.mllm import Kept, Sample
from test_masking import same
from twins import FAMILIES, family as twin

HOWS = ('zero', 'mean', 'swap', 'knockout', 'soft')
SAMPLES = [Sample(noise_image(k, (96, 48)), q, id=f's{k}') for k, q in enumerate(('What color is the circle?', 'Which digit?', 'Name the shape of the object at the top left.'))]
SHARED, TILES = ('bank', 'ladder'), ('resume', 'ladder')
EXPECT = dict(                                   # facts, then the paths of zero and of knockout at the last layer
    llava=(Facts(True, True, 0, True), SHARED), llava_next=(Facts(True, True, 0, True), SHARED), vipllava=(Facts(True, True, 0, True), SHARED), llava_onevision=(Facts(True, True, 0, True), SHARED),
    instructblip=(Facts(True, True, 0, False), ('naive', 'naive')), internvl=(Facts(True, True, 0, True), SHARED), gemma3=(Facts(True, False, 0, True), SHARED), idefics3=(Facts(True, True, 0, True), TILES), smolvlm=(Facts(True, True, 0, True), SHARED),
    paligemma=(Facts(False, False, 0, True), ('resume', 'resume')), mllama=(Facts(False, False, 4, False), ('naive', 'naive')), qwen2_vl=(Facts(True, True, 0, True), SHARED), qwen2_5_vl=(Facts(True, True, 0, True), SHARED),
    qwen3_vl=(Facts(True, True, 2, True), SHARED))

@pytest.fixture(scope='module', params=FAMILIES)
def family(request): return twin(request.param)

@pytest.fixture(scope='module')
def mean(family): return mean_states(family, SAMPLES)

def close(a, b): assert a.ids == b.ids and abs(a.logp - b.logp) < 1e-5*max(1, abs(b.logp))

def test_what_may_be_shared_is_found(family): assert facts(family, family.prompt(SAMPLES[0].image, SAMPLES[0].question)) == EXPECT[family.name][0]

@pytest.mark.parametrize('scope', ['single', 'from', 'window'])
def test_every_family_equals_naive(family, mean, scope):
    hows = HOWS if scope == 'single' else ('knockout', 'soft')
    layers = None if scope == 'single' else [0, 2]
    fast, naive = (sweep(family, SAMPLES, hows, scope, layers, mean=mean, exact=e, limit=4) for e in ('auto', 'naive'))
    same(fast, naive)
    edited, base = fast[fast.how != 'none'], fast[fast.how == 'none'].set_index('sample').logp
    assert ((edited.logp - edited['sample'].map(base)).abs() > 1e-4).mean() > .8       # the edits matter
    path = fast.set_index(['sample', 'how', 'layer']).path
    if scope == 'single':
        assert (path['s0', 'zero', 3], path['s1', 'knockout', 3]) == EXPECT[family.name][1]
        if family.name == 'qwen3_vl': assert path['s0', 'zero', 1] == path['s0', 'swap', 1] == 'naive' and path['s0', 'zero', 2] == 'bank' and path['s0', 'knockout', 0] == 'ladder'

def test_resume_equals_naive(family, mean):
    if not facts(family, family.prompt(SAMPLES[0].image, SAMPLES[0].question)).plain: return
    fast, naive = (sweep(family, SAMPLES[:2], HOWS, mean=mean, layers=[1, 3], exact=e, limit=3) for e in ('resume', 'naive'))
    same(fast, naive)
    assert 'resume' in set(fast.path)

def test_exits_equal_early_exit(family):
    p = family.prompt(SAMPLES[0].image, SAMPLES[0].question)
    seen = record(family, p)
    close(answer_of(family, seen, 4), family.answer(p, max_new_tokens=4))
    for i, a in enumerate(exits(family, seen, limit=4)):
        with early_exit(family, i): close(a, family.answer(p, max_new_tokens=4))

def test_crop_reuses_what_it_can(family):
    s = SAMPLES[0]
    if family.takes_one: return
    try: r = refine(family, s.image, s.question, box=(10, 10, 30, 30), by='oracle')
    except ValueError as e: return pytest.skip(str(e))                                 # no place for the tokens, so no box
    close(r.answer, family.answer([s.image, r.crop], s.question))
    print(family.name, r.path)

def test_mask_equals_two_passes(family):
    s = SAMPLES[1]
    p = family.prompt(s.image, s.question)
    r = refine(family, s.image, s.question, how='mask', review=3, post=2)
    with edit(family, 3, p.visual[r.tokens], 'zero'): close(r.answer, family.answer(p))
    assert r.path == 'one pass' and len(r.tokens) == round(.2*len(p.visual))
