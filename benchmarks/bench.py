"""What things cost on a CPU: every ratio measured in one run, fast and naive interleaved. `make bench`, or `python benchmarks/bench.py --quick`.

FLOPs are counted by torch and decide; times are CPU times, medians of pairs with their quartiles; peak memory is that of fresh processes.
Models have random weights and the proportions of real ones; answers have one token, so that the sweep and not the decoding is measured.
"""

import argparse, os, platform, resource, shutil, statistics, subprocess, sys, tempfile, time
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, torch, transformers
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from fusion_notebooks import causal, contrast, demo, explore, masking
from fusion_notebooks.hooks import capture, edit
from fusion_notebooks.mllm import MLLM, Sample, accelerator, device_label

HERE, RUN = Path(__file__).parent, time.strftime('%Y-%m-%d %H:%M')


def build(layers, side, width=256, heads=4, kv=4, seed=0):
    "A LLaVA of random weights with side² visual tokens; its vision tower is negligible"
    T, tok = transformers, demo.make_tokenizer()
    text = T.LlamaConfig(
        vocab_size=len(tok),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    vision = T.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=2 * side,
        patch_size=2,
        projection_dim=32,
    )
    torch.manual_seed(seed)
    model = T.LlavaForConditionalGeneration(
        T.LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=tok.image_token_id,
            vision_feature_layer=-1,
            image_seq_length=side**2,
        )
    )
    model.generation_config.update(eos_token_id=list(range(len(tok))), pad_token_id=2)  # every token ends the answer
    images = T.CLIPImageProcessor(size=dict(shortest_edge=2 * side), crop_size=dict(height=2 * side, width=2 * side))
    processor = T.LlavaProcessor(
        images,
        tok,
        patch_size=2,
        vision_feature_select_strategy='default',
        image_token='<image>',
        num_additional_image_tokens=1,
        chat_template=demo.CHAT,
    )
    return MLLM(model, processor, f'{layers} layers, {side**2} visual tokens')


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype='uint8'))


def question(mllm, tail):
    "A question that makes a tail of so many rows"
    p = mllm.prompt(picture(0), 'red red')
    return ' '.join(['red'] * (2 + tail - (p.length - int(p.visual[-1]) - 1)))


class Untracked:
    "In place of torch's tracker of modules, whose hooks on all modules would send sweeps down their slow path"

    parents = {'Global'}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def flops(work):
    "Of one call, as torch counts them"

    def attention(q, k, v, *a, out_shape=None, **kw):
        return sdpa_flop_count(q, *((x[0], q[1], *x[2:]) for x in (k, v)))  # grouped keys count once per query head

    kernels = ('flash_attention_for_cpu', 'flash_attention', 'efficient_attention', 'cudnn_attention')
    ways = {getattr(torch.ops.aten, f'_scaled_dot_product_{k}'): attention for k in kernels}
    counter = FlopCounterMode(display=False, custom_mapping=ways)
    counter.mod_tracker = Untracked()
    with counter:
        work()
    return counter.get_total_flops()


CLOCK = time.process_time  # CPU time; gpu.py takes the wall's


def timed(repeats, **works):
    "name → seconds per repetition; the works are interleaved, and each gets the number of the repetition"
    seconds = {k: [] for k in works}
    for r in range(repeats):
        for k, work in works.items():
            start = CLOCK()
            work(r)
            seconds[k].append(CLOCK() - start)
    return seconds


def ratio(seconds, a, b='plain'):
    "Median of the paired ratios, with quartiles"
    r = np.array(seconds[a]) / np.array(seconds[b])
    return float(np.median(r)), f'{np.quantile(r, 0.25):.2f}–{np.quantile(r, 0.75):.2f}'


rows = []


def row(what, value, spread='', limit=None, unit='×'):
    rows.append(
        dict(
            what=what,
            value=float(f"{value:.4g}"),
            spread=spread,
            limit=limit,
            unit=unit,
            holds='' if limit is None else 'yes' if value <= limit else 'no',
        )
    )
    print(
        f'{what:<92} {value:9.4g} {unit:<4} {spread:<12} {"" if limit is None else f"limit {limit}: " + rows[-1]["holds"]}',
        flush=True,
    )


