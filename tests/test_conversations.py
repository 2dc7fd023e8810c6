"System prompts, earlier turns, several pictures and thoughts equal what is written by hand"

import json
from pathlib import Path

import pytest

from fusion_notebooks import cli, contrast, demo, explore, masking, study
from fusion_notebooks.analyses import ANALYSES
from fusion_notebooks.core.errors import BadInput, NotSupported
from fusion_notebooks.mllm import MLLM, Answer, Sample, open_image

EX, Q = 'data/example.png', 'Which digit is on the purple star?'
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}"
    "{{ '<image>' if c['type'] == 'image' else c['text'] }}\n{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SYSTEM = 'Answer with one word.'
SAID = [dict(role='user', content='What color is the star?'), dict(role='assistant', content='purple')]


@pytest.fixture(scope='module')
def mllm():
    return MLLM.load('glyph-llava', chat_template=TEMPLATE)


def text(role, said):
    return dict(role=role, content=[dict(type='text', text=said)])


def by_hand(mllm, messages, pictures):
    "What somebody writes who has only transformers"
    words = mllm.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return mllm.processor(images=pictures, text=words, return_tensors='pt')['input_ids']


@pytest.mark.parametrize('k', [1, 2])
def test_a_conversation_has_the_tokens_that_are_written_by_hand(mllm, k):
    pictures = [open_image(EX)] * k
    got = mllm.prompt(pictures, Q, SYSTEM, SAID)
    first = dict(role='user', content=[dict(type='image')] * k + [dict(type='text', text=SAID[0]['content'])])
    hand = [text('system', SYSTEM), first, text('assistant', 'purple'), text('user', Q)]
    assert got.inputs['input_ids'].equal(by_hand(mllm, hand, pictures))
    assert len(got.visual) == 64 * k and len(got.grids) == k


def test_pictures_stand_where_the_history_places_them(mllm):
    pictures = [open_image(EX), open_image(EX).rotate(90)]
    shown = [dict(role='user', content=[dict(type='image'), dict(type='text', text='Where?')]), SAID[1]]
    hand = [
        *[shown[0], text('assistant', 'purple')],
        dict(role='user', content=[dict(type='image'), dict(type='text', text=Q)]),
    ]
    got = mllm.prompt(pictures, Q, history=shown)
    assert got.inputs['input_ids'].equal(by_hand(mllm, hand, pictures))


def test_whatever_asks_again_stays_in_the_conversation(mllm):
    talk = dict(system=SYSTEM, history=SAID)
    got = contrast.refine(mllm, EX, Q, **talk)
    pair = mllm.prompt([EX, got.crop], Q, **talk)
    alone = mllm.generate(pair)[0]
    assert got.answer.ids == alone.ids and abs(got.answer.logp - alone.logp) < 1e-4
    plain = mllm.generate(mllm.prompt([EX, got.crop], Q))[0]
    assert abs(plain.logp - alone.logp) > 1e-4  # the test would see a conversation that is forgotten
    assert got.base.logp == pytest.approx(mllm.answer(EX, Q, **talk).logp, abs=1e-4)


def test_a_sweep_and_the_explorer_in_a_conversation(mllm):
    with mllm.talking(SYSTEM, SAID):
        rows = masking.sweep(mllm, [Sample(EX, Q, ('0',))], 'knockout', layers=[1, 3])
    seen = explore.see(mllm, EX, Q, system=SYSTEM, history=SAID)
    again = explore.effect(seen, 'knockout', [1, 3])
    naive = masking.sweep(mllm, [Sample(EX, Q, ('0',))], 'knockout', layers=[1, 3], exact='naive')
    assert rows[rows.layer >= 0].logp.to_numpy() == pytest.approx(again.logp.to_numpy(), abs=1e-5)
    assert abs(rows.logp.to_numpy() - naive.logp.to_numpy()).max() > 1e-4
    assert mllm.system == '' and mllm.history == ()


def test_what_a_template_leaves_out_is_refused(mllm):
    plain = MLLM.load('glyph-llava')
    with pytest.raises(BadInput, match='no place for a system prompt'):
        plain.prompt(EX, Q, SYSTEM)
    deaf = MLLM.load(
        'glyph-llava', chat_template=TEMPLATE.replace('{% for m in messages %}', '{% for m in messages[-1:] %}')
    )
    with pytest.raises(BadInput, match='leaves out what is said'):
        deaf.prompt(EX, Q, history=SAID)
    for wrong in (SAID[:1], SAID[1:], ['Hi'], [dict(role='user', content=3), SAID[1]]):
        with pytest.raises(BadInput):
            mllm.prompt(EX, Q, history=wrong)
    with pytest.raises(BadInput, match='placeholder'):
        mllm.prompt(EX, Q, 'Look at <image>.')
    with pytest.raises(BadInput, match='places for 2 pictures, and 1 are given'):
        shown = [dict(role='user', content=[dict(type='image')]), SAID[1]]
        mllm.prompt(EX, Q, history=shown + shown)


