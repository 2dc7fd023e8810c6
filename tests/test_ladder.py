"The ladder equals one forward per edit in every kind of model, and says where it cannot be used"

import pytest, torch, transformers as T
from torch.utils._python_dispatch import TorchDispatchMode
from conftest import replaced, noise_image
from fusion_notebooks import demo, engine, masking, mllm as room
from fusion_notebooks.contrast import refine
from fusion_notebooks.hooks import early_exit, edit
from fusion_notebooks.engine import Capabilities, answer_of, bank, exits, capabilities, trace, prefixes
from fusion_notebooks.hooks import mean_states
from fusion_notebooks.masking import sweep
from fusion_notebooks.mllm import MLLM, LRUCache, Sample, reader
from test_masking import same
from twins import FAMILIES, IMAGE, VISION, family as twin, text

HOWS = ('zero', 'mean', 'swap', 'knockout', 'soft')
SAMPLES = [
    Sample(noise_image(k, (96, 48)), q, id=f's{k}')
    for k, q in enumerate(
        ('What color is the circle?', 'Which digit?', 'Name the shape of the object at the top left.')
    )
]
SHARED, TILES = ('bank', 'branches'), ('resume', 'branches')
EXPECT = dict(  # facts, then the paths of zero and of knockout at the last layer
    llava=(Capabilities(True, True, 0, True), SHARED),
    llava_next=(Capabilities(True, True, 0, True), SHARED),
    vipllava=(Capabilities(True, True, 0, True), SHARED),
    llava_onevision=(Capabilities(True, True, 0, True), SHARED),
    instructblip=(Capabilities(True, True, 0, False), ('naive', 'naive')),
    internvl=(Capabilities(True, True, 0, True), SHARED),
    gemma3=(Capabilities(True, False, 0, True), SHARED),
    idefics3=(Capabilities(True, True, 0, True), TILES),
    smolvlm=(Capabilities(True, True, 0, True), SHARED),
    paligemma=(Capabilities(False, False, 0, True), ('resume', 'resume')),
    mllama=(Capabilities(False, False, 5, False), ('naive', 'naive')),
    qwen2_vl=(Capabilities(True, True, 0, True), SHARED),
    qwen2_5_vl=(Capabilities(True, True, 0, True), SHARED),
    qwen3_vl=(Capabilities(True, True, 2, True), SHARED),
)


@pytest.fixture(scope='module', params=FAMILIES)
def family(request):
    return twin(request.param)


@pytest.fixture(scope='module')
def mean(family):
    return mean_states(family, SAMPLES)


def close(a, b):
    assert a.ids == b.ids and abs(a.logp - b.logp) < 1e-5 * max(1, abs(b.logp))


def test_what_may_be_shared_is_found(family):
    assert capabilities(family, family.prompt(SAMPLES[0].image, SAMPLES[0].question)) == EXPECT[family.name][0]


@pytest.mark.parametrize('scope', ['single', 'from', 'window'])
def test_every_family_equals_naive(family, mean, scope):
    hows = HOWS if scope == 'single' else ('knockout', 'soft')
    layers = None if scope == 'single' else [0, 2]
    fast, naive = (sweep(family, SAMPLES, hows, scope, layers, mean=mean, exact=e, limit=4) for e in ('auto', 'naive'))
    same(fast, naive)
    edited, base = fast[fast.how != 'none'], fast[fast.how == 'none'].set_index('sample').logp
    assert ((edited.logp - edited['sample'].map(base)).abs() > 1e-4).mean() > 0.8  # the edits matter
    path = fast.set_index(['sample', 'how', 'layer']).path
    if scope == 'single':
        assert (path['s0', 'zero', 3], path['s1', 'knockout', 3]) == EXPECT[family.name][1]
        if family.name == 'qwen3_vl':
            assert (
                path['s0', 'zero', 1] == path['s0', 'swap', 1] == 'naive'
                and path['s0', 'zero', 2] == 'bank'
                and path['s0', 'knockout', 0] == 'branches'
            )


def test_resume_equals_naive(family, mean):
    if not capabilities(family, family.prompt(SAMPLES[0].image, SAMPLES[0].question)).plain:
        return
    fast, naive = (
        sweep(family, SAMPLES[:2], HOWS, mean=mean, layers=[1, 3], exact=e, limit=3) for e in ('resume', 'naive')
    )
    same(fast, naive)
    assert 'resume' in set(fast.path)


def test_stems_that_are_read_equal_stems_that_are_copied(family, mean, monkeypatch):
    "Attention takes them as they are where it can, and copies elsewhere"
    if 'branches' not in EXPECT[family.name][1]:
        return
    read = sweep(family, SAMPLES, HOWS, layers=[1, 3], mean=mean, limit=3)
    assert engine.prefix._can_be_apart(family)
    replaced(monkeypatch, engine, '_can_be_apart', lambda m: False)
    same(read, sweep(family, SAMPLES, HOWS, layers=[1, 3], mean=mean, limit=3))