def plain(mllm, ask):
    def work(r=0):
        with torch.inference_mode():
            mllm.model(**mllm.prompt(picture(1000 + r), ask).inputs, use_cache=True, logits_to_keep=1)

    return work


def sweeps(mllm, ask):
    "how → one whole sweep of a new picture, with a warm bank and a donor that is known"
    donor = Sample(picture(0), ask, id='donor')

    def of(k, how):
        return lambda r=0: masking.sweep(
            mllm, [Sample(picture(10_000 * (k + 1) + r), ask, id='s')], how, donors=[donor], limit=1
        )  # no picture twice

    works = {how: of(k, how) for k, how in enumerate(('knockout', 'swap', 'zero'))}
    for work in works.values():
        work(9_999)
    return works


def naive(mllm, ask, layers):
    "The loop a user would write: a forward per layer with a hook on it, and a plain one"

    def work(r=0):
        p = mllm.prompt(picture(2000 + r), ask)
        for i in [None, *layers]:
            with torch.inference_mode():
                if i is None:
                    mllm.model(**p.inputs, use_cache=True, logits_to_keep=1)
                else:
                    with edit(mllm, i, p.visual, 'knockout'):
                        mllm.model(**p.inputs, use_cache=True, logits_to_keep=1)

    return work


def sweep_bench(name, layers, side, tail, repeats, limit_flops=1.05, limit_time=None, loop=1, **kw):
    mllm = build(layers, side, **kw)
    ask = question(mllm, tail)
    p = mllm.prompt(picture(0), ask)
    bound, one, works = 1 + tail / p.length * (layers + 1) / 2, plain(mllm, ask), sweeps(mllm, ask)
    base = flops(one)
    row(f'{name}: bound 1 + (T/S)(L + 1)/2, in forwards', bound)
    for how, work in works.items():
        row(
            f'{name}: FLOPs of a {how} sweep over the bound', flops(lambda: work(500)) / base / bound, limit=limit_flops
        )
    some = range(0, layers, max(1, layers // loop))
    loops = naive(mllm, ask, some)
    row(f'{name}: FLOPs of the hook-per-layer loop, in forwards', (flops(loops) - base) / base * layers / len(some) + 1)
    seconds = timed(repeats, plain=one, **works, naive=loops)
    row(f'{name}: one forward', statistics.median(seconds['plain']), unit='s')
    for how in works:
        row(f'{name}: time of a {how} sweep, in forwards', *ratio(seconds, how), limit=limit_time)
    row(
        f'{name}: time of the hook-per-layer loop, in forwards',
        1 + (ratio(seconds, 'naive')[0] - 1) * layers / len(some),
        f'of {len(some)} layers',
    )


def growth_bench(repeats):
    "How the cost of a knockout sweep grows"
    for label, (layers, side, tail) in {
        '8 layers': (8, 16, 24),
        '16 layers': (16, 16, 24),
        '32 layers': (32, 16, 24),
        '144 visual tokens': (12, 12, 24),
        '576 visual tokens': (12, 24, 24),
        '1296 visual tokens': (12, 36, 24),
        'tail of 12': (12, 16, 12),
        'tail of 48': (12, 16, 48),
        'tail of 192': (12, 16, 192),
    }.items():
        mllm = build(layers, side, 128)
        ask = question(mllm, tail)
        one, work = plain(mllm, ask), sweeps(mllm, ask)['knockout']
        count = flops(lambda: work(500)) / flops(one)
        value, spread = ratio(timed(repeats, plain=one, sweep=work), 'sweep')
        row(f'growth, {label}: FLOPs of a knockout sweep, in forwards', count)
        row(f'growth, {label}: time of a knockout sweep, in forwards', value, spread)
    mllm = build(12, 12, 128)
    ask = question(mllm, 24)
    for n in (1, 4, 16):
        many = lambda r, n=n: masking.sweep(
            mllm, [Sample(picture(10_000 * n + 100 * r + k), ask, id=f'{k}') for k in range(n)], 'knockout', limit=1
        )  # no picture twice
        many(repeats)
        seconds = timed(repeats, plain=plain(mllm, ask), sweep=many)
        row(f'growth, {n} samples at once: time per sample, in forwards', ratio(seconds, 'sweep')[0] / n)


def causal_works(mllm, ask):
    "name → one causal map of a new picture: of first order, and with a number of steps along each layer's closing"

    def of(k, steps):
        return lambda r=0: causal.maps(mllm, picture(20_000 * (k + 1) + r), ask, steps=steps)

    works = {f'{steps} steps': of(k, steps) for k, steps in enumerate((1, 2, 3))}
    for work in works.values():
        work(9_999)
    return works


def causal_bench(name, layers, side, tail, repeats, first=1.2, **kw):
    "What a map of every layer, head and visual token costs"
    mllm = build(layers, side, **kw)
    ask = question(mllm, tail)
    one, works = plain(mllm, ask), causal_works(mllm, ask)
    base = flops(one)
    limits = {'1 steps': first, '2 steps': 4}
    for steps, work in works.items():
        count = flops(lambda: work(500)) / base
        row(f'{name}: FLOPs of a causal map, {steps}, in forwards', count, limit=limits.get(steps))
    seconds = timed(repeats, plain=one, **works)
    for steps in works:
        row(f'{name}: time of a causal map, {steps}, in forwards', *ratio(seconds, steps))


def maps_together(mllm, some, r):
    "Causal maps of some prompts in shared batches"
    causal.maps_of(mllm, some[2 * r])


def maps_alone(mllm, some, r):
    "Causal maps of as many others, one by one"
    for p in some[2 * r + 1]:
        causal.maps(mllm, p)


def causal_batch_bench(n, repeats):
    "Causal maps of several questions in shared batches, over one call for each"
    for name in ('glyph-llava', 'glyph-qwen2vl'):
        mllm, asked = MLLM.load(name), demo.samples(2 * n * (repeats + 1))
        prompts = [mllm.prompt(s.image, s.question) for s in asked]

        some = [prompts[k : k + n] for k in range(0, len(prompts), n)]
        together, alone = partial(maps_together, mllm, some), partial(maps_alone, mllm, some)
        together(repeats)
        seconds = timed(repeats, plain=alone, together=together)
        row(f'{name}: time of {n} causal maps in shared batches, over single calls', *ratio(seconds, 'together'))


def causal_memory_bench(side, layers):
    "Peak memory of a map of first order beside that of a forward, fresh processes"
    most = {kind: peak(kind, side, layers) for kind in ('plain', 'causal')}
    row(f'causal map of first order at {side**2 + 44} tokens: peak memory of the process over a forward\'s',
        most['causal'] / most['plain'], limit=1.3)  # fmt: skip


def forward_of(kind, side, layers):
    "A forward over a long prompt, watched in one of three ways, or a causal map of first order"
    mllm = build(layers, side)
    p = mllm.prompt(picture(0), question(mllm, 40))

    def work(r=0):
        if kind == 'causal':
            return causal.maps(mllm, p, steps=1)
        with torch.inference_mode():
            if kind == 'capture':
                with capture(mllm) as cache:
                    mllm.model(**p.inputs, use_cache=False, logits_to_keep=1)
                return cache.attention
            return mllm.model(**p.inputs, use_cache=False, logits_to_keep=1, output_attentions=kind == 'eager')

    if kind == 'eager':
        mllm.model.set_attn_implementation({'text_config': 'eager'})
    return work


def peak_memory():
    "Of this process, KiB; Linux's getrusage would count that of the process it was started from"
    if sys.platform == 'darwin':
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])


