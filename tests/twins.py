"Tiny random models of real architectures, built from their own config classes, whose image provably matters"

from functools import lru_cache
import torch
import transformers as T
from fusion_notebooks import demo
from fusion_notebooks.mllm import MLLM, PlainProcessor
from conftest import randomise

SPECIAL = [
    '<boi>',
    '<eoi>',
    '<fake_token_around_image>',
    '<global-img>',
    '<end_of_utterance>',
    '<row_1_col_1>',
    '<row_1_col_2>',
    '<row_2_col_1>',
    '<row_2_col_2>',
    '<|begin_of_text|>',
]
TEXT = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
ROPE = dict(rope_type='default', rope_theta=10000.0, mrope_section=[2, 2, 2])


@lru_cache
def words():
    t = demo.make_tokenizer()
    t.add_special_tokens(dict(additional_special_tokens=SPECIAL))
    return t


def tokenizer():
    t = words()
    return T.PreTrainedTokenizerFast(
        tokenizer_object=t.backend_tokenizer,
        bos_token='<s>',
        eos_token='</s>',
        pad_token='<pad>',
        padding_side='left',
        extra_special_tokens=dict(image_token='<image>', boi_token='<boi>', eoi_token='<eoi>'),
    )


def bare():
    t = tokenizer()
    return T.PreTrainedTokenizerFast(
        tokenizer_object=t.backend_tokenizer, bos_token='<s>', eos_token='</s>', pad_token='<pad>'
    )


def ids():
    t = tokenizer()
    return dict(vocab_size=len(t), bos_token_id=0, eos_token_id=1, pad_token_id=2)


def text(cls, **kw):
    return cls(**TEXT | ids() | kw)


def square(cls, side, **kw):
    return cls(size=dict(height=side, width=side), **kw)


IMAGE = 3  # id of <image>


def llava():
    c = T.LlavaConfig(
        text_config=text(T.LlamaConfig),
        vision_config=T.CLIPVisionConfig(**VISION, image_size=24, patch_size=6, projection_dim=32),
        image_token_id=IMAGE,
        image_seq_length=16,
    )
    ip = T.CLIPImageProcessor(size=dict(shortest_edge=24), crop_size=dict(height=24, width=24))
    return T.LlavaForConditionalGeneration(c), T.LlavaProcessor(ip, tokenizer(), 6, 'default', demo.CHAT, '<image>', 1)


def llava_next():
    grid = [[48, 48], [24, 48], [48, 24], [24, 72]]
    c = T.LlavaNextConfig(
        text_config=text(T.MistralConfig, sliding_window=None),
        vision_config=T.CLIPVisionConfig(**VISION, image_size=24, patch_size=6, projection_dim=32),
        image_token_id=IMAGE,
        image_seq_length=16,
        image_grid_pinpoints=grid,
    )
    ip = T.LlavaNextImageProcessor(
        size=dict(shortest_edge=24), crop_size=dict(height=24, width=24), image_grid_pinpoints=grid
    )
    return T.LlavaNextForConditionalGeneration(c), T.LlavaNextProcessor(
        ip, tokenizer(), 6, 'default', demo.CHAT, '<image>', 1
    )


def vipllava():
    c = T.VipLlavaConfig(
        text_config=text(T.LlamaConfig),
        vision_config=T.CLIPVisionConfig(**VISION, image_size=24, patch_size=6, projection_dim=32),
        image_token_id=IMAGE,
        image_seq_length=16,
        vision_feature_layers=[-1, -2],
    )
    ip = T.CLIPImageProcessor(size=dict(shortest_edge=24), crop_size=dict(height=24, width=24))
    return T.VipLlavaForConditionalGeneration(c), T.LlavaProcessor(
        ip, tokenizer(), 6, 'default', demo.CHAT, '<image>', 1
    )


