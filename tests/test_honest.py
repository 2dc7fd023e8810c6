"Hooks do what they say, or refuse in a sentence: compiled forwards, other kernels, batches of one's own, threads, odd values"

import copy
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusion_notebooks import baselines, contrast, demo, hooks, masking
from fusion_notebooks.hooks import capture, edit
from fusion_notebooks.mllm import MLLM, Sample

EX, Q = 'data/example.png', 'Which digit is on the purple star?'
HOWS = 'zero', 'knockout', 'soft'


@pytest.fixture(scope='module')
def m():
    return MLLM.load('glyph-llava')


@pytest.fixture(scope='module')
def p(m):
    return m.prompt(EX, Q)


def last(m, inputs):
    with torch.inference_mode():
        return m.model(**inputs, use_cache=False).logits[:, -1]


@pytest.fixture(scope='module')
def edited(m, p):
    "how → logits under the edit, as the plain model gives them"
    found = {}
    for how in HOWS:
        with edit(m, 3, p.visual, how):
            found[how] = last(m, p.inputs)
    plain = last(m, p.inputs)
    assert all((x - plain).abs().max() > 1e-2 for x in found.values())
    return found


@pytest.mark.parametrize('compiled', ['model', 'decoder', 'layer', 'in place'])
def test_a_compiled_forward_does_not_swallow_edits(compiled, edited):
    "knockout and zero both returned the plain answer"
    m = MLLM.load('glyph-llava')
    p = m.prompt(EX, Q)
    module = dict(model=m.model, decoder=m.decoder, layer=m.layers[3]).get(compiled, m.model)
    if compiled == 'in place':
        module.compile(backend='eager')
    else:
        module.forward = torch.compile(module.forward, backend='eager')
    plain = last(m, p.inputs)  # traced without hooks
    for how, want in edited.items():
        with edit(m, 3, p.visual, how):
            assert (last(m, p.inputs) - want).abs().max() < 1e-4
    with capture(m) as cache:
        assert (last(m, p.inputs) - plain).abs().max() < 1e-4
    assert torch.isfinite(cache.attention).all()
    table = masking.sweep(m, [Sample(EX, Q, id='a')], 'knockout', layers=[3])
    assert table.path.tolist() == ['plain', 'naive'] and table.logp[0] != table.logp[1]


@pytest.mark.parametrize('kernel', ['flex_attention', 'eager'])
def test_other_kernels(kernel, edited):
    m = MLLM.load('glyph-llava')
    p = m.prompt(EX, Q)
    try:
        m.model.set_attn_implementation({'text_config': kernel})
        last(m, p.inputs)
    except Exception as e:
        pytest.skip(f'{kernel} does not run here: {e}'[:100])
    for how, want in edited.items():
        with edit(m, 3, p.visual, how):
            assert (last(m, p.inputs) - want).abs().max() < 1e-4
    assert m.model.config.get_text_config()._attn_implementation == kernel


def flash_like(module, query, key, value, attention_mask, scaling=None, **kw):
    "A kernel that reads a mask of two dimensions, and no other"
    assert attention_mask is None or attention_mask.ndim == 2
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=query.shape[2] > 1, scale=scaling, enable_gqa=True
    ).transpose(1, 2).contiguous(), None


def test_a_kernel_that_takes_no_mask(edited):
    "With such a kernel knockout equalled soft"
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register('flash_like', flash_like)
    AttentionMaskInterface.register('flash_like', ALL_MASK_ATTENTION_FUNCTIONS['flash_attention_2'])
    m = MLLM.load('glyph-llava')
    p = m.prompt(EX, Q)
    m.model.config.get_text_config()._attn_implementation_internal = 'flash_like'
    for how, want in edited.items():
        with edit(m, 3, p.visual, how):
            assert (last(m, p.inputs) - want).abs().max() < 1e-4