def peak(kind, side, layers):
    "Median of three fresh processes, for one differs from the next by tens of MiB"
    return statistics.median(peak_once(kind, side, layers) for _ in range(3))


def peak_once(kind, side, layers):
    out = subprocess.run(
        [sys.executable, __file__, '--peak', kind, str(side), str(layers)], capture_output=True, text=True
    )
    if out.returncode:
        raise RuntimeError(out.stderr[-400:])
    return int(out.stdout.split()[-1])


def capture_bench(side, layers, repeats):
    works = {k: forward_of(k, side, layers) for k in ('plain', 'capture', 'eager')}
    for w in works.values():
        w()
    count, n = {k: flops(w) for k, w in works.items()}, side**2 + 44
    row(f'capture at {n} tokens: FLOPs over a plain forward', count['capture'] / count['plain'], limit=1.05)
    seconds = timed(repeats, **works)
    row(f'capture at {n} tokens: time over a plain forward', *ratio(seconds, 'capture'), limit=1.1)
    row(f'eager with output_attentions at {n} tokens: time over a plain forward', *ratio(seconds, 'eager'))
    most = {k: peak(k, side, layers) for k in works}
    row('eager with output_attentions: extra peak memory', (most['eager'] - most['plain']) / 1024, unit='MiB')
    row(
        "capture: extra peak memory, share of eager's",
        max(0, most['capture'] - most['plain']) / (most['eager'] - most['plain']),
        limit=0.02,
    )