class Kernels(TorchDispatchMode):
    "Which calls of the CPU's attention were causal"

    def __init__(self):
        super().__init__()
        self.causal = []

    def __torch_dispatch__(self, f, types, args=(), kw=None):
        kw = kw or {}
        if 'flash_attention_for_cpu' in str(f):
            self.causal.append(bool(kw.get('is_causal', args[4] if len(args) > 4 else False)))
        return f(*args, **kw)


def test_rows_without_padding_take_the_causal_kernel():
    "Their own keys need half of the blocks; a mask that says the same would be read whole"
    mllm = twin('llava')

    def calls(samples):
        p = [mllm.prompt(s.image, s.question) for s in samples]
        n = int(p[0].visual[-1]) + 1
        ids = [q.inputs['input_ids'][0, n:] for q in p]
        width, some = max(map(len, ids)), prefixes(mllm, p, n)
        pad = lambda x, v=0: torch.cat([x.new_full((width - len(x),), v), x])
        branched = engine.BranchedBatch(mllm, [masking.Branch(k) for k in range(len(p))], some, [q.visual for q in p])
        with Kernels() as seen:
            branched.forward(
                torch.stack([pad(x) for x in ids]), seen=torch.stack([pad(torch.ones_like(x)) for x in ids])
            )
        return seen.causal

    assert (
        sum(calls(SAMPLES[:1])) == mllm.n_layers and len(calls(SAMPLES[:1])) == 2 * mllm.n_layers
    )  # once for its own keys, once for the stem's
    assert not any(calls(SAMPLES))  # of unequal length


def test_exits_equal_early_exit(family, monkeypatch):
    "Two questions of unequal length, decoded together, or one by one where memory holds no more"
    prompts = [
        family.prompt(s.image, q)
        for s, q in ((SAMPLES[0], SAMPLES[0].question), (SAMPLES[1], 'What is it, and which colour has it?'))
    ]
    seen = [trace(family, p) for p in prompts]
    together = exits(family, seen, limit=4)
    replaced(monkeypatch, engine, 'fitting', lambda *a: 1)
    for a, b in zip(together, exits(family, seen, limit=4)):
        list(map(close, a, b))
    for p, watched, said in zip(prompts, seen, together):
        close(answer_of(family, watched, 4), family.answer(p, max_new_tokens=4))
        for i, a in enumerate(said):
            with early_exit(family, i):
                close(a, family.answer(p, max_new_tokens=4))
    assert prompts[0].length != prompts[1].length


def test_rows_that_have_ended_are_let_go():
    "Of eight exits one talks on; each says what it says alone"
    mllm, s = MLLM.load('glyph-llava', dtype=torch.float32), demo.samples(10)[9]
    p, sizes = mllm.prompt(s.image, s.question), []
    seen = trace(mllm, p)
    handle = mllm.layers[0].register_forward_pre_hook(
        reader(lambda layer, args, kw: sizes.append(len(args[0] if args else kw['hidden_states']))), with_kwargs=True
    )
    try:
        (said,) = exits(mllm, [seen])
    finally:
        handle.remove()
    steps, sizes = sorted(len(a.ids) for a in said), sizes[1:]  # the first is `lens`
    assert (
        steps[0] < 5
        and steps[-1] == 32
        and sizes[0] == 8
        and sizes[-1] == 1
        and sizes == sorted(sizes, reverse=True)
        and len(sizes) == 31
    )
    for i, a in enumerate(said):
        with early_exit(mllm, i):
            close(a, mllm.answer(p))


def test_crop_reuses_what_it_can(family):
    s = SAMPLES[0]
    if family.takes_one:
        return
    try:
        r = refine(family, s.image, s.question, box=(10, 10, 30, 30), by='oracle')
    except ValueError as e:
        return pytest.skip(str(e))  # no place for the tokens, so no box
    close(r.answer, family.answer([s.image, r.crop], s.question))
    print(family.name, r.path)


def test_mask_equals_two_passes(family):
    s = SAMPLES[1]
    p = family.prompt(s.image, s.question)
    r = refine(family, s.image, s.question, how='mask', review=3, post=2)
    with edit(family, 3, p.visual[r.tokens], 'zero'):
        close(r.answer, family.answer(p))
    assert r.path == 'one pass' and len(r.tokens) == round(0.2 * len(p.visual))


# what is kept, what does not fit, what goes wrong


@pytest.fixture
def llava():
    m = twin('llava')
    m.kept.clear()
    m.kept.sizes.clear()
    yield m
    m.kept.clear()
    m.kept.sizes.clear()


