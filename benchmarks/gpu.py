"""The same on CUDA, at the real shapes of LLaVA-1.5-7B, LLaVA-NeXT and Qwen2.5-VL-7B with random weights in bfloat16: `python benchmarks/gpu.py`.

Times are the wall's, medians of interleaved pairs. The floor of a forward is the larger of reading every weight once, at the measured copy rate, and of its operations, at the
measured matrix rate; it is compared with a forward whose picture is on the device already, everything else starts from a picture. `--tiny` runs the same code on small models, on any device;
`gpu.py qwen llava` runs these models only. What is measured replaces what the record says of it, and the rest of the record stays.
"""

import argparse, statistics, sys, time
import torch, transformers as T
import bench
from bench import flops, picture, question, ratio, row, timed
from fusion_notebooks import contrast, demo, masking
from fusion_notebooks.doctor import doctor, randomise
from fusion_notebooks.hooks import capture
from fusion_notebooks.mllm import MLLM, PlainProcessor, Sample


def llama(tiny, **kw):
    return (
        dict(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=600,
        )
        | kw
        if tiny
        else dict(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            vocab_size=32064,
            max_position_embeddings=4096,
        )
        | kw
    )


def clip(tiny):
    return T.CLIPVisionConfig(
        **dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        )
        if tiny
        else dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        )
    )


def llava(tiny, tok):
    side = clip(tiny).image_size
    config = T.LlavaConfig(
        text_config=T.LlamaConfig(**llama(tiny)),
        vision_config=clip(tiny),
        image_token_id=tok.image_token_id,
        image_seq_length=(side // 14) ** 2,
    )
    ip = T.CLIPImageProcessor(size=dict(shortest_edge=side), crop_size=dict(height=side, width=side))
    return (
        T.LlavaForConditionalGeneration,
        config,
        lambda m: T.LlavaProcessor(ip, tok, 14, 'default', demo.CHAT, '<image>', 1),
    )


def llava_next(tiny, tok):
    side = clip(tiny).image_size
    grid = [[2 * side, 2 * side]]
    config = T.LlavaNextConfig(
        text_config=T.MistralConfig(
            **llama(tiny, num_key_value_heads=2 if tiny else 8, intermediate_size=96 if tiny else 14336),
            sliding_window=None,
        ),
        vision_config=clip(tiny),
        image_token_id=tok.image_token_id,
        image_grid_pinpoints=grid,
    )
    ip = T.LlavaNextImageProcessor(
        size=dict(shortest_edge=side), crop_size=dict(height=side, width=side), image_grid_pinpoints=grid
    )
    return (
        T.LlavaNextForConditionalGeneration,
        config,
        lambda m: T.LlavaNextProcessor(ip, tok, 14, 'default', demo.CHAT, '<image>', 1),
    )


def qwen(tiny, tok):
    rope = dict(rope_type='default', rope_theta=1e6, mrope_section=[2, 3, 3] if tiny else [16, 24, 24])
    text = (
        llama(True, num_key_value_heads=2)
        if tiny
        else dict(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
        )
    )
    tower = (
        dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, fullatt_block_indexes=[1])
        if tiny
        else dict(out_hidden_size=3584)
    )
    config = T.Qwen2_5_VLConfig(
        text_config=text | dict(rope_parameters=rope),
        vision_config=tower,
        image_token_id=tok.image_token_id,
        vision_start_token_id=5,
        vision_end_token_id=6,
        video_token_id=7,
    )
    side = 112 if tiny else 1036
    ip = T.Qwen2VLImageProcessor(min_pixels=side * side, max_pixels=side * side)
    return T.Qwen2_5_VLForConditionalGeneration, config, lambda m: PlainProcessor(ip, tok, m)


