"Reads equal eager attention, writes equal hand-written references, nothing stays behind"

import pytest, torch
from fusion_notebooks.hooks import capture, early_exit, edit, lens
from fusion_notebooks.hooks import visual_states
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def logits(mllm, p):
    with torch.inference_mode():
        return mllm.model(**p.inputs, use_cache=False).logits


@pytest.fixture(scope='module')
def p(tiny, samples):
    return tiny.prompt(samples[0].image, samples[0].question)


def test_the_image_matters(tiny, samples, p):
    other = tiny.prompt(samples[1].image, samples[0].question)
    assert (logits(tiny, p)[0, -1] - logits(tiny, other)[0, -1]).abs().max() > 0.05


@pytest.fixture
def eager(tiny, p):
    tiny.model.set_attn_implementation({'text_config': 'eager'})
    with torch.inference_mode():
        out = tiny.model(**p.inputs, use_cache=False, output_attentions=True, output_hidden_states=True)
    tiny.model.set_attn_implementation({'text_config': 'sdpa'})
    return out


@pytest.mark.parametrize('rows', ['last', 'all', [3, -2]])
@pytest.mark.parametrize('heads', ['mean', 'all'])
def test_capture_equals_eager(tiny, p, eager, rows, heads):
    with capture(tiny, rows=rows, heads=heads) as cache:
        logits(tiny, p)
    want = torch.stack(eager.attentions, 1)[..., p.visual]  # (1, layers, heads, N, visual)
    want = want[:, :, :, [-1] if rows == 'last' else slice(None) if rows == 'all' else rows]
    if heads == 'mean':
        want = want.mean(2)
    assert cache.attention.shape == want.shape
    assert (cache.attention - want).abs().max() < 1e-5
    assert want.std() > 1e-4  # not uniform: an error would show


def test_capture_in_a_left_padded_batch(tiny, samples):
    ps = [tiny.prompt(s.image, s.question) for s in samples[:3]]
    n = max(q.length for q in ps)
    pad = lambda v, fill: torch.cat([torch.full((1, n - v.shape[1]), fill, dtype=v.dtype), v], 1)
    inputs = dict(
        input_ids=torch.cat([pad(q.inputs['input_ids'], 2) for q in ps]),
        attention_mask=torch.cat([pad(q.inputs['attention_mask'], 0) for q in ps]),
        pixel_values=torch.cat([q.inputs['pixel_values'] for q in ps]),
    )
    assert len({q.length for q in ps}) > 1
    with capture(tiny) as cache, torch.inference_mode():
        tiny.model(**inputs, use_cache=False)
    for k, q in enumerate(ps):
        with capture(tiny) as one:
            logits(tiny, q)
        assert (cache.attention[k] - one.attention[0]).abs().max() < 1e-5


def test_capture_during_generate_keeps_the_prompt(tiny, p):
    with capture(tiny) as cache:
        a = tiny.answer(p)
    with capture(tiny) as one:
        logits(tiny, p)
    assert len(a.ids) > 1 and (cache.attention - one.attention).abs().max() < 1e-5


def test_hidden_states_and_their_traps(tiny, p, eager):
    with capture(tiny, rows='all', hidden=True) as cache:
        out = logits(tiny, p)
    for i in range(tiny.n_layers):
        assert (cache.hidden[:, i] - eager.hidden_states[i]).abs().max() < 1e-4
    last = cache.hidden[:, -1]
    assert (last - eager.hidden_states[-1]).abs().max() > 0.1  # transformers' last one is already normed
    assert (lens(tiny, last) - out).abs().max() < 1e-4  # ours is normed once
    assert (lens(tiny, eager.hidden_states[-1]) - out).abs().max() > 0.1  # norming twice would show


