"Refined answers inside other people's loops are those of `refine`: generate of transformers, and lmms-eval on a local task"

import json, os, subprocess, sys, tomllib
from importlib.util import find_spec
from pathlib import Path
import pytest
from fusion_notebooks import contrast, demo, publish
from fusion_notebooks.core.errors import BadInput, NotSupported
from fusion_notebooks.mllm import MLLM, Answer

ROOT, N = Path(__file__).parents[1], 50


@pytest.fixture(scope='module')
def glyph():
    return MLLM.load('glyph-llava')


@pytest.fixture(scope='module')
def asked():
    return demo.samples(N, 'calibration', seed=7)


@pytest.fixture(scope='module')
def refined(glyph, asked):
    return [contrast.refine(glyph, s.image, s.question, how='crop', by='focus') for s in asked]


def test_custom_generate_answers_as_refine(glyph, asked, refined):
    changed = 0
    for s, r in zip(asked, refined):
        ids = glyph.model.generate(
            custom_generate=str(publish.generate_folder()),
            trust_remote_code=True,
            processor=glyph.processor,
            image=s.image,
            question=s.question,
        )
        prompt = glyph.prompt(s.image, s.question)
        assert ids[0, : prompt.length].tolist() == prompt.inputs['input_ids'][0].tolist()
        assert ids[0, prompt.length :].tolist() == r.answer.ids
        changed += r.answer.ids != r.base.ids
    assert changed  # or the plain answers would have passed, too


@pytest.mark.parametrize(
    'given', [dict(do_sample=True), dict(num_beams=2), dict(image=None), dict(refine='crop-oracle')]
)
def test_custom_generate_refuses_what_it_cannot(glyph, asked, given):
    kw = dict(processor=glyph.processor, image=asked[0].image, question=asked[0].question) | given
    with pytest.raises(ValueError, match='leave|give processor|no method'):
        glyph.model.generate(custom_generate=str(publish.generate_folder()), trust_remote_code=True, **kw)


TASK = """dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
task: glyph_local
test_split: test
output_type: generate_until
doc_to_visual: !function utils.picture
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 32
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
UTILS = """import io
from PIL import Image


def picture(doc):
    return [Image.open(io.BytesIO(doc['picture'])).convert('RGB')]
"""


def local_task(folder, asked):
    "A task of lmms-eval over a Parquet file, and what tells it of our model"
    import io
    import pandas as pd

    rows = []
    for s in asked:
        buffer = io.BytesIO()
        s.image.save(buffer, 'png')
        rows.append(dict(picture=buffer.getvalue(), question=s.question, answer=s.answers[0]))
    (folder / 'task').mkdir()
    pd.DataFrame(rows).to_parquet(folder / 'task/test.parquet')
    (folder / 'task/glyph_local.yaml').write_text(TASK.format(data=folder / 'task/test.parquet'))
    (folder / 'task/utils.py').write_text(UTILS)
    entry = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['entry-points']['lmms_eval.models']
    plugin = folder / 'plugin/fusion_plugin-0.dist-info'
    plugin.mkdir(parents=True)
    (plugin / 'METADATA').write_text('Metadata-Version: 2.1\nName: fusion-plugin\nVersion: 0\n')
    (plugin / 'entry_points.txt').write_text(f'[lmms_eval.models]\nfusion = {entry["fusion"]}\n')


def test_lmms_eval_answers_as_refine(tmp_path, asked, refined):
    "Through its own command, on a local task; FUSION_LMMS_EVAL names a Python that has it, where this one has not"
    python = os.environ.get('FUSION_LMMS_EVAL') or (sys.executable if find_spec('lmms_eval') else '')
    if not python:
        pytest.skip('lmms-eval is not installed, and FUSION_LMMS_EVAL names no Python that has it')
    local_task(tmp_path, asked)
    env = os.environ | dict(
        PYTHONPATH=f'{ROOT}:{tmp_path / "plugin"}', HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path / 'home')
    )
    args = '--model fusion --model_args pretrained=glyph-llava,refine=crop-focus --tasks glyph_local --batch_size 1'
    args += f' --include_path {tmp_path}/task --output_path {tmp_path}/out --log_samples'
    done = subprocess.run(
        [python, '-m', 'lmms_eval', *args.split()], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [file] = (tmp_path / 'out').rglob('*samples*.jsonl')
    rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda r: r['doc_id'])
    said = [r['filtered_resps'][0] if isinstance(r['filtered_resps'], list) else r['filtered_resps'] for r in rows]
    assert said == [r.answer.text for r in refined] and len(said) == N


def test_what_a_task_asks_beyond_refining_is_refused(asked):
    check, picture = publish.harnesses._check_generation, publish.harnesses._picture_of
    check(dict(do_sample=False, temperature=0, num_beams=1, top_p=None, max_new_tokens=4))
    check(dict(temperature=0.7))  # without sampling it has no effect
    for given in (dict(do_sample=True), dict(num_beams=4), dict(do_sample=True, temperature=0.7)):
        with pytest.raises(NotSupported, match='greedy'):
            check(given)
    for visuals in ([], [asked[0].image] * 2, ['video.mp4']):
        with pytest.raises(NotSupported, match='one picture'):
            picture(visuals)
    with pytest.raises(BadInput, match='no method that answers'):
        publish.refined_answer(None, None, 'what', 'magic')


def test_an_answer_that_is_cut_within_a_thought_is_not_handed_on():
    "It would be empty, and scored as wrong"
    assert publish.harnesses._spoken(Answer('red', [5, 2], -0.1, thought='Well'), 'm') == 'red'
    with pytest.raises(NotSupported, match='m is still thinking after 2 tokens'):
        publish.harnesses._spoken(Answer('', [5, 6], -0.1, finished=False, thought='Well'), 'm')