def vipllava(tiny, tok):
    side = clip(tiny).image_size
    config = T.VipLlavaConfig(
        text_config=T.LlamaConfig(**llama(tiny)),
        vision_config=clip(tiny),
        image_token_id=tok.image_token_id,
        image_seq_length=(side // 14) ** 2,
        vision_feature_layers=[-1, -2] if tiny else [-2, -5, -8, -11, 6],
    )
    ip = T.CLIPImageProcessor(size=dict(shortest_edge=side), crop_size=dict(height=side, width=side))
    return (
        T.VipLlavaForConditionalGeneration,
        config,
        lambda m: T.LlavaProcessor(ip, tok, 14, 'default', demo.CHAT, '<image>', 1),
    )


def llava_onevision(tiny, tok):
    tower = (
        dict(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        )
        if tiny
        else dict(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=26,
            num_attention_heads=16,
            image_size=384,
            patch_size=14,
        )
    )
    text = (
        llama(True, num_key_value_heads=2)
        if tiny
        else dict(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
        )
    )
    side = tower['image_size']
    grid = [[side * i, side * j] for i in (1, 2) for j in (1, 2)]
    config = T.LlavaOnevisionConfig(
        text_config=T.Qwen2Config(**text),
        vision_config=T.SiglipVisionConfig(**tower, vision_use_head=False),
        image_token_id=tok.image_token_id,
        image_grid_pinpoints=grid,
    )
    return (
        T.LlavaOnevisionForConditionalGeneration,
        config,
        lambda m: PlainProcessor(
            T.LlavaOnevisionImageProcessor(size=dict(height=side, width=side), image_grid_pinpoints=grid), tok, m
        ),
    )


def instructblip(tiny, tok):
    side = 56 if tiny else 224
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    bare = lambda: T.PreTrainedTokenizerFast(
        tokenizer_object=demo.make_tokenizer().backend_tokenizer, bos_token='<s>', eos_token='</s>', pad_token='<pad>'
    )
    config = T.InstructBlipConfig(
        text_config=T.LlamaConfig(**llama(tiny)).to_dict(),
        vision_config=(small if tiny else {}) | dict(image_size=side, patch_size=14),
        qformer_config=(small | dict(encoder_hidden_size=32) if tiny else {}),
        num_query_tokens=32,
        image_token_id=tok.image_token_id,
    )
    return (
        T.InstructBlipForConditionalGeneration,
        config,
        lambda m: T.InstructBlipProcessor(T.BlipImageProcessor(size=dict(height=side, width=side)), bare(), bare(), 32),
    )


def qwen2(tiny, tok):
    _, c, _ = qwen(tiny, tok)
    tower = dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2) if tiny else dict(hidden_size=3584)
    config = T.Qwen2VLConfig(
        text_config=c.get_text_config().to_dict() | dict(model_type='qwen2_vl_text'),
        vision_config=tower,
        image_token_id=tok.image_token_id,
        vision_start_token_id=5,
        vision_end_token_id=6,
        video_token_id=7,
    )
    side = 112 if tiny else 1036
    return (
        T.Qwen2VLForConditionalGeneration,
        config,
        lambda m: PlainProcessor(T.Qwen2VLImageProcessor(min_pixels=side * side, max_pixels=side * side), tok, m),
    )


