"Tiny random models of real architectures, built from their own config classes, whose image provably matters"
from functools import lru_cache
import torch
import transformers as T
from fusion_notebooks import demo
from fusion_notebooks.mllm import MLLM, PlainProcessor
from conftest import randomise

SPECIAL = ['<boi>', '<eoi>', '<fake_token_around_image>', '<global-img>', '<end_of_utterance>', '<row_1_col_1>', '<row_1_col_2>', '<row_2_col_1>', '<row_2_col_2>', '<|begin_of_text|>']
TEXT = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, rms_norm_eps=1e-5)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
ROPE = dict(rope_type='default', rope_theta=10000., mrope_section=[2, 2, 2])

@lru_cache
def words(): t = demo.make_tokenizer(); t.add_special_tokens(dict(additional_special_tokens=SPECIAL)); return t

def tokenizer():
    t = words()
    return T.PreTrainedTokenizerFast(tokenizer_object=t.backend_tokenizer, bos_token='<s>', eos_token='</s>', pad_token='<pad>', padding_side='left',
                                     extra_special_tokens=dict(image_token='<image>', boi_token='<boi>', eoi_token='<eoi>'))

def bare(): t = tokenizer(); return T.PreTrainedTokenizerFast(tokenizer_object=t.backend_tokenizer, bos_token='<s>', eos_token='</s>', pad_token='<pad>')
def ids(): t = tokenizer(); return dict(vocab_size=len(t), bos_token_id=0, eos_token_id=1, pad_token_id=2)
def text(cls, **kw): return cls(**TEXT | ids() | kw)
def square(cls, side, **kw): return cls(size=dict(height=side, width=side), **kw)
IMAGE = 3                                                                  # id of <image>

def llava():
    c = T.LlavaConfig(text_config=text(T.LlamaConfig), vision_config=T.CLIPVisionConfig(**VISION, image_size=24, patch_size=6, projection_dim=32), image_token_id=IMAGE, image_seq_length=16)
    ip = T.CLIPImageProcessor(size=dict(shortest_edge=24), crop_size=dict(height=24, width=24))
    return T.LlavaForConditionalGeneration(c), T.LlavaProcessor(ip, tokenizer(), 6, 'default', demo.CHAT, '<image>', 1)

def llava_next():
    grid = [[48, 48], [24, 48], [48, 24], [24, 72]]
    c = T.LlavaNextConfig(text_config=text(T.MistralConfig, sliding_window=None), vision_config=T.CLIPVisionConfig(**VISION, image_size=24, patch_size=6, projection_dim=32), image_token_id=IMAGE, image_seq_length=16, image_grid_pinpoints=grid)
    ip = T.LlavaNextImageProcessor(size=dict(shortest_edge=24), crop_size=dict(height=24, width=24), image_grid_pinpoints=grid)
    return T.LlavaNextForConditionalGeneration(c), T.LlavaNextProcessor(ip, tokenizer(), 6, 'default', demo.CHAT, '<image>', 1)

def vipllava():
    c = T.VipLlavaConfig(text_config=text(T.LlamaConfig), vision_config=T.CLIPVisionConfig(**VISION, image_size=24, patch_size=6, projection_dim=32), image_token_id=IMAGE, image_seq_length=16, vision_feature_layers=[-1, -2])
    ip = T.CLIPImageProcessor(size=dict(shortest_edge=24), crop_size=dict(height=24, width=24))
    return T.VipLlavaForConditionalGeneration(c), T.LlavaProcessor(ip, tokenizer(), 6, 'default', demo.CHAT, '<image>', 1)

def llava_onevision():
    grid = [[24*i, 24*j] for i in (1, 2, 3) for j in (1, 2, 3)]
    c = T.LlavaOnevisionConfig(text_config=text(T.Qwen2Config), vision_config=T.SiglipVisionConfig(**VISION, image_size=24, patch_size=6, vision_use_head=False), image_token_id=IMAGE, image_grid_pinpoints=grid)
    return T.LlavaOnevisionForConditionalGeneration(c), T.LlavaOnevisionImageProcessor(size=dict(height=24, width=24), image_grid_pinpoints=grid)

def instructblip():
    c = T.InstructBlipConfig(text_config=text(T.LlamaConfig).to_dict(), vision_config=dict(**VISION, image_size=24, patch_size=6, qkv_bias=True),
                             qformer_config=dict(**VISION, vocab_size=len(tokenizer()), encoder_hidden_size=32, cross_attention_frequency=2), num_query_tokens=8, image_token_id=IMAGE)
    return T.InstructBlipForConditionalGeneration(c), T.InstructBlipProcessor(square(T.BlipImageProcessor, 24), bare(), bare(), 8)