def crop_floor(mllm, one, two):
    "FLOPs of the least that a crop asks for, in plain answers: the picture's pass, then the crop's and the question's rows, which attend to the picture's as well"
    c, m = mllm.model.config.get_text_config(), two.length - int(one.visual[-1]) - 1
    linear, attention = (
        2 * (4 * c.hidden_size**2 + 3 * c.hidden_size * c.intermediate_size),
        lambda rows, keys: 4 * rows * keys * c.hidden_size,
    )
    return 1 + (m * linear + attention(m, two.length)) / (one.length * linear + attention(one.length, one.length))


def refine_bench(layers, side, repeats, **kw):
    mllm = build(layers, side, **kw)
    ask = question(mllm, 40)
    answer = lambda r: mllm.answer(picture(r), ask)
    mask = lambda r: contrast.refine(mllm, picture(r), ask, how='mask')
    crop = lambda r: contrast.refine(mllm, picture(r), ask, how='crop', base=48)

    def twice(r):
        one = contrast.first_pass(mllm, picture(r), ask)
        mllm.answer([picture(r), picture(r).crop((0, 0, 48, 48))], ask)
        return one

    for w in (answer, mask, crop):
        w(0)
    base, name = (
        flops(lambda: answer(1)),
        f'refine at {side**2} tokens, {mllm.model.config.get_text_config().hidden_size} wide',
    )
    row(
        f'{name}: least FLOPs that a crop asks for, over a plain answer',
        crop_floor(mllm, mllm.prompt(picture(1), ask), mllm.prompt([picture(1)] * 2, ask)),
    )
    if not repeats:
        return row(f'{name}: FLOPs of crop over a plain answer', flops(lambda: crop(2)) / base)
    row(f'{name}: FLOPs of mask over a plain answer', flops(lambda: mask(2)) / base, limit=1.1)
    row(f'{name}: FLOPs of crop over a plain answer', flops(lambda: crop(3)) / base, limit=2.2)
    row(f'{name}: FLOPs of crop with two whole passes', flops(lambda: twice(4)) / base)
    seconds = timed(
        repeats,
        plain=lambda r: answer(10 + r),
        mask=lambda r: mask(100 + r),
        crop=lambda r: crop(200 + r),
        twice=lambda r: twice(300 + r),
    )
    row(f'{name}: time of mask over a plain answer', *ratio(seconds, 'mask'), limit=1.1)
    row(f'{name}: time of crop over a plain answer', *ratio(seconds, 'crop'), limit=2.2)
    row(f'{name}: time of crop with two whole passes', *ratio(seconds, 'twice'))


