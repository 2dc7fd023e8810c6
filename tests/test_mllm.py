"The handle: geometry, prompts, batches and what is refused"

import numpy as np, pytest, torch
from PIL import Image
from fusion_notebooks import demo
from fusion_notebooks.mllm import MLLM, open_image
from conftest import noise_image


@pytest.mark.parametrize('size', [(384, 384), (200, 100), (101, 317), (96, 96)])
def test_boxes_are_where_the_pixels_are(tiny, size):
    "Paint one token's box white: only the patch of that token changes in what the processor makes"
    grey = Image.new('RGB', size, (90, 90, 90))
    g = tiny.prompt(grey, 'What?').grids[0]
    pixels = lambda im: tiny.prompt(im, 'What?').inputs['pixel_values'][0].mean(0)
    before = pixels(grey)
    for k in (0, 9, 27, 63):
        l, t, r, b = g.boxes[k]
        im = grey.copy()
        im.paste((255, 255, 255), tuple(int(round(v)) for v in (l, t, r, b)))
        change = (pixels(im) - before).abs().reshape(8, 12, 8, 12).mean((1, 3)).flatten()
        assert change.argmax() == k and change[k] > 0.8 * change.sum() - 0.2


def test_dropped_pixels_are_reported(tiny):
    assert tiny.prompt(noise_image(0, (384, 384)), 'What?').grids[0].kept == 1
    assert abs(tiny.prompt(noise_image(0, (400, 200)), 'What?').grids[0].kept - 0.5) < 0.02


@pytest.mark.parametrize('size', [(96, 96), (40, 240), (300, 50)])
def test_a_small_picture_may_become_many_tokens(size):
    "Places are read from grey levels, of which a small picture has few: rows are told apart all the same"
    qwen = MLLM.load('glyph-qwen2vl')
    qwen.processor.image_processor.size = dict(shortest_edge=1400 * 12**2, longest_edge=1500 * 12**2)
    (g,) = qwen.prompt(noise_image(0, size), 'What?').grids
    assert g.h * g.w > 1300 and abs(g.h / g.w * size[0] / size[1] - 1) < 0.1 and g.kept > 0.99
    rows, cols = np.divmod(np.arange(g.h * g.w), g.w)
    want = np.stack([cols / g.w, rows / g.h, (cols + 1) / g.w, (rows + 1) / g.h], 1) * [*size, *size]
    assert abs(g.boxes - want).max() < max(size) / 200


def test_pictures_are_prepared_once_and_counted_anew_under_other_settings():
    "How many tokens a picture of some size becomes is known from then on, as long as the processor stays as it is"
    qwen, calls, (a, b) = (
        MLLM.load('glyph-qwen2vl'),
        [],
        (noise_image(k, size) for k, size in enumerate([(96, 96), (60, 90)])),
    )

    def prompts():
        real, calls[:] = qwen.processor.image_processor, []
        qwen.processor.image_processor = lambda images, **kw: calls.append(len(images)) or real(images=images, **kw)
        vars(qwen.processor.image_processor).update(vars(real))
        p = qwen.prompt([a, b], 'What?')
        qwen.processor.image_processor = real
        return [len(p.visual), int(p.inputs['image_grid_thw'].prod(1).sum())], calls.copy()

    (n, want), first = prompts()
    assert n == want and first == [2, 1, 1]  # sizes never seen: each is counted by itself
    assert prompts() == ([n, want], [2])
    qwen.processor.image_processor.size = dict(shortest_edge=20 * 12**2, longest_edge=30 * 12**2)
    (fewer, want), again = prompts()
    assert fewer == want < n / 2 and again == [2, 1, 1]


def test_two_images(tiny, samples):
    p = tiny.prompt([samples[0].image, samples[1].image], 'What?')
    assert len(p.visual) == 128 and [g.index[0] for g in p.grids] == [0, 64] and (p.visual.diff() == 1).all()


def test_training_sees_what_the_processor_makes(tiny):
    "The packed training pictures and the shipped processor agree to the bit"
    things, noise = demo.layout(3)
    im = demo.picture(3, things, noise)
    view = np.asarray(im.resize((demo.VIEW, demo.VIEW), Image.Resampling.BICUBIC))[None]
    assert (
        demo.packing._pixels(view, tiny.processor, 'cpu') - tiny.prompt(im, 'What?').inputs['pixel_values']
    ).abs().max() < 1e-5


def test_copies_and_batches_equal_single(tiny, samples):
    ps = [tiny.prompt(s.image, s.question) for s in samples] * 2
    for a, b in zip(tiny.answers(ps), [tiny.answer(p) for p in ps]):
        assert a.ids == b.ids and abs(a.logp - b.logp) < 1e-4
    p = ps[0]
    with torch.inference_mode():
        one, many = (tiny.model(**tiny.copies(p, n, [5, 6]), use_cache=False).logits for n in (1, 3))
    assert (many - one).abs().max() < 1e-4 and one.shape[1] == p.length + 2


