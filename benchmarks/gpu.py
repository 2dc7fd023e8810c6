"""Costs on an accelerator, at the real shapes of LLaVA-1.5-7B, LLaVA-NeXT and Qwen2.5-VL-7B with random weights in bfloat16: `python benchmarks/gpu.py`.

Parts come in order of importance, each is written as soon as it is done, and none begins when `--minutes` (8) are over:

    costs    a sweep of each semantic, capture, causal maps and refining, in forwards; peak memory
    study    a study's masking of 64 samples, beside the loop a user would write and beside bare forwards, in samples per second
    exact    fast sweeps against naive ones at three layers, in float32
    doctor   the self-checks

`gpu.py study`, `gpu.py qwen` and `gpu.py exact.llava` run what they name only; what is measured replaces what the record says of it, and the rest of the record stays. `--out FOLDER` has another
record. `--tiny` runs all of it on small models, on any device, and writes nothing unless `--out` is given. Times are the wall's, medians of interleaved pairs. The floor of a forward is the larger
of reading every weight once, at the measured copy rate, and of its operations, at the measured matrix rate; it is compared with a forward whose picture is on the device already, everything else
starts from a picture.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import bench
import torch
import transformers as T
from bench import flops, picture, question, ratio, row, timed

from fusion_notebooks import contrast, demo, masking
from fusion_notebooks.core.errors import BadInput, NotSupported
from fusion_notebooks.doctor import doctor, randomise
from fusion_notebooks.hooks import capture
from fusion_notebooks.mllm import MLLM, PlainProcessor, Sample, accelerator, empty_cache, synchronize


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
    vocabulary = config.get_text_config().vocab_size
    ends = list(range(2, vocabulary))  # answers of one token; a beam search wants some tokens that end nothing
    model.generation_config.update(eos_token_id=ends, pad_token_id=2)
    return MLLM(model, processor(model), make.__name__)


HOWS = ('knockout', 'swap', 'zero')
LIMITS = dict(llava_next=1.4, llava=2.2, qwen=1.4)  # forwards that a sweep of all layers may take


def sync(work, device):
    "A call that ends when the device has"

    def done(r=0):
        out = work(r)
        synchronize(device)
        return out

    return done


def rates(device, n):
    "(bytes per second of a copy, operations per second of a matrix product)"
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    s = timed(5, copy=sync(lambda r: a.clone(), device), matmul=sync(lambda r: a @ a, device))
    return 2 * a.nbytes / min(s['copy']), 2 * n**3 / min(s['matmul'])


def forward_rows(mllm, p, seconds, count, tiny):
    "What a forward takes, and how far from its floor"
    read, multiply = rates(mllm.device, 256 if tiny else 8192)
    weights = sum(q.nbytes for q in mllm.model.parameters())
    ready = statistics.median(seconds['ready'])
    row(f'{mllm.name}: a forward from a picture', statistics.median(seconds['plain']), unit='s')
    row(f'{mllm.name}: a forward, picture on the device', ready, unit='s')
    row(f'{mllm.name}: the same over its floor', ready / max(weights / read, count / multiply))


def cost_works(mllm, p, ask):
    "name → what is timed beside a forward, each of a new picture"

    def captured(r):
        with torch.inference_mode(), capture(mllm) as cache:
            mllm.model(**mllm.prompt(picture(1000 + r), ask).inputs, use_cache=True, logits_to_keep=1)
        return cache.attention

    def ready(r):
        with torch.inference_mode():
            mllm.model(**p.inputs, use_cache=True, logits_to_keep=1)

    works = bench.sweeps(mllm, ask)
    works['naive'] = bench.naive(mllm, ask, [mllm.n_layers // 2])
    works |= dict(ready=ready, capture=captured, answer=lambda r: mllm.answer(picture(3000 + r), ask))
    works['mask'] = lambda r: contrast.refine(mllm, picture(4000 + r), ask, how='mask')
    works['crop'] = lambda r: contrast.refine(mllm, picture(5000 + r), ask, base=48)
    return works | {f'causal map, {steps}': work for steps, work in bench.causal_works(mllm, ask).items()}


def warmed(mllm, works):
    "The works that can be done with this model, each done once"
    found = {}
    for name, work in works.items():
        work = sync(work, mllm.device)
        try:
            work(9_000)
        except (BadInput, NotSupported) as e:
            print(f'{mllm.name}: no {name} ({e})')
        else:
            found[name] = work
    return found


def peak(device, reset=False):
    "Bytes that torch has held at most since it was reset; None where a device does not count"
    if device.type == 'cpu':
        return None
    module = torch.get_device_module(device)
    name = 'reset_peak_memory_stats' if reset else 'max_memory_allocated'
    return getattr(module, name)() if hasattr(module, name) else None


def costs(make, tiny, device):
    "A sweep of each semantic, capture, causal maps and refining, in forwards"
    mllm = build(make, tiny, device)
    name, ask, L = mllm.name, question(mllm, 40), mllm.n_layers
    p, forward = mllm.prompt(picture(0), ask), bench.plain(mllm, ask)
    tail, count = p.length - int(p.visual[-1]) - 1, flops(forward)
    path = masking.path_of(mllm, masking.Variant(p, 'zero', [L - 1]))
    print(f'{name}: {p.length} rows, {tail} of them tail, path {path} for zero')
    works = warmed(mllm, cost_works(mllm, p, ask))
    peak(device, reset=True)
    seconds = timed(2 if tiny else 5, plain=sync(forward, device), **works)
    most = peak(device)
    forward_rows(mllm, p, seconds, count, tiny)
    row(f'{name}: bound of a sweep, 1 + (T/S)(L + 1)/2, in forwards', 1 + tail / p.length * (L + 1) / 2)
    for how in HOWS:
        row(f'{name}: {how} sweep of {L} layers, in forwards', *ratio(seconds, how), limit=LIMITS[name])
    row(f'{name}: naive sweep, in forwards (from one layer)', 1 + (ratio(seconds, 'naive')[0] - 1) * L)
    row(f'{name}: capture over a forward', *ratio(seconds, 'capture'), limit=1.1)
    for k in works:
        if k.startswith('causal'):
            row(f'{name}: {k}, in forwards', *ratio(seconds, k))
    for how, limit in dict(mask=1.1, crop=2.2).items():
        if how in works:
            row(f'{name}: refine by {how} over a plain answer', *ratio(seconds, how, 'answer'), limit=limit)
    if most:
        row(f'{name}: peak memory', most / 2**30, unit='GiB')


def study(make, tiny, device):
    "A study's masking of many samples, beside the loop a user would write and beside bare forwards"
    mllm = build(make, tiny, device)
    name, ask, L, n = mllm.name, question(mllm, 40), mllm.n_layers, 4 if tiny else 64
    some = [Sample(picture(6000 + k), ask, id=f'{k}') for k in range(n)]
    masking.sweep(mllm, some[:2], HOWS, limit=1)  # the bank, which a study makes once
    sweep = sync(lambda r: masking.sweep(mllm, some, HOWS, limit=1), device)
    few = [0, L - 1]
    loop, bare = sync(bench.naive(mllm, ask, few), device), sync(bench.plain(mllm, ask), device)
    loop(8_000)
    peak(device, reset=True)
    seconds = timed(1, sweep=sweep)['sweep'][0] / n
    most = peak(device)
    each = timed(3, loop=loop, bare=bare)
    forward = statistics.median(each['bare'])
    naive = forward + (statistics.median(each['loop']) - forward) * len(HOWS) * L / len(few)
    row(f'{name}: a study of {n} samples, {len(HOWS)} sweeps each, samples per second', 1 / seconds, unit='1/s')
    row(
        f'{name}: the same by the hook-per-layer loop (from {len(few)} layers), samples per second',
        1 / naive,
        unit='1/s',
    )
    row(f'{name}: bare forwards from pictures per second', 1 / forward, unit='1/s')
    row(f'{name}: time of a sample in the study over that in the loop', seconds / naive, limit=0.05)
    row(f'{name}: time of a sample in the study, in bare forwards', seconds / forward)
    if most:
        row(f'{name}: peak memory of the study', most / 2**30, unit='GiB')


def exact(make, tiny, device):
    "Fast sweeps against naive ones at three layers of the real size, in float32; weights are enlarged so that the picture matters"
    mllm = build(make, tiny, device, torch.float32)
    randomise(mllm.model)
    ask = question(mllm, 40)
    some, layers = [Sample(picture(k), ask, id=f'{k}') for k in range(2)], [0, mllm.n_layers // 2, mllm.n_layers - 1]
    for how in HOWS:
        fast, slow = (masking.sweep(mllm, some, how, layers=layers, exact=x, limit=1) for x in ('auto', 'naive'))
        edited = slow.layer >= 0
        effect = slow.logp[edited] - slow.groupby('sample').logp.transform('first')[edited]
        off = abs(fast.logp - slow.logp).max()
        what = f'{mllm.name}: {how} in float32, fast against naive, largest difference of log-probability'
        row(what, off, f'{abs(effect).max():.2f} masked', limit=1e-4, unit='nats')
        if (fast.prediction != slow.prediction).any():
            print(f'{mllm.name}: {how}: {(fast.prediction != slow.prediction).sum()} of {len(fast)} answers differ')


def self_checks(make, tiny, device):
    "The doctor on a model of the real size; small weights are enlarged so that the picture matters"
    mllm = build(make, tiny, device)
    report = doctor(MLLM(randomise(mllm.model), mllm.processor, mllm.name))
    failed = [c for c in report.checks if not c.ok]
    row(f'{mllm.name}: self-checks that fail, of {len(report.checks)}', len(failed), limit=0, unit='')
    for c in failed:
        print(f'{mllm.name}: {c.name}: {c.reason}')


ALL = (llava_next, llava, qwen, vipllava, llava_onevision, instructblip, qwen2)
PARTS = dict(  # in order of importance
    costs=(costs, (llava_next, llava, qwen)),
    study=(study, (llava, llava_next)),
    exact=(exact, (llava, qwen)),
    doctor=(self_checks, ALL),
)


def chosen(only):
    "(name, part, model) of the parts with these names: of a part, of a model, or of both with a point between"
    found = []
    for part, (work, models) in PARTS.items():
        for make in models:
            names = {part, make.__name__, f'{part}.{make.__name__}'}
            if not only or names & set(only):
                found.append((f'{part}.{make.__name__}', work, make))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--tiny', action='store_true', help='small models, on any device')
    parser.add_argument('--minutes', type=float, default=8, help='after which no part begins')
    parser.add_argument('--out', type=Path, help='folder of the record; default: that of this repository')
    parser.add_argument('only', nargs='*', help='parts or models to run, or part.model; default: all')
    a = parser.parse_args()
    if unknown := [name for name in a.only if not chosen([name])]:
        known = [*PARTS, *(make.__name__ for make in ALL)]
        parser.error(f"no part or model '{unknown[0]}': choose from {', '.join(known)}")
    T.logging.set_verbosity_error()
    bench.CLOCK = time.perf_counter
    device = accelerator()
    if device.type == 'cpu' and not a.tiny:
        print('No accelerator here: run this where there is one, or with --tiny.', file=sys.stderr)
        return 2
    begin, left = time.perf_counter(), []
    for name, work, make in chosen(a.only):
        start = time.perf_counter()
        if start - begin > 60 * a.minutes:
            left.append(name)
            continue
        work(make, a.tiny, device)
        empty_cache(device)
        if a.out or not a.tiny:
            bench.write('gpu', 'Costs on a GPU', keep=True, folder=a.out)
        print(f'({name}: {time.perf_counter() - start:.0f} s)', flush=True)
    if left:
        print(f'Not begun within {a.minutes:g} minutes: {" ".join(left)}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