def test_the_thought_is_not_what_is_scored(mllm, monkeypatch):
    thinking = MLLM.load('glyph-llava', chat_template=TEMPLATE + '<think>{# </think> #}')
    tokens = thinking.processor.tokenizer
    said = [
        *tokens('purple', add_special_tokens=False).input_ids,
        *tokens('</think>', add_special_tokens=False).input_ids,
    ]
    said += tokens('red', add_special_tokens=False).input_ids
    if '</think>' not in tokens.decode(said):
        pytest.skip('the tokenizer of the demo models cannot write the marker')
    answer = thinking.as_answer(said, -1.0)
    assert isinstance(answer, Answer) and (answer.thought, answer.text) == ('purple', 'red')
    assert MLLM.load('glyph-llava').as_answer(said, -1.0).thought == ''


def test_a_study_scores_no_thought_that_is_cut_off(tmp_path):
    "Its answer would be empty, and counted as wrong"
    model, processor = demo.make_model(layers=2)
    model.generation_config.eos_token_id = None  # it never comes to an end
    processor.chat_template = TEMPLATE + '{% if add_generation_prompt %}<think>{# </think> #}{% endif %}'
    for part in (model, processor):
        part.save_pretrained(tmp_path / 'data/models/thinker')
    (tmp_path / 'plain.jinja').write_text(TEMPLATE)
    (tmp_path / 'settings.ini').write_text(
        '[study]\nmodels = thinker talker\n[limits]\ncalibration = 1\nevaluation = 1\n'
        '[model talker]\npath = thinker\nchat_template = plain.jinja\n'
    )
    s = study.read_settings(tmp_path / 'settings.ini')
    with pytest.raises(BadInput, match='thinker is still thinking after 32 tokens'):
        study.require('early_exit', 'thinker', settings=s)
    assert len(study.require('early_exit', 'talker', settings=s))


def test_no_first_token_is_read_from_a_thought(monkeypatch):
    "Attention, early exits and causal maps would be about the thought; scores are about the answer behind it"
    from fusion_notebooks.study.checks import check_thoughts

    thinking = MLLM.load('glyph-llava', chat_template=TEMPLATE + '{# <think></think> #}')
    sample = Sample(id='1', image=open_image(EX), question=Q, answers=['6'])
    monkeypatch.setattr(MLLM, 'answers', lambda self, prompts: [Answer('red', [1], -1.0, True, 'purple')])
    check_thoughts(thinking, [sample])
    with pytest.raises(NotSupported, match='thinks before it answers.*first token'):
        check_thoughts(thinking, [sample], first_token=True)
    read = {name for name, a in ANALYSES.items() if a.first_token}
    assert read == {'attention', 'early_exit', 'causal'}


def test_a_study_computes_with_the_sinks_of_the_file(tmp_path):
    "Other sinks are not part of the key of a row"
    (tmp_path / 'settings.ini').write_text('[study]\nmodels = planted-noise\n[limits]\nevaluation = 1\n')
    s = study.read_settings(tmp_path / 'settings.ini')
    gate = study.load('planted-noise', s).gate
    before, gate.sinks = gate.sinks, None
    with pytest.raises(BadInput, match="sinks of planted-noise were changed in this process.*give it 'flat' back"):
        study.require('attention', 'planted-noise', settings=s)
    gate.sinks = before
    assert len(study.require('attention', 'planted-noise', settings=s))


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / 'chat.jinja').write_text(TEMPLATE)
    (tmp_path / 'settings.ini').write_text(
        '[study]\nmodels = talker\n[model talker]\npath = glyph-llava\nchat_template = chat.jinja\n'
    )
    (tmp_path / 'said.json').write_text(json.dumps(SAID))
    picture = str(Path(EX).resolve())
    monkeypatch.chdir(tmp_path)
    ask = ['ask', 'talker', picture, Q, '--system', SYSTEM, '--history', 'said.json']
    assert cli.main(ask) == 0
    p = MLLM.load('glyph-llava', chat_template=TEMPLATE).answer(picture, Q, system=SYSTEM, history=SAID).p
    assert f'(p = {p:.3f})' in capsys.readouterr().out.splitlines()[0]
    assert cli.main([*ask, '--image', picture]) == 0
    assert 'mask, attention' in capsys.readouterr().out
    (tmp_path / 'said.json').write_text('{')
    assert cli.main(ask) == 2
    assert 'said.json' in capsys.readouterr().err