def llava_onevision():
    grid = [[24 * i, 24 * j] for i in (1, 2, 3) for j in (1, 2, 3)]
    c = T.LlavaOnevisionConfig(
        text_config=text(T.Qwen2Config),
        vision_config=T.SiglipVisionConfig(**VISION, image_size=24, patch_size=6, vision_use_head=False),
        image_token_id=IMAGE,
        image_grid_pinpoints=grid,
    )
    return T.LlavaOnevisionForConditionalGeneration(c), T.LlavaOnevisionImageProcessor(
        size=dict(height=24, width=24), image_grid_pinpoints=grid
    )


def instructblip():
    c = T.InstructBlipConfig(
        text_config=text(T.LlamaConfig).to_dict(),
        vision_config=dict(**VISION, image_size=24, patch_size=6, qkv_bias=True),
        qformer_config=dict(**VISION, vocab_size=len(tokenizer()), encoder_hidden_size=32, cross_attention_frequency=2),
        num_query_tokens=8,
        image_token_id=IMAGE,
    )
    return T.InstructBlipForConditionalGeneration(c), T.InstructBlipProcessor(
        square(T.BlipImageProcessor, 24), bare(), bare(), 8
    )


def qwen(Config, Model, text_model, vision):
    def build():
        c = Config(
            text_config=dict(**TEXT | ids(), rope_parameters=ROPE, model_type=text_model, head_dim=12),
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=4,
            vision_start_token_id=5,
            vision_end_token_id=6,
        )
        ip = T.Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=8 * 8 * 4, max_pixels=8 * 8 * 24)
        return Model(c), ip

    return build


qwen2_vl = qwen(
    T.Qwen2VLConfig,
    T.Qwen2VLForConditionalGeneration,
    'qwen2_vl_text',
    dict(depth=2, embed_dim=32, hidden_size=48, num_heads=2, patch_size=4, spatial_merge_size=2),
)
qwen2_5_vl = qwen(
    T.Qwen2_5_VLConfig,
    T.Qwen2_5_VLForConditionalGeneration,
    'qwen2_5_vl_text',
    dict(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        patch_size=4,
        window_size=16,
        out_hidden_size=48,
        fullatt_block_indexes=[1],
    ),
)
qwen3_vl = qwen(
    T.Qwen3VLConfig,
    T.Qwen3VLForConditionalGeneration,
    'qwen3_vl_text',
    dict(
        depth=3,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        patch_size=4,
        out_hidden_size=48,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
    ),
)