@pytest.mark.parametrize('kernel', ['flash_attention_like', 'flex_attention'])
def test_sweeps_and_captures_under_kernels_that_take_no_mask(monkeypatch, kernel):
    "SDPA stands in for them: with flex attention's masks a ladder of two pictures broke"
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    name, masks = 'flash_attention_like', ALL_MASK_ATTENTION_FUNCTIONS['flash_attention_2']
    monkeypatch.setitem(AttentionInterface._global_mapping, name, flash_like)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, masks)
    m = MLLM.load('glyph-llava', dtype=torch.float32)
    some = [Sample(s.image, s.question, id=f'{k}') for k, s in enumerate(demo.samples(2))]

    def seen():
        m.kept.clear()
        p = m.prompt(some[0].image, some[0].question)
        with capture(m) as cache:
            last(m, p.inputs)
        return masking.sweep(m, some, ('zero', 'knockout'), layers=[1, 3], limit=2), cache.attention

    table, maps = seen()
    m.model.config.get_text_config()._attn_implementation_internal = kernel
    try:
        under, its = seen()
    except (RuntimeError, ImportError) as e:
        pytest.skip(f'{kernel} does not run here: {e}'[:100])
    assert set(under.path) == {'plain', 'bank', 'branches'} and under.prediction.equals(table.prediction)
    assert (under.logp - table.logp).abs().max() < 1e-4 and (its - maps).abs().max() < 1e-5
    assert m.model.config.get_text_config()._attn_implementation == kernel


QUESTIONS = Q, 'What color is the star at the top left of the picture?', 'Which digit?'


def padded(m, prompts, side):
    "A batch as people make it, padded on one side"
    n = max(p.length for p in prompts)
    rows = {}
    for key, fill in (('input_ids', 0), ('attention_mask', 0)):
        out = []
        for p in prompts:
            row = torch.full((n,), fill, dtype=torch.long)
            at = slice(n - p.length, n) if side == 'left' else slice(0, p.length)
            row[at] = p.inputs[key][0]
            out.append(row)
        rows[key] = torch.stack(out)
    return rows | dict(pixel_values=torch.cat([p.inputs['pixel_values'] for p in prompts]))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    side=st.sampled_from(['left', 'right']),
    order=st.permutations(range(3)),
    layer=st.integers(0, 7),
    how=st.sampled_from(HOWS),
)
def test_batches_of_the_users_own(m, side, order, layer, how):
    "Off by up to 1.5 logits and .65 of attention"
    prompts = [m.prompt(EX, QUESTIONS[k]) for k in order]
    inputs = padded(m, prompts, side)
    visual = torch.stack([(ids == m.image_token_id).nonzero()[:, 0] for ids in inputs['input_ids']])
    ends = inputs['attention_mask'].cumsum(1).argmax(1)
    with edit(m, layer, visual, how), torch.inference_mode():
        got = m.model(**inputs, use_cache=False).logits[torch.arange(3), ends]
    with capture(m) as cache, torch.inference_mode():
        m.model(**inputs, use_cache=False)
    for k, p in enumerate(prompts):
        with edit(m, layer, p.visual, how):
            assert (got[k] - last(m, p.inputs)[0]).abs().max() < 1e-3
        with capture(m) as alone:
            last(m, p.inputs)
        assert (cache.attention[k] - alone.attention[0]).abs().max() < 1e-4
    if side == 'left':
        with pytest.raises(ValueError, match='other positions in other samples'), edit(m, layer, visual[0], how):
            last(m, inputs)


def test_rows_are_counted_without_padding(m):
    prompts = [m.prompt(EX, q) for q in QUESTIONS]
    for side in ('left', 'right'):
        with capture(m, rows=[-2, 70]) as cache, torch.inference_mode():
            m.model(**padded(m, prompts, side), use_cache=False)
        for k, p in enumerate(prompts):
            with capture(m, rows=[-2, 70]) as alone:
                last(m, p.inputs)
            assert (cache.attention[k] - alone.attention[0]).abs().max() < 1e-4


