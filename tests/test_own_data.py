"Tables of one's own in a study: by path and by section, from files to figures and card"

import json
from pathlib import Path
import pytest
from fusion_notebooks import cli, demo, study
from fusion_notebooks.core.errors import BadInput

SMALL = '[study]\nmodels = glyph-llava\nbenchmarks = {}\nanalyses = masking attention\n[limits]\ncalibration = 2\nevaluation = 3\n'


@pytest.fixture
def table(tmp_path):
    "A table of 30 pictures, under columns of its own"
    (tmp_path / 'pictures').mkdir()
    rows = []
    for i, s in enumerate(demo.samples(30, kinds=('colour',))):
        s.image.save(tmp_path / f'pictures/{i}.png')
        rows.append(dict(image=f'pictures/{i}.png', question=s.question, answers=list(s.answers), box=[float(v) for v in s.box], kind='hue'))
    (tmp_path / 'mine.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return tmp_path / 'mine.jsonl'


def test_a_table_by_its_path_becomes_rows_figures_and_card(table, monkeypatch, capsys):
    monkeypatch.chdir(table.parent)
    (table.parent / 'settings.ini').write_text(SMALL.format('glyph'))
    command = ['study', '--benchmarks', 'mine.jsonl', '--analyses', 'attention', 'masking']
    assert cli.main(command) == 0
    assert 'all of it on one page: figures/index.html' in capsys.readouterr().out
    page = (table.parent / 'figures/index.html').read_text()
    assert '<h2>glyph-llava/mine</h2>' in page and 'src="glyph-llava/mine/attention-scores.png"' in page
    figures = table.parent / 'figures/glyph-llava'
    assert (figures / 'mine/attention-scores.png').exists() and (figures / 'card.html').exists()
    assert cli.main(command) == 0
    assert 'done before, unchanged' in capsys.readouterr().err
    s = study.choose(benchmarks=['mine.jsonl'])
    rows = study.require('attention', 'glyph-llava', 'mine', settings=s, compute=False)
    assert {*rows.dataset} == {'mine'} and {*rows.kind} == {'hue'} and rows['sample'].nunique() == 3
    first = {x.picture for x in study.questions('glyph-llava', s, 'mine', 'calibration')}
    assert first and not first & {*rows.image}


def test_a_section_says_columns_metric_ending_and_share(table):
    folder = table.parent
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    renamed = [dict(photo=r['image'], text=r['question'], answers=r['answers']) for r in rows]
    (folder / 'other.jsonl').write_text('\n'.join(map(json.dumps, renamed)))
    section = '[benchmark photos]\nfile = other.jsonl\nimage = photo\nquestion = text\nmetric = anls\nending = Briefly.\nshare = 0.5\n'
    (folder / 'settings.ini').write_text(SMALL.format('photos') + section)
    s = study.read_settings(folder / 'settings.ini')
    job = study.jobs(s)[0]
    assert study.units(job, s)[0]['metric'] == 'anls' and job.benchmark == 'photos'
    (one, *_) = study.questions('glyph-llava', s)
    assert one.question.endswith('\nBriefly.') and Path(one.image).name.endswith('.png')
    rows = study.require('attention', 'glyph-llava', settings=s, limit=1)
    assert {*rows.dataset} == {'photos'}


def test_a_changed_picture_or_ending_makes_other_keys(table):
    folder = table.parent
    text = SMALL.format('mine') + '[benchmark mine]\nfile = mine.jsonl\n'
    (folder / 'settings.ini').write_text(text)

    def keys():
        s = study.read_settings(folder / 'settings.ini')
        return [k['content'] for job in study.jobs(s) for k in study.units(job, s)]

    before = keys()
    (folder / 'settings.ini').write_text(text + 'ending = Briefly.\n')
    ended = keys()
    assert ended != before
    study.samples.draw.cache_clear()
    for i, s in enumerate(demo.samples(30, seed=9)):
        s.image.save(table.parent / f'pictures/{i}.png')
    assert keys() != ended


def test_a_faulty_row_is_named(table):
    lines = table.read_text().splitlines()
    lines[4] = json.dumps(json.loads(lines[4]) | dict(question=''))
    table.write_text('\n'.join(lines))
    (table.parent / 'settings.ini').write_text(SMALL.format('mine.jsonl'))
    with pytest.raises(BadInput, match="mine.jsonl, row 4: the question is ''; it must be a text"):
        study.require('attention', 'glyph-llava', settings=study.read_settings(table.parent / 'settings.ini'))


@pytest.mark.parametrize(
    'section, said',
    [
        ('[benchmark mine]\n', 'file is empty or missing'),
        ('[benchmark mine]\nfile = none.csv\n', 'no table at'),
        ('[benchmark mine]\nfile = mine.jsonl\nmetric = best\n', "no metric 'best'; known: "),
        ('[benchmark mine]\nfile = mine.jsonl\npicture = x\n', "unknown key 'picture'"),
        ('[benchmark pope]\nfile = mine.jsonl\n', "'pope' is no name for a table of your own"),
        ('[benchmark a/b]\nfile = mine.jsonl\n', "'a/b' is no name for a table of your own"),
        ('[benchmark mine]\nfile = mine.jsonl\nending = {question}\n', 'must not hold braces'),
    ],
)
def test_sections_are_refused_in_a_sentence(table, section, said):
    (table.parent / 'settings.ini').write_text(SMALL.format('glyph') + section)
    with pytest.raises(BadInput, match=said) as e:
        study.read_settings(table.parent / 'settings.ini')
    assert '\n' not in str(e.value)


def test_a_study_from_python_without_any_settings(table, monkeypatch):
    monkeypatch.chdir(table.parent)
    report = study.run(models=['glyph-llava'], benchmarks=['mine.jsonl'], analyses=['attention'], figures=False)
    assert report.code == 0
    s = study.choose(models=['glyph-llava'], benchmarks=['mine.jsonl'])
    rows = study.require('attention', 'glyph-llava', settings=s, compute=False)
    assert {*rows.dataset} == {'mine'} and s.results == table.parent / 'data/results'