def test_greedy_is_greedy(tiny, samples):
    p = tiny.prompt(samples[0].image, samples[0].question)
    ids = []
    for _ in range(4):
        with torch.inference_mode():
            ids.append(int(tiny.model(**tiny.copies(p, 1, ids), use_cache=False).logits[0, -1].argmax()))
    assert tiny.generate(p, max_new_tokens=4)[0].ids == ids


@pytest.fixture(scope='session')
def saved(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp('saved') / 'model'
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder


def test_load_roundtrip(saved, tiny, samples):
    m = MLLM.load(str(saved))
    assert m.answer(samples[0].image, samples[0].question) == tiny.answer(samples[0].image, samples[0].question)
    assert m.provenance()['attention'] == 'sdpa' and m.name == 'model'


def test_bad_folders(saved, tmp_path):
    with pytest.raises(ValueError, match='config.json'):
        MLLM.load(str(tmp_path))
    (tmp_path / 'config.json').write_text((saved / 'config.json').read_text())
    (tmp_path / 'pytorch_model.bin').write_bytes(b'not read')
    with pytest.raises(ValueError, match='safetensors'):
        MLLM.load(str(tmp_path))
    with pytest.raises(OSError):
        MLLM.load('/nowhere/at/all')


def test_text_model_is_refused(tmp_path, saved):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='image tower'):
        MLLM.load(str(tmp_path))


def test_transparent_becomes_white():
    assert open_image(Image.new('RGBA', (4, 4), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_hostile_files(tmp_path):
    (tmp_path / 'a.png').write_text('hello')
    with pytest.raises(ValueError, match='not a picture'):
        open_image(tmp_path / 'a.png')
    noise_image(0).save(tmp_path / 'b.png')
    (tmp_path / 'b.png').write_bytes((tmp_path / 'b.png').read_bytes()[:2000])
    with pytest.raises(ValueError, match='damaged or truncated'):
        open_image(tmp_path / 'b.png')
    with pytest.raises(FileNotFoundError, match='No picture'):
        open_image(tmp_path / 'c.png')
    with pytest.raises(ValueError, match='folder'):
        open_image(tmp_path)
    Image.new('1', (40_000, 30_000)).save(tmp_path / 'huge.png')
    with pytest.raises(ValueError, match='pixels'):
        open_image(tmp_path / 'huge.png')


def test_greedy_whatever_the_checkpoint_says(tiny, samples):
    "A repetition penalty in the generation config would change the answer, and is not applied"
    p, config = tiny.prompt(samples[0].image, samples[0].question), tiny.model.generation_config
    plain, before = tiny.answer(p), config.repetition_penalty
    try:
        config.repetition_penalty = 5.0
        assert tiny.answer(p) == plain
        said = tiny.model.generate(**tiny.copies(p), do_sample=False, max_new_tokens=32)[0, p.length :].tolist()
        assert said != plain.ids
    finally:
        config.repetition_penalty = before


def test_layers_on_several_devices(saved, tiny, samples, tmp_path):
    "accelerate decides where layers lie; some lie on disk here, and maps, edits and answers are those of the whole model"
    from fusion_notebooks.hooks import capture, edit

    where = (
        {n: 'cpu' for n, _ in tiny.model.named_parameters()}
        | {'lm_head': 'cpu'}
        | {f'model.language_model.layers.{i}': 'disk' for i in (2, 5)}
    )
    where = {
        k: v for k, v in where.items() if not any(k.startswith(f'model.language_model.layers.{i}.') for i in (2, 5))
    }
    s = samples[0]
    for device_map, kw in (('auto', {}), (where, dict(offload_folder=str(tmp_path)))):
        m = MLLM.load(str(saved), device_map=device_map, **kw)
        p, q = m.prompt(s.image, s.question), tiny.prompt(s.image, s.question)
        assert m.answer(p).ids == tiny.answer(q).ids
        for how in ('zero', 'knockout'):
            with edit(m, 2, p.visual, how), capture(m) as a:
                x = m.answer(p)
            with edit(tiny, 2, q.visual, how), capture(tiny) as b:
                y = tiny.answer(q)
            assert x.ids == y.ids and abs(x.logp - y.logp) < 1e-4 and (a.attention - b.attention).abs().max() < 1e-5


def test_a_cleared_cache_forgets_the_sizes(tiny):
    "`clear` and `pop` left the sizes of what they removed, so the budget shrank"
    tiny.kept.put('x', torch.zeros(10))
    assert tiny.kept.used >= 40
    tiny.kept.clear()
    assert tiny.kept.used == 0 and not tiny.kept.sizes
    tiny.kept.put('x', torch.zeros(10))
    assert tiny.kept.pop('x') is not None and tiny.kept.used == 0