def qwen(Config, Model, text_model, vision):
    def build():
        c = Config(text_config=dict(**TEXT | ids(), rope_parameters=ROPE, model_type=text_model, head_dim=12), vision_config=vision, image_token_id=IMAGE, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6)
        ip = T.Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=8*8*4, max_pixels=8*8*24)
        return Model(c), ip
    return build

qwen2_vl = qwen(T.Qwen2VLConfig, T.Qwen2VLForConditionalGeneration, 'qwen2_vl_text', dict(depth=2, embed_dim=32, hidden_size=48, num_heads=2, patch_size=4, spatial_merge_size=2))
qwen2_5_vl = qwen(T.Qwen2_5_VLConfig, T.Qwen2_5_VLForConditionalGeneration, 'qwen2_5_vl_text', dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, window_size=16, out_hidden_size=48, fullatt_block_indexes=[1]))
qwen3_vl = qwen(T.Qwen3VLConfig, T.Qwen3VLForConditionalGeneration, 'qwen3_vl_text', dict(depth=3, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4, out_hidden_size=48, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]))

def internvl():
    c = T.InternVLConfig(text_config=text(T.Qwen2Config), vision_config=T.InternVLVisionConfig(**VISION, image_size=[24, 24], patch_size=[6, 6]), image_token_id=IMAGE, image_seq_length=4)
    return T.InternVLForConditionalGeneration(c), T.GotOcr2ImageProcessor(size=dict(height=24, width=24), crop_to_patches=True, max_patches=4)

def gemma3():
    c = T.Gemma3Config(text_config=text(T.Gemma3TextConfig, head_dim=12, sliding_window=16, layer_types=['sliding_attention', 'full_attention']*2, query_pre_attn_scalar=12),
                       vision_config=T.SiglipVisionConfig(**VISION, image_size=24, patch_size=3, vision_use_head=False), mm_tokens_per_image=16, image_token_id=IMAGE, boi_token_index=4, eoi_token_index=5)
    return T.Gemma3ForConditionalGeneration(c), T.Gemma3Processor(square(T.Gemma3ImageProcessor, 24), tokenizer(), demo.CHAT.replace('<image>', '<boi>'), image_seq_length=16)

def idefics3():
    c = T.Idefics3Config(text_config=text(T.LlamaConfig), vision_config=dict(**VISION, image_size=24, patch_size=6), image_token_id=IMAGE, scale_factor=2)
    ip = T.Idefics3ImageProcessor(size=dict(longest_edge=48), max_image_size=dict(longest_edge=24))
    return T.Idefics3ForConditionalGeneration(c), T.Idefics3Processor(ip, tokenizer(), image_seq_len=4, chat_template=demo.CHAT)

def smolvlm():
    c = T.SmolVLMConfig(text_config=text(T.LlamaConfig), vision_config=dict(**VISION, image_size=24, patch_size=6), image_token_id=IMAGE, scale_factor=2)
    return T.SmolVLMForConditionalGeneration(c), T.SmolVLMImageProcessor(size=dict(longest_edge=48), max_image_size=dict(longest_edge=24))

def paligemma():
    c = T.PaliGemmaConfig(text_config=text(T.GemmaConfig, head_dim=12), vision_config=T.SiglipVisionConfig(**VISION, image_size=24, patch_size=6, vision_use_head=False, projection_dim=48), image_token_id=IMAGE, projection_dim=48)
    ip = square(T.SiglipImageProcessor, 24); ip.image_seq_length = 16
    return T.PaliGemmaForConditionalGeneration(c), T.PaliGemmaProcessor(ip, tokenizer(), demo.CHAT)

def mllama():
    c = T.MllamaConfig(text_config=dict(**TEXT | ids() | dict(num_hidden_layers=5), cross_attention_layers=[1, 2, 4]), vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_global_layers=1, attention_heads=2, image_size=24, patch_size=6,
                       vision_output_dim=64, intermediate_layers_indices=[0], max_num_tiles=4), image_token_id=IMAGE)
    ip = T.MllamaImageProcessor(size=dict(height=24, width=24), max_image_tiles=4)
    return T.MllamaForConditionalGeneration(c), T.MllamaProcessor(ip, tokenizer(), demo.CHAT)

FAMILIES = {f.__name__: f for f in (llava, llava_next, vipllava, llava_onevision, instructblip, internvl, gemma3, idefics3, smolvlm, paligemma, mllama)} | dict(qwen2_vl=qwen2_vl, qwen2_5_vl=qwen2_5_vl, qwen3_vl=qwen3_vl)

@lru_cache
def family(name, dtype=torch.float32):
    "The handle of a tiny model of one family; the same weights in float64 show that a difference is rounding"
    torch.manual_seed(0)
    model, processor = FAMILIES[name]()
    if not hasattr(processor, 'tokenizer'): processor = PlainProcessor(processor, tokenizer(), model)
    model.generation_config.update(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    return MLLM(randomise(model).to(dtype), processor, name)