@pytest.mark.parametrize(
    'change, word',
    [
        (dict(visual=[-1]), 'position -1'),
        (dict(visual=[5, 100_000]), 'no position 100000'),
        (dict(visual=[0.5]), 'whole numbers'),
        (dict(visual=[[[1]]]), 'whole numbers'),
        (dict(strength=float('nan')), 'strength'),
        (dict(strength=float('inf')), 'strength'),
        (dict(strength=-1.0), 'strength'),
        (dict(layers=[1.5]), 'no layer'),
        (dict(layers=True), 'no layer'),
        (dict(layers=8), 'no layer 8'),
        (dict(layers=-1), 'no layer -1'),
    ],
)
@pytest.mark.parametrize('how', ['zero', 'soft'])
def test_odd_values_are_refused(m, p, change, word, how):
    kw = dict(layers=2, visual=p.visual, how=how) | change
    with pytest.raises(ValueError, match=word), edit(m, **kw):
        last(m, p.inputs)
    assert not any(mod._forward_pre_hooks for mod in m.layers)


def test_numpy_layers_and_masks_mean_what_they_say(m, p):
    with edit(m, 2, p.visual):
        want = last(m, p.inputs)
    mask = p.inputs['input_ids'][0] == m.image_token_id
    for layers, visual in ((np.int64(2), p.visual), ([np.int32(2)], p.visual.numpy()), (2, mask), (2, mask.numpy())):
        with edit(m, layers, visual):
            assert torch.equal(last(m, p.inputs), want)


