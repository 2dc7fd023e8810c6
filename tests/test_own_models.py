"Sections [model NAME]: every word reaches the model and the key of its rows, and is refused where it cannot be honoured"

import json
import shutil
from dataclasses import replace

import pytest
import torch

from fusion_notebooks import cli, demo, study
from fusion_notebooks.core.errors import BadInput, NotSupported
from fusion_notebooks.mllm import MLLM

EX, Q = 'data/example.png', 'Which digit is on the purple star?'
HEAD = '[study]\nmodels = mine\nbenchmarks = glyph\nanalyses = attention\nunit = 2\n[limits]\ncalibration = 1\nevaluation = 1\n'
TEMPLATE = "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}\n{% endfor %}{% endfor %}ASSISTANT:"


def settings(folder, words, head=HEAD):
    (folder / 'settings.ini').write_text(head + '[model mine]\n' + '\n'.join(f'{k} = {v}' for k, v in words.items()))
    return study.read_settings(folder / 'settings.ini')


def key_of(s):
    return study.units(study.Job('attention', 'mine', 'glyph', 'evaluation'), s)[0]


@pytest.fixture
def adapter(tmp_path):
    peft = pytest.importorskip('peft')
    mllm = MLLM.load('glyph-llava')
    config = peft.LoraConfig(target_modules=['q_proj', 'v_proj'], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(mllm.model, config)
    for name, q in wrapped.named_parameters():
        if 'lora_' in name:
            q.data *= 3
    wrapped.save_pretrained(tmp_path / 'tuned')
    return mllm.answer(EX, Q)


def test_from_the_section_to_rows_figures_and_card(tmp_path, adapter, monkeypatch, capsys):
    (tmp_path / 'chat.jinja').write_text(TEMPLATE)
    words = dict(path='glyph-llava', adapter='tuned', dtype='bfloat16', device='cpu', attention='eager')
    words |= dict(chat_template='chat.jinja', system='Answer with one word.')
    s = settings(tmp_path, words)
    monkeypatch.chdir(tmp_path)
    assert cli.main(['study']) == 0
    assert 'Answer with one word.' in json.loads((tmp_path / 'figures/mine/card.json').read_text())['loading']
    assert (tmp_path / 'figures/mine/card.html').exists()
    rows = study.require('attention', 'mine', settings=s, compute=False)
    assert {*rows.model} == {'mine'} and {*rows.dtype} == {'bfloat16'}
    (said,) = {*rows.loading}
    for word in (
        '"adapter": "tuned ',
        '"attention": "eager"',
        '"chat_template": ',
        '"system": "Answer with one word."',
    ):
        assert word in said
    assert cli.main(['study']) == 0
    assert 'done before, unchanged' in capsys.readouterr().err


@pytest.mark.parametrize(
    'word, value, seen',
    [
        ('dtype', 'bfloat16', lambda m: m.dtype == torch.bfloat16),
        ('dtype', 'auto', lambda m: m.dtype == torch.bfloat16),
        ('device', 'cpu', lambda m: m.device.type == 'cpu'),
        ('device_map', 'auto', lambda m: m.words.get('device_map') == 'auto'),
        ('attention', 'eager', lambda m: m.model.config.get_text_config()._attn_implementation == 'eager'),
        ('revision', 'main', lambda m: m.revision == 'main'),
    ],
)
def test_each_word_reaches_the_model_and_the_key(tmp_path, word, value, seen):
    s = settings(tmp_path, dict(path='glyph-llava', **{word: value}))
    plain = settings(tmp_path, dict(path='glyph-llava'))
    mllm = study.load('mine', s)
    assert seen(mllm) and mllm.name == 'mine'
    assert not seen(study.load('mine', plain)) or value == 'cpu'
    assert key_of(s)['loading'] != key_of(plain).get('loading')
    assert mllm.answer(EX, Q).text == '0'


def test_pixel_limits(tmp_path):
    s = settings(tmp_path, dict(path='glyph-qwen2vl', min_pixels=784, max_pixels=2304))
    few, many = study.load('mine', s).prompt(EX, Q), MLLM.load('glyph-qwen2vl').prompt(EX, Q)
    assert len(few.visual) < len(many.visual)
    with pytest.raises(BadInput, match='has no max_pixels'):
        study.load('mine', settings(tmp_path, dict(path='glyph-llava', max_pixels=2304)))


def test_sinks_of_a_planted_model(tmp_path):
    "A schedule that is named is in force and in the key; without a word the first one of the gate is"
    plain = settings(tmp_path, dict(path='planted-noise'))
    before, flat = key_of(plain), study.load('mine', plain).gate
    assert flat.sinks is flat.schedules['flat'] and min(flat.sinks.shares[:7]) >= 0.5 and not flat.sinks.harmful
    for word in ('rising', 'none'):
        s = settings(tmp_path, dict(path='planted-noise', sinks=word))
        mllm = study.load('mine', s)
        assert mllm.gate.sinks is mllm.gate.schedules.get(word)
        assert key_of(s)['loading'] == f'{{"sinks": "{word}"}}' and 'loading' not in before
        study.check_as_loaded(mllm)
    mllm.gate.sinks = 'flat'
    with pytest.raises(BadInput, match="give it 'none' back"):
        study.check_as_loaded(mllm)
    mllm.gate.sinks = None
    with pytest.raises(BadInput, match="no sinks 'loud': give None, or one of flat, rising"):
        MLLM.load('planted-noise', sinks='loud')
    with pytest.raises(BadInput, match='glyph-llava has no planted noise'):
        MLLM.load('glyph-llava', sinks='flat')


def test_an_adapter_is_on_the_model_and_its_content_in_the_key(tmp_path, adapter):
    s = settings(tmp_path, dict(path='glyph-llava', adapter='tuned'))
    got = study.load('mine', s).answer(EX, Q)
    assert got.ids == adapter.ids and abs(got.logp - adapter.logp) < 1e-5
    assert abs(got.logp - MLLM.load('glyph-llava').answer(EX, Q).logp) > 1e-3
    before = key_of(s)['loading']
    config = tmp_path / 'tuned/adapter_config.json'
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4'))
    assert key_of(s)['loading'] != before
    with pytest.raises(BadInput, match='is an adapter itself'):
        MLLM.load(tmp_path / 'tuned', adapter=tmp_path / 'tuned')
    with pytest.raises(BadInput, match='No adapter at'):
        MLLM.load('glyph-llava', adapter=tmp_path / 'none')


def test_a_chat_template_by_its_content(tmp_path):
    (tmp_path / 'chat.jinja').write_text(TEMPLATE)
    s = settings(tmp_path, dict(path='glyph-llava', chat_template='chat.jinja'))
    assert study.load('mine', s).processor.chat_template == TEMPLATE
    before = key_of(s)['loading']
    (tmp_path / 'chat.jinja').write_text(TEMPLATE + ' ')
    assert key_of(study.read_settings(tmp_path / 'settings.ini'))['loading'] != before


@pytest.mark.parametrize('how, needs', [('torchao-int8', 'torchao'), ('bitsandbytes-4bit', 'bitsandbytes')])
def test_quantization_with_its_library_or_a_sentence(tmp_path, how, needs):
    from importlib.util import find_spec

    s = settings(tmp_path, dict(path='glyph-llava', quantization=how))
    if not find_spec(needs):
        with pytest.raises(NotSupported, match=needs):
            study.load('mine', s)
        return
    mllm, plain = study.load('mine', s), MLLM.load('glyph-llava')
    assert mllm.state() not in (None, plain.state()) and mllm.answer(EX, Q).text == plain.answer(EX, Q).text


@pytest.mark.parametrize(
    'words, wrong',
    [
        (dict(dtype='float32'), 'path is empty or missing'),
        (dict(path='glyph-llava', precision='half'), "unknown key 'precision'"),
        (dict(path='glyph-llava', dtype='half'), 'must be one of float32'),
        (dict(path='glyph-llava', device='a b'), 'must be a device'),
        (dict(path='glyph-llava', device='cpu', device_map='auto'), 'give one of them'),
        (dict(path='glyph-llava', device_map='everywhere there'), 'must be auto, balanced'),
        (dict(path='glyph-llava', attention='fast'), 'must be one of sdpa'),
        (dict(path='glyph-llava', quantization='4bit'), 'must be one of torchao-int8'),
        (dict(path='glyph-llava', revision='a b'), 'must be a branch'),
        (dict(path='glyph-llava', adapter=''), 'adapter is empty'),
        (dict(path='glyph-llava', system=''), 'system is empty'),
        (dict(path='glyph-llava', chat_template='none.jinja'), 'no chat template'),
        (dict(path='glyph-llava', min_pixels='many'), 'must be a whole number'),
        (dict(path='glyph-llava', max_pixels='0'), 'must be a whole number'),
        (dict(path='glyph-llava', min_pixels='9', max_pixels='4'), 'more than max_pixels'),
    ],
)
def test_words_that_are_refused(tmp_path, words, wrong):
    with pytest.raises(BadInput, match=wrong):
        settings(tmp_path, words)


def test_two_models_never_share_a_name(tmp_path):
    (tmp_path / 'data/models/mine').mkdir(parents=True)
    with pytest.raises(BadInput, match="another model is called 'mine'"):
        settings(tmp_path, dict(path='glyph-llava'))
    (tmp_path / 'data/models/mine').rmdir()
    shutil.copytree('data/models/glyph-llava', tmp_path / 'elsewhere/mine')
    s = settings(tmp_path, dict(path='glyph-llava'))
    with pytest.raises(BadInput, match="Two models are called 'mine'"):
        study.samples.check_names(replace(s, models=('mine', 'elsewhere/mine')))
    with pytest.raises(BadInput, match='two sections are called'):
        settings(tmp_path, dict(path='glyph-llava'), HEAD + '[model  mine]\npath = org/name\n')


def test_a_library_that_is_missing(tmp_path, monkeypatch, adapter):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kw):
        if name.split('.')[0] == 'peft':
            raise ImportError(name)
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(NotSupported, match='needs peft: pip install peft'):
        MLLM.load('glyph-llava', adapter=tmp_path / 'tuned')
    with pytest.raises(NotSupported, match='FlashAttention2'):
        MLLM.load('glyph-llava', attention='flash_attention_2')
    with pytest.raises(NotSupported, match="device 'cuda:9' is not there"):
        MLLM.load('glyph-llava', device='cuda:9')


def test_a_model_that_was_trained_on_is_loaded_again(tmp_path):
    "The key of its rows says the new weights, so they must not be those of the old ones"
    s = settings(tmp_path, dict(path='tiny'))
    model, processor = demo.make_model(layers=2)
    for bias in (0.0, 1.0):
        model.get_decoder().norm.weight.data += bias
        for part in (model, processor):
            part.save_pretrained(tmp_path / 'tiny')
        assert torch.equal(study.load('tiny', s).norm.weight, model.get_decoder().norm.weight)
