"The ladder equals one forward per edit in every kind of model, and says where it cannot be used"
from types import SimpleNamespace
import pytest, torch, transformers
from conftest import randomise
from fusion_notebooks import masking
from fusion_notebooks.hooks import edit
from fusion_notebooks.masking import facts, mean_states, sweep
from fusion_notebooks.mllm import MLLM, Prompt, Sample
from test_masking import same

IMAGE, HOWS = 150, ('zero', 'mean', 'swap', 'knockout', 'soft')
text = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=200, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0)
tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
qwen = dict(text | dict(rope_parameters=dict(rope_type='default', rope_theta=1e4, mrope_section=[2, 3, 3])))
qwen_tower = dict(depth=3, num_heads=2, patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
pixels = lambda g, *shape: torch.randn(*shape, generator=g)

def square(types=None, side=28): # types: the id that the processor marks, if any
    def inputs(g, question):
        ids = torch.tensor([[1, 5, 6, *[IMAGE]*16, *question]])
        return dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels(g, 1, 3, side, side)) | ({'token_type_ids': (ids == types).long()} if types is not None else {})
    return inputs

def patches(g, question):
    ids = torch.tensor([[1, 5, 151, *[IMAGE]*6, 152, *question]])
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == IMAGE).long(), pixel_values=pixels(g, 24, 3*2*14*14), image_grid_thw=torch.tensor([[1, 4, 6]]))

def tiles(g, question):
    ids = torch.tensor([[1, 5, *([7, *[IMAGE]*4, 8]*3), *question]])
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels(g, 1, 3, 3, 28, 28))

def build(name):
    T = transformers
    common = dict(image_token_id=IMAGE)
    qwen_ids = dict(vision_start_token_id=151, vision_end_token_id=152, video_token_id=153)
    make = dict(
        qwen2=lambda: (T.Qwen2VLForConditionalGeneration(T.Qwen2VLConfig(text_config=qwen, vision_config=qwen_tower | dict(embed_dim=32, hidden_size=64, mlp_ratio=2), **common, **qwen_ids)), patches),
        qwen3=lambda: (T.Qwen3VLForConditionalGeneration(T.Qwen3VLConfig(text_config=qwen, vision_config=qwen_tower | dict(hidden_size=32, intermediate_size=48, out_hidden_size=64, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]), **common, **qwen_ids)), patches),
        paligemma=lambda: (T.PaliGemmaForConditionalGeneration(T.PaliGemmaConfig(text_config=dict(text, model_type='gemma'), vision_config=dict(tower, model_type='siglip_vision_model', projection_dim=64), projection_dim=64, **common)), square(types=-1)),
        gemma3=lambda: (T.Gemma3ForConditionalGeneration(T.Gemma3Config(text_config=dict(text, sliding_window=12, layer_types=['sliding_attention', 'full_attention']*2), vision_config=tower, mm_tokens_per_image=16, **common)), square(types=IMAGE)),
        idefics3=lambda: (T.Idefics3ForConditionalGeneration(T.Idefics3Config(text_config=dict(text, model_type='llama'), vision_config=tower, scale_factor=2, **common)), tiles),
        smolvlm=lambda: (T.SmolVLMForConditionalGeneration(T.SmolVLMConfig(text_config=dict(text, model_type='llama'), vision_config=tower, scale_factor=2, **common)), tiles),
        internvl=lambda: (T.InternVLForConditionalGeneration(T.InternVLConfig(text_config=dict(text, model_type='qwen2'), vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=[56, 56], patch_size=[7, 7]), downsample_ratio=.5, **common)), square(side=56)),
    )
    torch.manual_seed(0)
    model, inputs = make[name]()
    randomise(model)
    tokenizer = SimpleNamespace(decode=lambda ids, **kw: ' '.join(map(str, ids)))
    mllm = MLLM(model, SimpleNamespace(tokenizer=tokenizer), name)
    model.generation_config.eos_token_id = 2
    def prompt(image, question):
        made = inputs(torch.Generator().manual_seed(image), [int(t) for t in question.split()])
        return Prompt(made, (made['input_ids'][0] == IMAGE).nonzero()[:, 0], [image], question)
    mllm.prompt = prompt
    return mllm

SAMPLES = [Sample(k, q, id=f's{k}') for k, q in enumerate(('20 21 22 23 24', '30 31 32', '40 41 42 43 44 45'))]
EXPECT = dict(                                   # closed, causal, clean, paths of zero at layers 0 and 3 and of knockout
    qwen2=((True, True, 0), 'bank', 'bank', 'ladder'), qwen3=((True, True, 2), 'naive', 'bank', 'ladder'),
    paligemma=((False, False, 0), 'resume', 'resume', 'resume'), gemma3=((True, False, 0), 'bank', 'bank', 'ladder'),
    idefics3=((True, True, 0), 'resume', 'resume', 'ladder'), smolvlm=((True, True, 0), 'resume', 'resume', 'ladder'), internvl=((True, True, 0), 'bank', 'bank', 'ladder'))

@pytest.fixture(scope='module', params=EXPECT)
def family(request): return build(request.param)

def test_what_is_shared_is_found(family):
    want, first, last, knockout = EXPECT[family.name]
    f = facts(family, family.prompt(0, '20 21 22'))
    assert (f.closed, f.causal, f.clean) == want and f.plain

@pytest.mark.parametrize('scope', ['single', 'from', 'window'])
def test_every_family_equals_naive(family, scope):
    mean = mean_states(family, SAMPLES)
    hows = HOWS if scope == 'single' else ('knockout', 'soft')
    fast, naive = (sweep(family, SAMPLES, hows, scope, mean=mean, exact=e, limit=4) for e in ('auto', 'naive'))
    same(fast, naive)
    edited, base = fast[fast.how != 'none'], fast[fast.how == 'none'].set_index('sample').logp
    assert ((edited.logp - edited['sample'].map(base)).abs() > 1e-4).mean() > .9       # the edits matter
    path = fast.set_index(['sample', 'how', 'layer']).path
    _, first, last, knockout = EXPECT[family.name]
    if scope == 'single': assert (path['s0', 'zero', 0], path['s0', 'zero', 3], path['s1', 'knockout', 0]) == (first, last, knockout)

def test_resume_equals_naive(family):
    mean = mean_states(family, SAMPLES)
    fast, naive = (sweep(family, SAMPLES[:2], HOWS, mean=mean, exact=e, limit=3) for e in ('resume', 'naive'))
    same(fast, naive)
    assert 'resume' in set(fast.path)