def test_an_edited_state_is_on_the_tape(tiny, p):
    with edit(tiny, 3, p.visual, 'zero'), capture(tiny, rows=p.visual.tolist(), hidden=True) as cache:
        logits(tiny, p)
    with capture(tiny, rows=p.visual.tolist(), hidden=True) as plain:
        logits(tiny, p)
    assert torch.equal(cache.hidden[:, 3], plain.hidden[:, 3])  # the state that leaves layer 2: the edit comes later
    assert not torch.equal(cache.hidden[:, 4], plain.hidden[:, 4])


def test_tape_is_empty_without_a_forward(tiny):
    with capture(tiny) as cache:
        pass
    with pytest.raises(ValueError, match='Nothing was captured'):
        cache.attention


# references: the decoder, layer by layer, by hand


def by_hand(mllm, p, change=None, bias=None):
    "Run the decoder layer by layer with an explicit mask; change(i, h) edits states, bias(i) edits the mask"
    core = mllm.model.model
    with torch.inference_mode():
        x = core.get_input_embeddings()(p.inputs['input_ids'])
        f = torch.cat(list(core.get_image_features(p.inputs['pixel_values'], return_dict=True).pooler_output))
        x[0, p.visual] = f
        n = x.shape[1]
        causal = torch.full((n, n), torch.finfo(x.dtype).min).triu(1)
        pos = torch.arange(n)[None]
        rope = mllm.decoder.rotary_emb(x, position_ids=pos)
        for i, layer in enumerate(mllm.layers):
            if change:
                x = change(i, x.clone())
            m = causal.clone()
            if bias:
                m = bias(i, m)
            x = layer(x, attention_mask=m[None, None], position_ids=pos, position_embeddings=rope, use_cache=False)
        return mllm.head(mllm.norm(x))


def test_the_reference_itself(tiny, p):
    assert (by_hand(tiny, p) - logits(tiny, p)).abs().max() < 1e-5 * logits(tiny, p).abs().max()


L = 8


@pytest.mark.parametrize('i', range(L))
@pytest.mark.parametrize('how', ['zero', 'scale', 'mean', 'swap', 'knockout', 'soft', 'soft-some'])
def test_edits_equal_the_reference(tiny, samples, p, how, i):
    v, plain = p.visual, logits(tiny, p)
    donor = visual_states(tiny, tiny.prompt(samples[1].image, samples[0].question))
    some = v[::3]

    def states(j, h):
        if j == i:
            h[0, v] = dict(
                zero=0 * h[0, v], scale=0.25 * h[0, v], mean=donor[i].mean(0).expand(len(v), -1), swap=donor[i]
            )[how]
        return h

    def bias(j, m):
        if j == i:
            text, cols = slice(int(v.max()) + 1, None), some if how == 'soft-some' else v
            m[text, cols] = (
                torch.finfo(m.dtype).min if how == 'knockout' else m[text, cols] + torch.log(torch.tensor(0.2))
            )
        return m

    kw = dict(
        zero=dict(how='zero'),
        scale=dict(how='zero', strength=0.25),
        mean=dict(how='mean', states=donor.mean(1)),
        swap=dict(how='swap', states=donor),
        knockout=dict(how='knockout'),
        soft=dict(how='soft', strength=0.2),
    ) | {'soft-some': dict(how='soft', strength=0.2, text_from=int(v.max()) + 1)}
    want = by_hand(tiny, p, states) if how in ('zero', 'scale', 'mean', 'swap') else by_hand(tiny, p, bias=bias)
    with edit(tiny, i, some if how == 'soft-some' else v, **kw[how]):
        got = logits(tiny, p)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    change = (got - plain)[0, -1].abs().max()
    if how == 'scale' and i == L - 1:
        assert change < 1e-5  # RMSNorm undoes a scaling: keys and values stay
    else:
        assert change > (1e-4 if how == 'scale' else 1e-3)  # every other edit at every layer changes the answer
    assert torch.equal(logits(tiny, p), plain)