def build(make, tiny, device, dtype=torch.bfloat16):
    "Random weights of the real shapes, made on the device"
    tok = demo.make_tokenizer()
    cls, config, processor = make(tiny, tok)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = cls(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.generation_config.update(
        eos_token_id=list(range(config.get_text_config().vocab_size)), pad_token_id=2
    )  # answers of one token
    return MLLM(model, processor(model), make.__name__)


def sync(work):
    "A call that ends when the device has"

    def done(r=0):
        out = work(r)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return out

    return done


def rates(device, n):
    "(bytes per second of a copy, operations per second of a matrix product)"
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    s = timed(5, copy=sync(lambda r: a.clone()), matmul=sync(lambda r: a @ a))
    return 2 * a.nbytes / min(s['copy']), 2 * n**3 / min(s['matmul'])


def self_checks(make, tiny, device):
    "The doctor on a model of the real size; small weights are enlarged so that the picture matters"
    mllm = build(make, tiny, device)
    report = doctor(MLLM(randomise(mllm.model), mllm.processor, mllm.name))
    row(f'{mllm.name}: self-checks that hold, of {len(report.checks)}', sum(c.ok for c in report.checks))
    for c in report.checks:
        if not c.ok:
            print(f'{mllm.name}: {c.name}: {c.reason}')


def exact(make, tiny, device):
    "Fast sweeps against naive ones at the real size, in float32; weights are enlarged so that the picture matters"
    mllm = build(make, tiny, device, torch.float32)
    randomise(mllm.model)
    ask = question(mllm, 40)
    some, layers = [Sample(picture(k), ask, id=f'{k}') for k in range(2)], [0, mllm.n_layers // 2, mllm.n_layers - 1]
    for how in ('knockout', 'zero', 'swap'):
        fast, slow = (masking.sweep(mllm, some, how, layers=layers, exact=x, limit=1) for x in ('auto', 'naive'))
        effect = (
            slow.logp[slow.layer >= 0].to_numpy()
            - slow.groupby('sample').logp.transform('first')[slow.layer >= 0].to_numpy()
        )
        row(
            f'{mllm.name}: {how} in float32, fast against naive, largest difference of log-probability',
            abs(fast.logp - slow.logp).max(),
            f'{abs(effect).max():.2f} masked',
            unit='nats',
        )
        if (fast.prediction != slow.prediction).any():
            print(f'{mllm.name}: {how}: {(fast.prediction != slow.prediction).sum()} of {len(fast)} answers differ')


def one_model(make, tiny, device, repeats):
    mllm = build(make, tiny, device)
    name, ask = mllm.name, question(mllm, 40)
    p, L = mllm.prompt(picture(0), ask), mllm.n_layers
    tail = p.length - int(p.visual[-1]) - 1
    forward = bench.plain(mllm, ask)
    count = flops(forward)
    read, multiply = rates(device, 256 if tiny else 8192)
    weights = sum(q.nbytes for q in mllm.model.parameters())
    print(
        f'{name}: {p.length} rows, {tail} of them tail, {weights / 1e9:.1f} GB, path {masking.path_of(mllm, masking.Variant(p, "zero", [L - 1]))} for zero'
    )
    works = {how: sync(w) for how, w in bench.sweeps(mllm, ask).items()}
    naive = sync(bench.naive(mllm, ask, [L // 2]))

    def captured(r):
        with torch.inference_mode(), capture(mllm) as cache:
            mllm.model(**mllm.prompt(picture(1000 + r), ask).inputs, use_cache=True, logits_to_keep=1)
        return cache.attention

    def ready(r):
        with torch.inference_mode():
            mllm.model(**p.inputs, use_cache=True, logits_to_keep=1)

    works |= {f'causal map, {steps}': sync(w) for steps, w in bench.causal_works(mllm, ask).items()}
    works |= dict(
        ready=sync(ready),
        capture=sync(captured),
        answer=sync(lambda r: mllm.answer(picture(3000 + r), ask)),
        mask=sync(lambda r: contrast.refine(mllm, picture(4000 + r), ask, how='mask')),
    )
    try:
        contrast.refine(mllm, picture(1), ask, base=48)
        works['crop'] = sync(lambda r: contrast.refine(mllm, picture(5000 + r), ask, base=48))
    except ValueError as e:
        print(f'{name}: no crop ({e})')
    for w in works.values():
        w(9_000)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(repeats, plain=sync(forward), naive=naive, **works)
    base = statistics.median(seconds['plain'])
    row(f'{name}: a forward from a picture', base, unit='s')
    row(f'{name}: a forward, picture on the device', statistics.median(seconds['ready']), unit='s')
    row(f'{name}: the same over its floor', statistics.median(seconds['ready']) / max(weights / read, count / multiply))
    row(f'{name}: bound of a sweep, 1 + (T/S)(L + 1)/2, in forwards', 1 + tail / p.length * (L + 1) / 2)
    for how in ('knockout', 'swap', 'zero'):
        row(f'{name}: {how} sweep of {L} layers, in forwards', *ratio(seconds, how))
    row(f'{name}: naive sweep, in forwards (from one layer)', 1 + (ratio(seconds, 'naive')[0] - 1) * L)
    for k in works:
        if k.startswith('causal'):
            row(f'{name}: {k}, in forwards', *ratio(seconds, k))
    row(f'{name}: capture over a forward', *ratio(seconds, 'capture'), limit=1.1)
    for how in ('mask', 'crop'):
        if how in works:
            row(
                f'{name}: refine by {how} over a plain answer',
                *ratio(seconds, how, 'answer'),
                limit=dict(mask=1.1, crop=2.2)[how],
            )
    some = [Sample(picture(6000 + k), ask, id=f'{k}') for k in range(4 if tiny else 16)]
    seconds = timed(1, all=sync(lambda r: masking.sweep(mllm, some, ('knockout', 'swap', 'zero'), limit=1)))
    row(f'{name}: samples per second, three sweeps each, end to end', len(some) / seconds['all'][0], unit='1/s')
    if device.type == 'cuda':
        row(f'{name}: peak memory', torch.cuda.max_memory_allocated() / 2**30, unit='GiB')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tiny', action='store_true', help='small models, nothing written')
    parser.add_argument('only', nargs='*', help='models to run; default: all')
    a = parser.parse_args()
    T.logging.set_verbosity_error()
    bench.CLOCK = time.perf_counter
    if not (torch.cuda.is_available() or a.tiny):
        print('No GPU here: run this where there is one, or with --tiny.', file=sys.stderr)
        return 2
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    todo = (
        [(one_model, make, 2 if a.tiny else 5) for make in (llava, llava_next, qwen)]
        + [(exact, make) for make in (llava, qwen)]
        + [(self_checks, make) for make in (llava, llava_next, vipllava, llava_onevision, instructblip, qwen2, qwen)]
    )
    known = list(dict.fromkeys(t[1].__name__ for t in todo))
    if bad := [m for m in a.only if m not in known]:
        parser.error(f"no model '{bad[0]}': choose from {', '.join(known)}")
    for work, make, *more in (t for t in todo if not a.only or t[1].__name__ in a.only):
        start = time.perf_counter()
        work(make, a.tiny, device, *more)
        if device.type == 'cuda':
            torch.cuda.empty_cache()
        if not a.tiny:
            bench.write(
                'gpu', 'Costs on a GPU', keep=True
            )  # after each, so that a run that is cut short has what was measured
        print(f'({work.__name__} of {make.__name__}: {time.perf_counter() - start:.0f} s)', flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