def demo_bench(n):
    "The masking analysis of the study, and the budgets of other parts"
    mllm = MLLM.load('glyph-llava')
    some, reference = demo.samples(n), demo.samples(16, 'calibration')
    kw = dict(
        how=('zero', 'mean', 'swap', 'knockout', 'soft'),
        mean=masking.mean_states(mllm, reference),
        donors=(reference * n)[:n],
    )

    def fast(r):
        mllm.kept.clear()
        mllm.kept.sizes.clear()
        masking.sweep(mllm, some, **kw)

    few = max(1, n // 8)
    seconds = timed(
        3,
        fast=fast,
        naive=lambda r: masking.sweep(mllm, some[:few], exact='naive', **kw | dict(donors=reference[:few])),
    )
    row(
        f'demo: five semantics × 8 layers, {n} pictures, nothing kept from before',
        statistics.median(seconds['fast']),
        unit='s',
    )
    row(f'demo: the same naively, from {few} pictures', statistics.median(seconds['naive']) * n / few, unit='s')
    p = mllm.prompt(some[0].image, some[0].question)

    def masked(r):
        with edit(mllm, [2, 3], p.visual[10:20], 'zero'):
            mllm.answer(p)

    seconds = timed(5, answer=lambda r: mllm.answer(p), masked=masked)
    row('demo: an answer', statistics.median(seconds['answer']), unit='s')
    row('demo: an answer with some tokens masked', statistics.median(seconds['masked']), limit=1, unit='s')
    start = time.perf_counter()
    subprocess.run([sys.executable, '-c', 'import fusion_notebooks'], check=True)
    row('import fusion_notebooks, python included', time.perf_counter() - start, limit=0.3, unit='s')


def explorer_bench(moves):
    "From a key on the layer slider to the picture, in Chromium where there is one and playwright to drive it: a recorded page runs the code that a notebook runs"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return
    if not (chromium := shutil.which('chromium') or shutil.which('google-chrome')):
        return
    shown = explore.recorded(
        explore.see(MLLM.load('glyph-llava'), HERE.parent / 'data/example.png', 'Which digit is on the purple star?'),
        patches=False,
    )
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as p:
        (file := Path(folder) / 'page.html').write_text(f'<!doctype html><meta charset="utf-8">{shown}')
        page = p.chromium.launch(executable_path=chromium, args=['--no-sandbox']).new_page()
        page.goto(file.as_uri())
        page.wait_for_selector('.fx canvas[data-draws]')
        page.focus('.fx input[type=range]')
        page.evaluate("""() => { const c = document.querySelector('.fx canvas'); window.drawn = []; document.addEventListener('keydown', () => { window.pressed = performance.now() }, true)
            new MutationObserver(() => { if (window.pressed) drawn.push((performance.now() - window.pressed)/1000); window.pressed = null }).observe(c, { attributeFilter: ['data-draws'] }) }""")
        for _ in range(moves):
            for key in ('ArrowLeft', 'ArrowRight'):
                page.keyboard.press(key)
        drawn = page.evaluate('drawn')
        page.context.browser.close()
    row(
        'explorer: the layer slider moves, until the picture is drawn (Chromium)',
        statistics.median(drawn),
        f'≤ {max(drawn):.3f}',
        limit=0.05,
        unit='s',
    )


def engine_bench(units, samples):
    "The command `fusion` over an analysis without a model (tests/fake_study.py): what the engine adds to units that wait for a second, and how soon a finished study is over"

    def study(folder, samples, wait, runs, unit):
        (folder / 'model').mkdir(parents=True)
        (folder / 'model/config.json').write_text('{"num_hidden_layers": 4}')
        (folder / 'model/model.safetensors').write_bytes(b'weights')
        (folder / 'settings.ini').write_text(
            f'[study]\nmodels = {folder}/model\nanalyses = early_exit\nresults = results\nruns = runs\nfigures = figures\nunit = {unit}\n[limits]\ncalibration = {samples}\nevaluation = {samples}\n'
        )
        for _ in range(runs):
            start = time.perf_counter()
            subprocess.run(
                [
                    sys.executable,
                    HERE.parent / 'tests/fake_study.py',
                    'study',
                    '--rows',
                    '--settings',
                    folder / 'settings.ini',
                ],
                cwd=folder,
                check=True,
                capture_output=True,
                env=os.environ
                | dict(PYTHONPATH=str(HERE.parent), FAKE_LOG=str(folder / 'log'), FAKE_SECONDS=str(wait)),
            )
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        more = study(Path(folder) / 'one', 8 * units, 1, 1, 16) - units
        row(
            f'study: what the engine adds to units of 10 s, its start shared by {units}',
            more / units / 10,
            limit=0.05,
            unit='',
        )
        row(
            f'study: a finished one of {8 * samples:,} rows, from start to end',
            study(Path(folder) / 'two', samples, 0, 2, 32),
            limit=3,
            unit='s',
        )


def hardware():
    device = accelerator()
    kind = f'{platform.machine()} CPU' if device.type == 'cpu' else device_label(device)
    return f'{time.strftime("%Y-%m-%d")} · {kind}, {torch.get_num_threads()} thread{"s" * (torch.get_num_threads() > 1)} · Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}'


def write(stem, title, keep=False, folder=None):
    "The rows as CSV and as a Markdown table; `keep` leaves rows that the table has already and that were not measured now, and says when each run began"
    folder, table = folder or HERE / 'results', pd.DataFrame(rows)
    folder.mkdir(parents=True, exist_ok=True)
    if keep and (folder / f'{stem}.csv').exists():
        table = pd.concat(
            [pd.read_csv(folder / f'{stem}.csv', keep_default_na=False), table.fillna('').assign(run=RUN)]
        )
        table = table.drop_duplicates('what', keep='last').set_index('what').loc[table.what.unique()].reset_index()
    table.to_csv(folder / f'{stem}.csv', index=False)
    lines = [
        '| ' + ' | '.join(str('' if v is None or v != v else v) for v in r) + ' |'
        for r in table.itertuples(index=False)
    ]
    (folder / f'{stem}.md').write_text(
        f'# {title}\n\n{hardware()}\n\n| '
        + ' | '.join(table)
        + ' |\n|'
        + ' --- |' * len(table.columns)
        + '\n'
        + '\n'.join(lines)
        + '\n'
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='small models, nothing written')
    parser.add_argument('--peak', nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if a.peak:
        forward_of(a.peak[0], int(a.peak[1]), int(a.peak[2]))()
        return print(peak_memory())
    start = time.perf_counter()
    if a.quick:
        sweep_bench('8 layers, 144 + 24', 8, 12, 24, 3, width=128, loop=8)
        causal_bench('8 layers, 144 + 24', 8, 12, 24, 3, first=None, width=128)
        causal_batch_bench(16, 2)
        capture_bench(40, 4, 3)
        refine_bench(6, 12, 3)
        demo_bench(8)
        explorer_bench(10)
        engine_bench(8, 100)
    else:
        sweep_bench('24 layers, 576 + 40', 24, 24, 40, 3, limit_time=2.2, loop=3, width=512, heads=8, kv=8)
        sweep_bench('LLaVA-1.5, 32 layers, 576 + 40', 32, 24, 40, 2)
        sweep_bench('12 layers, 2025 + 40', 12, 45, 40, 3, limit_time=1.4)
        sweep_bench('LLaVA-NeXT, 16 layers, 2916 + 40', 16, 54, 40, 2, width=128)
        sweep_bench('Qwen2-VL, 28 layers, 1369 + 40, grouped queries', 28, 37, 40, 2, width=128, kv=1)
        causal_bench('24 layers, 576 + 40', 24, 24, 40, 3, width=512, heads=8, kv=8)
        causal_bench('LLaVA-NeXT, 16 layers, 2916 + 40', 16, 54, 40, 2, first=1.1, width=128)
        causal_batch_bench(16, 5)
        causal_memory_bench(54, 6)
        growth_bench(3)
        capture_bench(54, 6, 5)
        refine_bench(6, 24, 3, width=1024, heads=16, kv=16)
        refine_bench(6, 24, 0)
        demo_bench(24)
        explorer_bench(20)
        engine_bench(12, 1250)
    row('this benchmark', time.perf_counter() - start, unit='s')
    if not a.quick:
        write('cpu', 'Costs on a CPU')
    return int(any(r['holds'] == 'no' and 'FLOPs' in r['what'] for r in rows))


if __name__ == '__main__':
    sys.exit(main())