def fast_and_naive(m, **kw):
    kw = dict(how=('zero', 'knockout'), limit=3) | kw
    return sweep(m, SAMPLES, **kw), sweep(m, SAMPLES, exact='naive', **kw)


def test_a_bank_that_does_not_fit(llava, monkeypatch):
    "Without room the sweep resumes, and keeps nothing"
    monkeypatch.setattr(LRUCache, 'budget', 0)
    fast, naive = fast_and_naive(llava)
    same(fast, naive)
    assert set(fast.path) == {'plain', 'resume', 'branches'} and not llava.kept.used


def test_the_pictures_of_a_prompt_are_hashed_once(llava, monkeypatch):
    "However many layers read them: to hash the pixels of a large picture costs as much as a layer"
    kw = dict(how=('swap', 'zero', 'knockout'), limit=1)
    sweep(llava, SAMPLES, **kw)
    real, pixels, hashed = room.digest, llava.prompt(SAMPLES[0].image, 'What?').inputs['pixel_values'].nbytes, []

    def counted(*things):
        hashed.append(sum(t.nbytes for t in things if isinstance(t, torch.Tensor)))
        return real(*things)

    for module in (room, engine):
        replaced(monkeypatch, module, 'digest', counted)
    sweep(llava, SAMPLES, **kw)
    assert sum(n >= pixels for n in hashed) == 2 * len(SAMPLES)  # samples and donors


def test_what_is_kept_is_bounded_and_shared(llava, monkeypatch):
    runs, p = [], llava.prompt(SAMPLES[0].image, 'What?')
    capabilities(llava, p)  # probed once per model
    for key in [k for k in llava.kept if llava.kept.sizes[k]]:
        llava.kept.pop(key)
    handle = llava.decoder.register_forward_pre_hook(
        reader(lambda d, args, kw: runs.append(tuple(kw['inputs_embeds'].shape[:2]))), with_kwargs=True
    )
    n = int(llava.prompt(SAMPLES[0].image, 'What?').visual[-1]) + 1
    try:
        sweep(llava, SAMPLES, ('zero', 'swap'), limit=1)
        assert runs[:3] == [
            (1, n),
            (1, n),
            (2, n),
        ]  # the first picture's stem, the bank, the others in one forward; donors are samples
        assert all(rows < n for _, rows in runs[3:])
        runs.clear()
        sweep(llava, SAMPLES, ('zero', 'swap'), limit=1)
        assert all(rows < n for _, rows in runs)  # everything before the cut is known
        sizes = dict(llava.kept.sizes)
        monkeypatch.setattr(LRUCache, 'budget', max(sizes.values()) + 10)
        sweep(llava, [Sample(noise_image(9, (96, 48)), 'What color is the circle?', id='new')], 'knockout', limit=1)
        assert llava.kept.used <= llava.kept.budget and len(llava.kept) < len(sizes)  # the oldest went
        runs.clear()
        with torch.no_grad():
            llava.head.weight[0, 0] += 0
        sweep(llava, SAMPLES[:1], 'knockout', limit=1)
        assert (1, n) in runs  # touched weights: nothing old is used
    finally:
        handle.remove()


def test_stems_equal_the_rows_of_a_whole_forward(llava):
    p = llava.prompt(SAMPLES[0].image, SAMPLES[0].question)
    n, whole = int(p.visual[-1]) + 1, trace(llava, p).prefix
    (prefix,) = prefixes(llava, [p], n)
    for a, b in zip(prefix.keys + prefix.values, whole.keys + whole.values):
        assert (a - b[:, :n]).abs().max() < 1e-5
    assert prefix.position == n and whole.position == p.length and prefix.nbytes < whole.nbytes


def test_the_bank_knows_no_picture(llava):
    ps = [llava.prompt(s.image, s.question) for s in SAMPLES[:2]]
    values = {i: torch.zeros(llava.model.config.get_text_config().hidden_size) for i in range(4)}
    a = bank(llava, ps[0], values)
    assert bank(llava, ps[1], values) is a
    llava.kept.clear()
    llava.kept.sizes.clear()
    b = bank(llava, ps[1], values)
    for i in values:
        assert (
            all((x - y).abs().max() < 1e-5 for x, y in zip(a[i].keys[i:], b[i].keys[i:]))
            and a[i].keys[:i] == [None] * i
        )