def internvl():
    c = T.InternVLConfig(
        text_config=text(T.Qwen2Config),
        vision_config=T.InternVLVisionConfig(**VISION, image_size=[24, 24], patch_size=[6, 6]),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return T.InternVLForConditionalGeneration(c), T.GotOcr2ImageProcessor(
        size=dict(height=24, width=24), crop_to_patches=True, max_patches=4
    )


def gemma3():
    c = T.Gemma3Config(
        text_config=text(
            T.Gemma3TextConfig,
            head_dim=12,
            sliding_window=16,
            layer_types=['sliding_attention', 'full_attention'] * 2,
            query_pre_attn_scalar=12,
        ),
        vision_config=T.SiglipVisionConfig(**VISION, image_size=24, patch_size=3, vision_use_head=False),
        mm_tokens_per_image=16,
        image_token_id=IMAGE,
        boi_token_index=4,
        eoi_token_index=5,
    )
    return T.Gemma3ForConditionalGeneration(c), T.Gemma3Processor(
        square(T.Gemma3ImageProcessor, 24), tokenizer(), demo.CHAT.replace('<image>', '<boi>'), image_seq_length=16
    )


def idefics3():
    c = T.Idefics3Config(
        text_config=text(T.LlamaConfig),
        vision_config=dict(**VISION, image_size=24, patch_size=6),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    ip = T.Idefics3ImageProcessor(size=dict(longest_edge=48), max_image_size=dict(longest_edge=24))
    return T.Idefics3ForConditionalGeneration(c), T.Idefics3Processor(
        ip, tokenizer(), image_seq_len=4, chat_template=demo.CHAT
    )


def smolvlm():
    c = T.SmolVLMConfig(
        text_config=text(T.LlamaConfig),
        vision_config=dict(**VISION, image_size=24, patch_size=6),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return T.SmolVLMForConditionalGeneration(c), T.SmolVLMImageProcessor(
        size=dict(longest_edge=48), max_image_size=dict(longest_edge=24)
    )


def paligemma():
    c = T.PaliGemmaConfig(
        text_config=text(T.GemmaConfig, head_dim=12),
        vision_config=T.SiglipVisionConfig(
            **VISION, image_size=24, patch_size=6, vision_use_head=False, projection_dim=48
        ),
        image_token_id=IMAGE,
        projection_dim=48,
    )
    ip = square(T.SiglipImageProcessor, 24)
    ip.image_seq_length = 16
    return T.PaliGemmaForConditionalGeneration(c), T.PaliGemmaProcessor(ip, tokenizer(), demo.CHAT)


def mllama():
    c = T.MllamaConfig(
        text_config=dict(**TEXT | ids() | dict(num_hidden_layers=5), cross_attention_layers=[1, 2, 4]),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=2,
            image_size=24,
            patch_size=6,
            vision_output_dim=64,
            intermediate_layers_indices=[0],
            max_num_tiles=4,
        ),
        image_token_id=IMAGE,
    )
    ip = T.MllamaImageProcessor(size=dict(height=24, width=24), max_image_tiles=4)
    return T.MllamaForConditionalGeneration(c), T.MllamaProcessor(ip, tokenizer(), demo.CHAT)


FAMILIES = {
    f.__name__: f
    for f in (
        llava,
        llava_next,
        vipllava,
        llava_onevision,
        instructblip,
        internvl,
        gemma3,
        idefics3,
        smolvlm,
        paligemma,
        mllama,
    )
} | dict(qwen2_vl=qwen2_vl, qwen2_5_vl=qwen2_5_vl, qwen3_vl=qwen3_vl)


@lru_cache
def family(name, dtype=torch.float32):
    "The handle of a tiny model of one family; the same weights in float64 show that a difference is rounding"
    torch.manual_seed(0)
    model, processor = FAMILIES[name]()
    if not hasattr(processor, 'tokenizer'):
        processor = PlainProcessor(processor, tokenizer(), model)
    model.generation_config.update(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    return MLLM(randomise(model).to(dtype), processor, name)


def checkpoint(folder, layers=4):
    "A tiny random model in the file layout of llava-hf/llava-1.5-7b-hf: its config's keys, its names of weights, float16 shards with an index, its processor and tokenizer files"
    import json
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    write = lambda name, **kw: (folder / name).write_text(json.dumps(kw, indent=2))
    write(
        'config.json',
        architectures=['LlavaForConditionalGeneration'],
        ignore_index=-100,
        image_seq_length=576,
        image_token_index=32000,
        model_type='llava',
        pad_token_id=32001,
        projector_hidden_act='gelu',
        tie_word_embeddings=False,
        text_config=dict(
            _name_or_path='lmsys/vicuna-7b-v1.5',
            architectures=['LlamaForCausalLM'],
            max_position_embeddings=4096,
            model_type='llama',
            rms_norm_eps=1e-5,
            torch_dtype='float16',
            vocab_size=32064,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
        ),
        torch_dtype='float16',
        transformers_version='4.36.0.dev0',
        vision_feature_layer=-2,
        vision_feature_select_strategy='default',
        vision_config=dict(
            hidden_size=32,
            image_size=336,
            intermediate_size=48,
            model_type='clip_vision_model',
            num_attention_heads=2,
            num_hidden_layers=3,
            patch_size=14,
            projection_dim=32,
            vocab_size=32000,
        ),
    )
    write(
        'generation_config.json',
        _from_model_config=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=32001,
        transformers_version='4.36.0.dev0',
    )
    write(
        'preprocessor_config.json',
        crop_size=dict(height=336, width=336),
        do_center_crop=True,
        do_convert_rgb=True,
        do_normalize=True,
        do_rescale=True,
        do_resize=True,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_processor_type='CLIPImageProcessor',
        image_std=[0.26862954, 0.26130258, 0.27577711],
        processor_class='LlavaProcessor',
        resample=3,
        rescale_factor=1 / 255,
        size=dict(shortest_edge=336),
    )
    write(
        'processor_config.json',
        image_token='<image>',
        num_additional_image_tokens=1,
        patch_size=14,
        processor_class='LlavaProcessor',
        vision_feature_select_strategy='default',
    )
    write(
        'chat_template.json',
        chat_template="{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
        "{% endfor %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    )
    words = ['<unk>', '<s>', '</s>'] + [f'<0x{k:02X}>' for k in range(256)] + ['▁'] + [chr(k) for k in range(33, 127)]
    words += [f'piece{k}' for k in range(32000 - len(words))]
    special = lambda k, text: dict(
        id=k, content=text, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True
    )
    write(
        'tokenizer.json',
        version='1.0',
        truncation=None,
        padding=None,
        added_tokens=[
            special(k, t) for k, t in ((0, '<unk>'), (1, '<s>'), (2, '</s>'), (32000, '<image>'), (32001, '<pad>'))
        ],
        normalizer=dict(
            type='Sequence',
            normalizers=[
                dict(type='Prepend', prepend='▁'),
                dict(type='Replace', pattern=dict(String=' '), content='▁'),
            ],
        ),
        pre_tokenizer=None,
        post_processor=dict(
            type='TemplateProcessing',
            single=[dict(SpecialToken=dict(id='<s>', type_id=0)), dict(Sequence=dict(id='A', type_id=0))],
            pair=[dict(Sequence=dict(id='A', type_id=0)), dict(Sequence=dict(id='B', type_id=0))],
            special_tokens={'<s>': dict(id='<s>', ids=[1], tokens=['<s>'])},
        ),
        decoder=dict(
            type='Sequence',
            decoders=[
                dict(type='Replace', pattern=dict(String='▁'), content=' '),
                dict(type='ByteFallback'),
                dict(type='Fuse'),
                dict(type='Strip', content=' ', start=1, stop=0),
            ],
        ),
        model=dict(
            type='BPE',
            dropout=None,
            unk_token='<unk>',
            continuing_subword_prefix=None,
            end_of_word_suffix=None,
            fuse_unk=True,
            byte_fallback=True,
            vocab={w: k for k, w in enumerate(words)},
            merges=[],
        ),
    )
    write(
        'tokenizer_config.json',
        add_bos_token=True,
        add_eos_token=False,
        bos_token='<s>',
        clean_up_tokenization_spaces=False,
        eos_token='</s>',
        legacy=False,
        model_max_length=1000000000000000019884624838656,
        pad_token='<pad>',
        padding_side='left',
        processor_class='LlavaProcessor',
        tokenizer_class='LlamaTokenizer',
        unk_token='<unk>',
        use_default_system_prompt=False,
    )
    write('special_tokens_map.json', bos_token='<s>', eos_token='</s>', pad_token='<pad>', unk_token='<unk>')
    model = randomise(T.LlavaForConditionalGeneration(T.AutoConfig.from_pretrained(folder)))
    old = {
        'model.language_model.': 'language_model.model.',
        'lm_head.': 'language_model.lm_head.',
        'model.vision_tower.': 'vision_tower.',
        'model.multi_modal_projector.': 'multi_modal_projector.',
    }
    weights = {
        next(new + k[len(start) :] for start, new in old.items() if k.startswith(start)): v.half().contiguous()
        for k, v in model.state_dict().items()
    }
    names, index = sorted(weights), {}
    for n in range(3):
        shard = f'model-0000{n + 1}-of-00003.safetensors'
        some = names[n * len(names) // 3 : (n + 1) * len(names) // 3]
        save_file({k: weights[k] for k in some}, folder / shard, metadata=dict(format='pt'))
        index |= dict.fromkeys(some, shard)
    write(
        'model.safetensors.index.json',
        metadata=dict(total_size=sum(v.nbytes for v in weights.values())),
        weight_map=index,
    )
    return model
