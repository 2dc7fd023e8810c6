"The doctor: twins are small, seeded and see; every check holds on a sound twin and fails on one that is broken on purpose; exit codes"

import json
from contextlib import contextmanager
from pathlib import Path
import pytest, torch
import transformers as T
from conftest import replaced
from fusion_notebooks import cli, doctor as D, hooks
from fusion_notebooks.mllm import MLLM

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def llava():
    return D.twin(T.LlavaConfig)


@pytest.fixture(scope='module')
def case(llava):
    return D.Case(llava)


# twins

SOME = [T.Gemma3Config, T.Qwen2_5_VLConfig, T.MllamaConfig]


@pytest.mark.parametrize('config', SOME[:2], ids=lambda c: c.model_type)
def test_sound_twins_pass(config):
    r = D.doctor(D.twin(config))
    assert r.ok and not r.reason and len(r.checks) == len(D.CHECKS) and 'visual_tokens' in r.found


def test_twins_are_seeded_and_small():
    a, b, c = D.twin(T.LlavaConfig), D.twin(T.LlavaConfig), D.twin(T.LlavaConfig, seed=1)
    same = lambda x, y: all(torch.equal(v, y.model.state_dict()[k]) for k, v in x.model.state_dict().items())
    assert same(a, b) and not same(a, c)
    assert sum(p.numel() for p in a.model.parameters()) < 5e6
    assert all(
        n.std() > 0.1 for k, n in a.model.named_parameters() if k.endswith('layernorm.weight')
    )  # no norm is the identity


def test_making_a_twin_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    D.twin(T.LlavaConfig)
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize('config', SOME, ids=lambda c: c.model_type)
def test_shrinking_keeps_the_architecture(config):
    full, small = config(), D.shrink(config)
    t, s = full.get_text_config(), small.get_text_config()
    assert type(small) is config and type(s) is type(t)
    assert s.num_attention_heads // s.num_key_value_heads == (
        1 if t.num_attention_heads == t.num_key_value_heads else 2
    )
    if getattr(t, 'layer_types', None):
        assert set(s.layer_types) == set(t.layer_types) and len(s.layer_types) == s.num_hidden_layers
    if getattr(t, 'cross_attention_layers', None):
        assert 0 < len(s.cross_attention_layers) < s.num_hidden_layers


def test_special_ids():
    full = T.Qwen2_5_VLConfig()
    kept, moved = D.shrink(full, vocab=None), D.shrink(full)
    names = [k for k in vars(full) if k.endswith('token_id')]
    assert len(names) > 2
    for k in names:
        assert getattr(kept, k) == getattr(full, k)
    ids = [getattr(moved, k) for k in names]
    assert len(set(ids)) == len(ids) and max(ids) < moved.text_config.vocab_size == D.VOCAB


def test_a_given_config_is_not_changed():
    full = T.LlavaConfig()
    before = full.to_dict()
    D.shrink(full)
    assert full.to_dict() == before


CHECKPOINT = dict(
    model_type='qwen2_5_vl',
    bos_token_id=151643,
    eos_token_id=151645,
    vision_start_token_id=151652,
    vision_end_token_id=151653,
    image_token_id=151655,
    video_token_id=151656,
    hidden_size=3584,
    intermediate_size=18944,
    max_window_layers=28,
    num_attention_heads=28,
    num_hidden_layers=28,
    num_key_value_heads=4,
    rope_theta=1e6,
    torch_dtype='bfloat16',
    vocab_size=152064,
    rope_scaling=dict(type='mrope', mrope_section=[16, 24, 24]),
    quantization_config=dict(quant_method='bitsandbytes', load_in_4bit=True),
    vision_config=dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        in_chans=3,
        out_hidden_size=3584,
        patch_size=14,
        spatial_merge_size=2,
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
        temporal_patch_size=2,
    ),
)


def test_a_checkpoint_as_its_config_is_written(tmp_path):
    "Fields of the text model at the top, half precision, quantised: the twin is float32 and keeps the geometry"
    (tmp_path / 'config.json').write_text(json.dumps(CHECKPOINT))
    full = D.config_of(tmp_path)
    kept = D.shrink(full, vocab=None)
    assert (
        kept.image_token_id == 151655
        and kept.text_config.vocab_size == 152064
        and kept.text_config.rope_parameters['mrope_section'] == [4, 6, 6]
    )
    m = D.twin(full)
    assert {p.dtype for p in m.model.parameters()} == {
        torch.float32
    } and m.model.config.vision_config.window_size == 112
    case = D.Case(m)
    assert D.image_matters(case) == D.capture_is_eager(case) == ''
    what = D.found(case, full)
    assert (
        '28 in the model' in what['decoder']
        and what['heads'].startswith('28, 4')
        and what['parameters'] == '8.29 billion'
    )