def test_out_of_memory_halves_and_loses_nothing(llava, monkeypatch):
    forward, seen = engine.BranchedBatch.forward, []

    def small(self, ids, **kw):
        seen.append(len(self.rows))
        if len(self.rows) > 5:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return forward(self, ids, **kw)

    capabilities(llava, llava.prompt(SAMPLES[0].image, SAMPLES[0].question))
    want = sweep(llava, SAMPLES, 'knockout', limit=3)
    monkeypatch.setattr(engine.BranchedBatch, 'forward', small)
    got = sweep(llava, SAMPLES, 'knockout', limit=3)
    same(got, want)
    assert max(seen) > 5 and min(seen) <= 5


def test_rounding_of_many_logits_in_bfloat16_forbids_no_ladder(monkeypatch):
    "Some of a hundred thousand are far off in any deep model; what a ladder gets wrong, all of them show"
    torch.manual_seed(0)
    c = T.LlavaConfig(
        text_config=text(T.LlamaConfig, num_hidden_layers=64, vocab_size=100_000, initializer_range=0.2),
        vision_config=T.CLIPVisionConfig(**VISION, image_size=24, patch_size=6, projection_dim=32),
        image_token_id=IMAGE,
        image_seq_length=16,
    )
    deep = MLLM(T.LlavaForConditionalGeneration(c).to(torch.bfloat16), twin('llava').processor)
    p, alike, seen = deep.prompt(SAMPLES[0].image, SAMPLES[0].question), engine.probes._alike, []

    def watched(a, b, tolerance):
        seen.append(not engine.probes._near(a, b, tolerance))
        return alike(a, b, tolerance)

    replaced(monkeypatch, engine, '_alike', watched)
    assert capabilities(deep, p) == Capabilities(True, True, 0, True) and seen == [
        True
    ]  # one by one they would forbid it
    deep.kept.clear()
    other = prefixes(deep, [deep.prompt(SAMPLES[1].image, SAMPLES[0].question)], int(p.visual[-1]) + 1)
    replaced(monkeypatch, engine, 'prefixes', lambda *a: other)  # another picture's keys and values
    assert capabilities(deep, p) == Capabilities(True, True, 0, False)


def test_other_errors_pass(llava, monkeypatch):
    def broken(self, ids, **kw):
        raise RuntimeError('something else')

    capabilities(llava, llava.prompt(SAMPLES[0].image, SAMPLES[0].question))
    monkeypatch.setattr(engine.BranchedBatch, 'forward', broken)
    with pytest.raises(RuntimeError, match='something else'):
        sweep(llava, SAMPLES, 'knockout')


def test_nothing_stays_on_the_model(llava):
    "Also when a forward breaks half-way up the ladder"
    p = llava.prompt(SAMPLES[0].image, SAMPLES[0].question)
    with torch.inference_mode():
        plain = llava.model(**p.inputs).logits
    sweep(llava, SAMPLES, HOWS[:1] + HOWS[3:], limit=2)

    def boom(layer, args, kw):
        raise KeyError('boom')

    handle = llava.layers[2].self_attn.register_forward_pre_hook(boom, with_kwargs=True)
    with pytest.raises(KeyError):
        sweep(llava, SAMPLES, 'knockout', limit=2)
    handle.remove()
    with torch.inference_mode():
        assert torch.equal(llava.model(**p.inputs).logits, plain)
    assert not any(m._forward_pre_hooks or m._forward_hooks for layer in llava.layers for m in layer.modules())


def test_hooks_of_others_are_refused(llava):
    p = llava.prompt(SAMPLES[0].image, SAMPLES[0].question)
    with edit(llava, 1, p.visual, 'zero'), pytest.raises(ValueError, match='carry hooks'):
        sweep(llava, SAMPLES, 'knockout')


def test_donor_of_another_size_is_refused():
    m = twin('qwen2_vl')
    small = Sample(noise_image(7, (48, 48)), 'What?', id='d')
    with pytest.raises(ValueError, match='of the same size'):
        sweep(m, SAMPLES[:1], 'swap', donors=[small])


def test_bfloat16_stays_within_naive_bfloat16(llava):
    "The ladder is no farther from float32 than one forward per edit is"
    exact = sweep(llava, SAMPLES, HOWS[3:], limit=1)
    try:
        llava.model.bfloat16()
        llava.__dict__.pop('capabilities', None)
        fast, naive = (sweep(llava, SAMPLES, HOWS[3:], exact=e, limit=1) for e in ('auto', 'naive'))
    finally:
        llava.model.float()  # rounded from here on, so the twin is thrown away
    twin.cache_clear()
    assert set(fast.path) == {'plain', 'branches'}
    base = [t[t.how == 'none'].set_index('sample').prediction for t in (fast, naive, exact)]
    alike = exact['sample'].map((base[0] == base[2]) & (base[1] == base[2]))  # logp is that of the same answer
    far = lambda t: (t.logp - exact.logp)[alike].abs().mean()
    assert alike.any() and far(fast) < 1.5 * far(naive) + 1e-3