def test_threads_wait_for_each_other():
    "Nothing was captured, NaN maps, a wrong answer, an attention name left behind"
    m = MLLM.load('glyph-llava')
    p = m.prompt(EX, Q)
    answer = m.answer(p)
    with edit(m, 3, p.visual, 'knockout'):
        changed = m.answer(p)
    with capture(m) as cache:
        last(m, p.inputs)
    errors = []

    def work(kind):
        try:
            for _ in range(6):
                if kind == 0:
                    with capture(m) as mine:
                        last(m, p.inputs)
                    assert torch.allclose(mine.attention, cache.attention, atol=1e-5)
                elif kind == 1:
                    with edit(m, 3, p.visual, 'knockout'):
                        assert m.answer(p).ids == changed.ids
                elif kind == 2:
                    assert m.answer(p).ids == answer.ids
                else:
                    contrast.refine(m, EX, Q)
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(k % 4,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors
    assert m.model.config.get_text_config()._attn_implementation == 'sdpa' and not m.attentions


def test_captures_left_in_another_order(m, p):
    a, b = capture(m), capture(m)
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    last(m, p.inputs)
    b.__exit__(None, None, None)
    assert m.model.config.get_text_config()._attn_implementation == 'sdpa' and not m.attentions


def test_hooks_package_is_whole():
    assert {'capture', 'edit', 'attending'} <= set(hooks.__all__)


CONFIGS = dict(
    forbidden=dict(bad_words_ids=[[k] for k in range(5, 400)]),
    longer=dict(min_new_tokens=5),
    stop=dict(stop_strings=['0', '6']),
    penalty=dict(repetition_penalty=3.0, no_repeat_ngram_size=1),
    forced=dict(forced_eos_token_id=7, begin_suppress_tokens=list(range(100, 430))),
    sampled=dict(do_sample=True, temperature=9.0, top_k=3),
    uncached=dict(use_cache=False),
    static=dict(cache_implementation='static'),
)


@pytest.mark.parametrize('name', CONFIGS)
def test_one_decoding_policy_for_all_paths(name):
    "answer, look and sweep differed where a checkpoint's generation config forbids or forces words"
    m = MLLM.load('glyph-llava')
    want = m.answer(EX, Q)
    for k, v in CONFIGS[name].items():
        setattr(m.model.generation_config, k, v)
    before = m.model.generation_config
    got = m.answer(EX, Q)
    assert got.ids == want.ids and abs(got.logp - want.logp) < 1e-4
    assert contrast.first_pass(m, EX, Q).base.ids == want.ids
    assert masking.sweep(m, [Sample(EX, Q, id='a')], 'knockout', layers=[3]).prediction[0] == want.text
    assert m.model.generation_config is before


@pytest.mark.parametrize('how', HOWS)
def test_a_static_cache_of_the_users(m, p, how):
    with edit(m, 3, p.visual, how), torch.inference_mode():
        want = m.model.generate(**p.inputs, max_new_tokens=3, do_sample=False)
        got = m.model.generate(**p.inputs, max_new_tokens=3, do_sample=False, cache_implementation='static')
    assert torch.equal(got, want)


def test_answers_that_are_cut_say_so(m, p):
    assert m.answer(p).finished and not m.answer(p, max_new_tokens=1).finished
    r = contrast.refine(m, EX, Q, how='crop', max_new_tokens=1)
    assert not r.answer.finished and len(r.answer.ids) == 1 and len(r.base.ids) == 1
    r = contrast.refine(m, EX, Q, how='mask', max_new_tokens=1)
    assert not r.answer.finished and len(r.answer.ids) == 1
    assert contrast.refine(m, EX, Q).answer.finished
    assert not contrast.first_pass(m, EX, Q, max_new_tokens=1).base.finished


def test_no_number_is_no_answer():
    "Weights with NaN gave an empty text with logp nan"
    m = MLLM.load('glyph-llava')
    m.layers[4].mlp.up_proj.weight.data[0, 0] = float('nan')
    for ask in (lambda: m.answer(EX, Q), lambda: contrast.first_pass(m, EX, Q).base, lambda: contrast.refine(m, EX, Q)):
        with pytest.raises(ValueError, match='no number'):
            ask()


@pytest.mark.parametrize('method', ['vicrop-rel', 'vicrop-grad', 'vicrop-pure', 'carve'])
def test_several_pictures_are_not_dropped(m, method):
    from PIL import Image

    two = [Image.new('RGB', (96, 96), 'white'), EX]
    with pytest.raises(ValueError, match='here are 2'):
        contrast.refine(m, two, Q, how='crop')
    with pytest.raises(ValueError, match='here are 2'):
        baselines.answer(m, two, Q, method)


def test_samples_without_ids_get_some(m):
    "They shared '' and gave intervals of infinity with confidence 1"
    from fusion_notebooks import metrics

    samples = [Sample(EX, q, ('0',)) for q in QUESTIONS]
    table = masking.sweep(m, samples, 'knockout', layers=[3], limit=1)
    assert table['sample'].unique().tolist() == ['0', '1', '2'] and metrics is not None
    with pytest.raises(ValueError, match="the id 'a'"):
        masking.sweep(m, [Sample(EX, Q, id='a'), Sample(EX, Q, id='a')], 'knockout', layers=[3])


@pytest.mark.parametrize('word, means', [('no', False), ('yes', True), (True, True), ('False', False), (0, False)])
def test_switches_are_read(word, means):
    "papermill's -p quick no ran the quick slice"
    from fusion_notebooks import study

    assert study.read_settings('settings.ini', word).quick is means
    with pytest.raises(ValueError, match='must be yes or no'):
        study.read_settings('settings.ini', 'maybe')


def test_models_of_one_name_are_refused(tmp_path):
    "The figures of the first were overwritten"
    from fusion_notebooks import study

    for run in ('runA', 'runB'):
        (tmp_path / run / 'checkpoint-1000').mkdir(parents=True)
    names = [str(tmp_path / run / 'checkpoint-1000') for run in ('runA', 'runB')]
    with pytest.raises(ValueError, match="Two models are called 'checkpoint-1000'"):
        study.choose(models=names)
    assert study.choose(models=names[:1] * 2).models


@pytest.mark.parametrize('kind', ['qwen3_5', 'qwen3_5_moe', 'lfm3_vl', 'minicpmv4_7'])
def test_hybrid_decoders(kind):
    "Layers of linear attention: states can be edited, cached and uncached alike; closing keys is refused in a sentence"
    from transformers import AutoConfig

    from fusion_notebooks import doctor

    try:
        m = doctor.twin(type(AutoConfig.for_model(kind)))
    except (ValueError, ImportError, KeyError) as e:
        pytest.skip(str(e)[:100])
    p = m.prompt(doctor.noise(0), 'What color is the star?')
    assert 0 < len(m.reading) < m.n_layers
    for i in range(m.n_layers):
        with edit(m, i, p.visual):
            a = m.answer(p, max_new_tokens=3)
            logp, ids = 0.0, []
            for token in a.ids:
                logp += last(m, m.copies(p, 1, ids))[0].float().log_softmax(-1)[token].item()
                ids.append(token)
        assert abs(logp - a.logp) < 1e-3
        if i in m.reading:
            with edit(m, i, p.visual, 'knockout'):
                assert m.answer(p, max_new_tokens=3).logp != m.answer(p, max_new_tokens=2).logp
        else:
            with pytest.raises(ValueError, match='has none: give layers among'), edit(m, i, p.visual, 'knockout'):
                m.answer(p)
    table = masking.sweep(m, [Sample(doctor.noise(0), 'What color?', id='a')], ['zero', 'knockout'], limit=2)
    assert sorted(table[table.how == 'knockout'].layer) == list(m.reading)
    assert sorted(table[table.how == 'zero'].layer) == list(range(m.n_layers))


def test_prompts_and_answers_can_be_pickled(m, p):
    import pickle

    again = pickle.loads(pickle.dumps(p))
    assert torch.equal(again.visual, p.visual) and np.array_equal(again.grids[0].boxes, p.grids[0].boxes)
    assert m.answer(again).ids == m.answer(p).ids
    r = contrast.refine(m, EX, Q)
    again = pickle.loads(pickle.dumps(r))
    assert again.answer == r.answer and again.base == r.base and again.box == r.box


def test_a_placeholder_in_the_question_is_refused(m):
    with pytest.raises(ValueError, match='placeholder <image>'):
        m.prompt(EX, 'What is on <image>?')


def test_an_edit_that_nothing_ran_is_an_error(m, p):
    "Whatever else may swallow hooks: a forward that never calls the layers is told"

    class Traced(torch.nn.Module):
        "Calls a layer's code without its hooks, as an exported forward does"

        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def __call__(self, *args, **kw):
            return self.layer.forward(*args, **kw)

    mine = MLLM.load('glyph-llava')
    for how in HOWS:
        original = mine.layers[3]
        with pytest.raises(ValueError, match='The edit never ran'), edit(mine, 3, p.visual, how):
            mine.decoder.layers[3] = Traced(original)
            last(mine, p.inputs)
        mine.decoder.layers[3] = original
    with edit(m, 3, p.visual):
        pass  # no forward, no complaint
    with pytest.raises(KeyError), edit(m, 3, p.visual):
        raise KeyError('mine')


def test_a_folder_of_runs_belongs_to_one_model(tmp_path):
    "In two commands as in one, the notebooks of a second model of the same name do not take the place of the first's"
    from types import SimpleNamespace

    from fusion_notebooks.study import runs

    s = SimpleNamespace(root=tmp_path, runs=tmp_path / 'runs', own_models=())
    one, two = (tmp_path / run / 'checkpoint-1000' for run in ('runA', 'runB'))
    for folder in (one, two):
        folder.mkdir(parents=True)
    runs._claim(s, {str(one): one.name, 'org/name': 'org/name'})
    runs._claim(s, {str(one): one.name})
    with pytest.raises(ValueError, match='another model of that name, runA/checkpoint-1000'):
        runs._claim(s, {str(two): two.name})
    one.rename(tmp_path / 'elsewhere')
    runs._claim(s, {str(two): two.name})  # what is gone has no claim


FOUND = {
    'Blip2ForConditionalGeneration': 12,  # opera: the config has no intermediate_size
    'Gemma4ForConditionalGeneration': 12,  # opera: head_dim differs per layer
    'Qwen3_5MoeForConditionalGeneration': 9,  # opera; three methods need softmax attention at every layer
    'FuyuForCausalLM': 11,  # refine: no vision_config; opera cannot repeat its pictures
    'Granite4VisionForConditionalGeneration': 7,  # copies: features that belong to layers; its tokens have no place
}


@pytest.mark.parametrize('name', FOUND)
def test_what_broke_on_a_family_answers_or_says_why(name):
    from transformers import AutoModelForImageTextToText

    from fusion_notebooks import doctor

    def first(classes):
        return classes[0] if isinstance(classes, (tuple, list)) else classes

    config = next(c for c, m in AutoModelForImageTextToText._model_mapping.items() if first(m).__name__ == name)
    found = doctor.methods_of(doctor.Case(doctor.twin(config)))
    assert len(found) == 2 + len(baselines.METHODS) and all(why == '' or why.endswith('.') for why in found.values())
    assert sum(why == '' for why in found.values()) == FOUND[name], found


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from(sorted(CONFIGS)), min_size=1, max_size=4, unique=True),
    layer=st.integers(0, 7),
    how=st.sampled_from(HOWS),
)
def test_any_generation_config_leaves_all_paths_alike(m, p, names, layer, how):
    with edit(m, layer, p.visual, how):
        want = m.answer(p)
    before = m.model.generation_config
    m.model.generation_config = copy.deepcopy(before)
    try:
        for name in names:
            for k, v in CONFIGS[name].items():
                setattr(m.model.generation_config, k, v)
        with edit(m, layer, p.visual, how):
            assert m.answer(p).ids == want.ids
        table = masking.sweep(m, [Sample(EX, Q, id='a')], how, layers=[layer])
        assert table.prediction[1] == want.text
    finally:
        m.model.generation_config = before


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    at=st.lists(st.integers(-50, 400), min_size=1, max_size=4),
    strength=st.one_of(st.floats(), st.none()),
    layer=st.integers(-3, 12),
    how=st.sampled_from(HOWS),
)
def test_any_odd_edit_is_refused_or_gives_a_number(m, p, at, strength, layer, how):
    fine = 0 <= layer < 8 and all(0 <= k < p.length for k in at) and (strength is None or 0 <= strength < math.inf)
    try:
        with edit(m, layer, torch.tensor(at), how, strength):
            logits = last(m, p.inputs)
    except ValueError as e:
        assert str(e).endswith('.') and not fine
        return
    assert fine
    if strength is None or strength < 1e6:
        assert torch.isfinite(logits).all()


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    where=st.sampled_from(['model', 'decoder', 'layer', 'attention']),
    layer=st.integers(0, 7),
    how=st.sampled_from(HOWS),
)
def test_whichever_forward_is_compiled(where, layer, how):
    mine = MLLM.load('glyph-llava')
    p = mine.prompt(EX, Q)
    with edit(mine, layer, p.visual, how):
        want = last(mine, p.inputs)
    block = mine.layers[layer]
    module = dict(model=mine.model, decoder=mine.decoder, layer=block, attention=block.self_attn)[where]
    module.forward = torch.compile(module.forward, backend='eager')
    last(mine, p.inputs)
    with edit(mine, layer, p.visual, how):
        assert (last(mine, p.inputs) - want).abs().max() < 1e-4


def test_an_edit_that_fails_while_it_is_set_leaves_no_hook(m, p, monkeypatch):
    def hooks_set():
        return sum(len(x._forward_pre_hooks) + len(x._forward_hooks) for x in m.model.modules())

    before = hooks_set()
    monkeypatch.setattr(hooks.edits, '_take_masks', lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError), edit(m, 3, p.visual, 'knockout'):
        pass
    assert hooks_set() == before