# every check can fail


def broken(case, name, monkeypatch):
    "Break the model, or what acts on it, so that one check must see it; returns what the check says"
    m, sound = case.mllm, hooks.edit

    def edits(change):
        @contextmanager
        def wrong(mllm, layers, visual, how='zero', **kw):
            with change(mllm, layers, visual, how, **kw):
                yield

        replaced(monkeypatch, D, 'edit', wrong)

    def add(layer, f):
        return m.layers[layer].register_forward_hook(lambda l, a, kw, out: f(out), with_kwargs=True)

    if name == 'image_matters':
        monkeypatch.setattr(
            m.model.model.multi_modal_projector, 'forward', lambda x: x.new_zeros(*x.shape[:-1], D.WIDTH)
        )
    elif name == 'capture_is_eager':
        record = hooks.recording._record
        replaced(
            monkeypatch,
            hooks,
            '_record',
            lambda cache, i, module, query, key, mask, scaling, *a: record(
                cache, i, module, query, key, mask, scaling * 1.01, *a
            ),
        )
    elif name == 'empty_edit':

        @contextmanager
        def leaky(mllm, layers, visual, how='zero', **kw):
            h = add(0, lambda out: out * (1 + 1e-6))
            with sound(mllm, layers, visual, how, **kw):
                yield
            h.remove()

        replaced(monkeypatch, D, 'edit', leaky)
    elif name == 'state_edits':
        edits(
            lambda m, i, v, how, **kw: sound(
                m, i, v[1:], how, **kw | ({} if how != 'swap' else dict(states=kw['states'][:, 1:]))
            )
        )  # forgets a token
    elif name == 'attention_edits':
        edits(
            lambda m, i, v, how, **kw: sound(m, i, v, 'soft', strength=0.01 if how == 'knockout' else kw['strength'])
        )  # knockout leaves a little
    elif name == 'edits_move':
        edits(
            lambda m, i, v, how, **kw: sound(m, i, v[:0] if how == 'knockout' else v, how, **kw)
        )  # knockout does nothing
    elif name == 'layers_refused':
        edits(lambda m, i, v, how, **kw: sound(m, i % m.n_layers, v, how, **kw))
    elif name == 'causal':  # attention without a mask
        for layer in m.layers:
            run = layer.forward
            monkeypatch.setattr(
                layer,
                'forward',
                lambda h, *a, run=run, **kw: run(
                    h, *a, **kw | dict(attention_mask=h.new_zeros(1, 1, h.shape[1], h.shape[1]))
                ),
            )
    elif name == 'batch_is_single':  # padding is attended to
        stack = MLLM.stack

        def unmasked(self, prompts):
            p = stack(self, prompts)
            p.inputs['attention_mask'] = torch.ones_like(p.inputs['attention_mask'])
            return p

        monkeypatch.setattr(MLLM, 'stack', unmasked)
    elif name == 'cache_is_exact':  # rows of one token are treated otherwise
        for layer in m.layers[1:]:
            run = layer.forward
            monkeypatch.setattr(
                layer,
                'forward',
                lambda h, *a, run=run, **kw: (
                    run(h * (1.5 if h.shape[1] == 1 else 1), *a, **kw) + (h if h.shape[1] == 1 else 0)
                ),
            )
    elif name == 'nothing_foreign':  # somebody's hook
        monkeypatch.setattr(case, 'left', [m.layers[1].register_forward_hook(lambda l, args, out: out)], raising=False)
    elif name == 'every_method':  # one of them breaks
        case.methods.clear()
        replaced(monkeypatch, D, 'answer', lambda *a, **kw: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            D.CHECKS[name](case)
        return 'It breaks, and the report says how.'
    elif name == 'lens_is_exit':
        replaced(monkeypatch, D, 'lens', lambda mllm, states: hooks.lens(mllm, mllm.norm(states)))  # norms twice
    elif name == 'nothing_stays':  # a hook is left behind by an exception
        left = []

        @contextmanager
        def forgetful(mllm, layers, visual, how='zero', **kw):
            left.append(add(0, lambda out: None))
            yield
            left.pop().remove()

        replaced(monkeypatch, D, 'edit', forgetful)
        monkeypatch.setattr(case, 'left', left, raising=False)
    return D.CHECKS[name](D.Case(m) if name == 'image_matters' else case)


@pytest.mark.parametrize('name', D.CHECKS)
def test_each_check_can_fail(case, name, monkeypatch):
    check = D.CHECKS[name]
    assert check(case) == ''
    said = broken(case, name, monkeypatch)
    assert said.endswith('.') and len(said) > 20
    for h in vars(case).get('left', []):
        h.remove()
    monkeypatch.undo()
    assert check(case) == ''  # and nothing of the breakage remains


def test_the_references_are_the_model(case):
    with D.by_hand(case.mllm) as maps:
        got = D.checks._logits(case.mllm, case.p.inputs)
    assert D.checks._far(got, case.plain) < 1e-5 and sorted(maps) == list(range(case.mllm.n_layers))
    for w in maps.values():
        assert (w.sum(-1) - 1).abs().max() < 1e-5 and w[0].triu(1).abs().max() < 1e-6
    with D.overwritten([case.mllm.layers[1]], [], None):
        assert torch.equal(D.checks._logits(case.mllm, case.p.inputs), case.plain)
    assert torch.equal(D.checks._logits(case.mllm, case.p.inputs), case.plain)


def test_rounding_that_adds_up_over_many_layers_is_no_wrong_map(monkeypatch):
    "In bfloat16, eager attention and SDPA drift apart from layer to layer; with the same states in, the maps agree, and a wrong one is seen"
    from twins import IMAGE, VISION, family, text

    c = T.LlavaConfig(
        text_config=text(T.LlamaConfig, num_hidden_layers=64),
        vision_config=T.CLIPVisionConfig(**VISION, image_size=24, patch_size=6, projection_dim=32),
        image_token_id=IMAGE,
        image_seq_length=16,
    )
    deep = D.Case(
        MLLM(D.randomise(T.LlavaForConditionalGeneration(c), 1).to(torch.bfloat16), family('llava').processor)
    )
    with D.by_hand(deep.mllm) as drifting:
        D.checks._logits(deep.mllm, deep.p.inputs)
    at_end = lambda w: w[0, :, -1].float().mean(0)
    assert max(float((at_end(drifting[i]) - at_end(w)).abs().max()) for i, w in deep.maps.items()) > deep.tol
    assert D.capture_is_eager(deep) == ''
    record = hooks.recording._record
    replaced(
        monkeypatch,
        hooks,
        '_record',
        lambda cache, i, module, query, key, mask, scaling, *a: record(
            cache, i, module, query, key, mask, scaling * (2 if i == 40 else 1), *a
        ),
    )
    assert D.capture_is_eager(deep).startswith('The map of layer 40 is off eager attention by')


# reports


def test_what_cannot_be_is_refused_with_a_reason():
    for config, word in (
        (T.Florence2Config, 'encoder-decoder'),
        (T.GitConfig, 'no placeholder'),
        (T.BlipConfig, 'no placeholder'),
    ):
        r = D.examine(config)
        assert not r.ok and r.stated and word in r.out and word in r.verdict and not r.checks and json.dumps(r.json())


def test_a_class_that_breaks_does_not_stop_the_survey(monkeypatch):
    twin = D.twin

    def sick(config, **kw):
        if config is T.LlavaConfig:
            raise RuntimeError('out of order')
        return twin(config, **kw)

    replaced(monkeypatch, D, 'twin', sick)
    bad, good = D.survey([T.LlavaConfig, T.Gemma3Config])
    assert not bad.ok and not bad.stated and 'RuntimeError: out of order' in bad.reason and good.ok
    table = D.matrix([bad, good])
    assert (
        list(table.ok) == ['no', 'yes']
        and 'out of order' in table.reason[0]
        and (table[list(D.CHECKS)].iloc[1] == 'yes').all()
    )


def test_a_class_that_hangs_is_left(monkeypatch):
    def forever(*a, **kw):
        for _ in range(10**12):
            pass

    replaced(monkeypatch, D, 'twin', forever)
    r = D.examine(T.LlavaConfig, seconds=0.2)
    assert 'not done after 0.2 s' in r.out and not r.stated


def test_a_failed_check_is_in_every_form_of_the_report(llava, monkeypatch):
    monkeypatch.setitem(D.CHECKS, 'empty_edit', lambda c: 'It leaks.')
    r = D.doctor(llava)
    assert (
        not r.ok
        and not r.stated
        and r.verdict.startswith('1 of')
        and 'It leaks.' in str(r)
        and r.row()['checks']['empty_edit'] is False
        and 'It leaks.' in r.row()['reason']
    )


def test_the_committed_matrix_has_every_class_and_a_reason_for_each_no():
    from importlib.metadata import version
    import pandas as pd
    from transformers import AutoModelForImageTextToText

    if f"transformers=={version('transformers')}" not in (ROOT / 'constraints.txt').read_text():
        pytest.skip('another transformers than the one that the table was made with')
    table = pd.read_csv(ROOT / 'data/matrix.csv', keep_default_na=False)
    assert list(table.model_type) == [c.model_type for c in AutoModelForImageTextToText._model_mapping.keys()]
    assert ((table.ok == 'yes') == (table[list(D.CHECKS)] == 'yes').all(axis=1)).all() and (
        table.reason[table.ok == 'no'] != ''
    ).all()
    assert (table.ok == 'yes').sum() >= 60


# the command


@pytest.fixture
def folder(llava, tmp_path):
    llava.model.config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_exit_codes(folder, monkeypatch, capsys, tmp_path):
    assert cli.main(['doctor', folder, '--config-only']) == 0
    assert 'all 14 checks hold' in capsys.readouterr().out
    monkeypatch.setitem(D.CHECKS, 'empty_edit', lambda c: 'It leaks.')
    assert cli.main(['doctor', folder, '--config-only', '--json']) == 1
    got = json.loads(capsys.readouterr().out)
    assert got['ok'] is False and 'It leaks.' in got['reason'] and got['found']
    for argv in (
        ['doctor'],
        ['doctor', folder, '--all'],
        ['doctor', str(tmp_path / 'nothing'), '--config-only'],
        ['doctor', folder],
    ):
        assert cli.main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith('fusion: ') and err.count('\n') == 1


def test_all(monkeypatch, capsys, tmp_path):
    survey, out = D.survey, tmp_path / 'matrix.csv'
    replaced(monkeypatch, D, 'survey', lambda **kw: survey([T.LlavaConfig, T.Florence2Config], **kw))
    assert (
        cli.main(['doctor', '--all', '--json', '--out', str(out)]) == 0
    )  # one holds, one is out for a reason that is stated
    got = json.loads(capsys.readouterr().out)
    assert [set(r) for r in got] == [{'class', 'model_type', 'ok', 'checks', 'reason'}] * 2 and [
        r['ok'] for r in got
    ] == [True, False]
    assert out.read_text().count('\n') == 3
    monkeypatch.setitem(D.CHECKS, 'empty_edit', lambda c: 'It leaks.')
    assert cli.main(['doctor', '--all', '--out', str(out)]) == 1
    assert 'It leaks.' in capsys.readouterr().out


def test_a_text_model_is_refused(tmp_path, capsys):
    T.LlamaConfig().save_pretrained(tmp_path)
    assert cli.main(['doctor', str(tmp_path), '--config-only']) == 2
    assert 'image tower' in capsys.readouterr().err


@pytest.mark.parametrize(
    'measured, words',
    [
        ({}, 'not measured'),
        ({True: True}, 'padded on the left'),
        ({True: False}, 'one by one'),
        ({True: False, False: True}, 'of equal lengths'),
        ({False: True}, 'of equal lengths'),
        ({True: False, False: False}, 'one by one'),
    ],
)
def test_batches_are_said_as_measured(measured, words):
    "It read an attribute that nothing sets, and said 'padded on the left' of every model"
    mllm = type('Handle', (), {'_shared': measured})()
    assert D.report._batches(mllm).startswith(words)


@pytest.mark.parametrize('provoke', ['hook', 'edit', 'compiled'])
def test_the_doctor_names_what_is_active(provoke):
    "Somebody's hook, an edit that was not ended, a compiled forward: the first check says so"
    m = MLLM.load('glyph-llava')
    if provoke == 'hook':
        m.model.model.multi_modal_projector.register_forward_hook(lambda module, args, out: out)
    elif provoke == 'edit':
        left = hooks.edit(m, 2, [5])
        left.__enter__()
    else:
        m.model.forward = torch.compile(m.model.forward, backend='eager')
    c = type('Case', (), dict(mllm=m))()
    said = D.CHECKS['nothing_foreign'](c)
    assert 'of others are active' in said and said.endswith('.')


def test_the_doctor_refuses_what_is_incomplete(tmp_path, capsys):
    "All its checks held on a checkpoint without a projector"
    import shutil

    from safetensors.torch import load_file, save_file

    from fusion_notebooks.cli import main

    folder = tmp_path / 'mine'
    shutil.copytree('data/models/glyph-llava', folder)
    kept = {k: v for k, v in load_file(folder / 'model.safetensors').items() if 'projector' not in k}
    save_file(kept, folder / 'model.safetensors', metadata=dict(format='pt'))
    assert main(['doctor', str(folder)]) == 2
    assert 'lack weights that the model needs' in capsys.readouterr().err