def test_knockout_everywhere_hides_the_image(tiny, samples, p):
    other = tiny.prompt(samples[1].image, samples[0].question)
    for q in (p, other):
        assert torch.equal(q.visual, p.visual)
    with edit(tiny, None, p.visual, 'knockout'):
        a, b = (logits(tiny, q)[0, -1] for q in (p, other))
    assert torch.equal(a, b)
    with edit(tiny, None, p.visual, 'knockout'):
        a, b = (tiny.answer(q) for q in (p, other))
    assert a.ids == b.ids and abs(a.logp - b.logp) < 1e-5  # generated rows cannot read it either


def test_edit_during_generate_equals_no_cache(tiny, p):
    "Cached decoding under an edit equals decoding without a cache"
    for how in ('zero', 'knockout', 'soft'):
        with edit(tiny, 2, p.visual, how):
            a = tiny.generate(p, max_new_tokens=5)[0]
            ids = []
            for _ in range(len(a.ids)):
                with torch.inference_mode():
                    ids.append(int(tiny.model(**tiny.copies(p, 1, ids), use_cache=False).logits[0, -1].argmax()))
        assert a.ids == ids


def test_edit_of_single_batch_rows(tiny, p):
    plain = logits(tiny, p)
    for how in ('zero', 'knockout'):
        with edit(tiny, 1, p.visual, how):
            want = logits(tiny, p)
        with edit(tiny, 1, p.visual, how, batch=[1]), torch.inference_mode():
            got = tiny.model(**tiny.copies(p, 3), use_cache=False).logits
        for k, w in enumerate((plain, want, plain)):
            assert (got[k] - w[0]).abs().max() < 1e-5 * w.abs().max()


def test_nothing_stays_after_an_exception(tiny, p):
    plain, text = logits(tiny, p), tiny.model.config.get_text_config()
    before = {k: v.clone() for k, v in tiny.model.state_dict().items()}
    hooks = lambda: [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in tiny.model.named_modules()]
    found = hooks()  # transformers may have left some of its own
    for ctx in (
        lambda: edit(tiny, None, p.visual, 'zero'),
        lambda: edit(tiny, 1, p.visual, 'soft'),
        lambda: capture(tiny, hidden=True),
        lambda: early_exit(tiny, 2),
    ):
        with pytest.raises(RuntimeError, match='boom'):
            with ctx():
                logits(tiny, p)
                raise RuntimeError('boom')
        assert torch.equal(logits(tiny, p), plain) and text._attn_implementation == 'sdpa'
        assert hooks() == found
    assert all(torch.equal(v, before[k]) for k, v in tiny.model.state_dict().items())


def test_capture_does_not_change_the_logits(tiny, p):
    plain = logits(tiny, p)
    with capture(tiny):
        assert torch.equal(logits(tiny, p), plain)


def test_a_second_copy_of_the_module_takes_nothing_away(tiny, p):
    with capture(tiny) as cache:
        want = logits(tiny, p)
    maps = cache.attention
    AttentionInterface.register('fusion_capture', sdpa_attention_forward)  # as a module that is loaded twice would
    with capture(tiny) as cache:
        assert torch.equal(logits(tiny, p), want)
    assert torch.equal(cache.attention, maps)


def test_early_exit_equals_the_lens(tiny, p):
    with capture(tiny, hidden=True) as cache:
        logits(tiny, p)
    for i in (0, 3, L - 1):
        with early_exit(tiny, i):
            out = logits(tiny, p)[0, -1]
        assert (lens(tiny, cache.hidden[0, i + 1, 0]) - out).abs().max() < 1e-4


def test_what_does_not_exist_is_refused(tiny, p):
    for bad in (-1, L, [0, 99]):
        with pytest.raises(ValueError, match='there is no layer'):
            with edit(tiny, bad, p.visual):
                pass
    with pytest.raises(ValueError, match='No edit'):
        with edit(tiny, 0, p.visual, 'zeroo'):
            pass
    with pytest.raises(ValueError, match='needs states'):
        with edit(tiny, 0, p.visual, 'swap'):
            pass
