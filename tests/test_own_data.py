"Tables, metrics and methods of one's own in a study: from files, folders, the Hub and memory to figures and card"

import json, shutil, sys, types
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from fusion_notebooks import baselines, cli, contrast, demo, fusion, masking, metrics, study, vqa
from fusion_notebooks.core import catalog
from fusion_notebooks.core.errors import BadInput
from fusion_notebooks.study import own_code
from fusion_notebooks.study.own_code import own_module

SMALL = '[study]\nmodels = glyph-llava\nbenchmarks = {}\nanalyses = masking attention\n[limits]\ncalibration = 2\nevaluation = 3\n'
REGISTRIES = [metrics.METRICS, catalog.METHODS, baselines.METHODS, contrast.CROPS]


@pytest.fixture(autouse=True)
def as_before():
    "What a test adds is gone after it"
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, old in zip(REGISTRIES, before):
        registry.clear()
        registry.update(old)


@pytest.fixture
def table(tmp_path):
    "A table of 30 pictures, under columns of its own"
    (tmp_path / 'pictures').mkdir()
    rows = []
    for i, s in enumerate(demo.samples(30, kinds=('colour',))):
        s.image.save(tmp_path / f'pictures/{i}.png')
        rows.append(
            dict(
                image=f'pictures/{i}.png',
                question=s.question,
                answers=list(s.answers),
                box=[float(v) for v in s.box],
                kind='hue',
            )
        )
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


def _without_boxes(table, model, n):
    "Settings of a study of refine on the table without its boxes"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    bare = [{k: v for k, v in r.items() if k != 'box'} for r in rows]
    (table.parent / 'bare.jsonl').write_text('\n'.join(map(json.dumps, bare)))
    text = SMALL.format('bare.jsonl').replace('masking attention', 'refine').replace('glyph-llava', model)
    text = text.replace('calibration = 2', f'calibration = {n}').replace('evaluation = 3', 'evaluation = 1')
    (table.parent / 'settings.ini').write_text(text)
    return study.read_settings(table.parent / 'settings.ini')


def test_without_boxes_layers_are_measured_by_closing(table):
    "As `layers_by_closing` says by hand, from accuracies with each layer closed and maps under a general question"
    s = _without_boxes(table, 'glyph-llava', 8)
    rows = study.require('refine', 'glyph-llava', settings=s).set_index('method')
    mllm, asked = study.load('glyph-llava'), study.questions('glyph-llava', s, split='calibration')
    answers = {x.id: x.answers for x in asked}
    swept = masking.sweep(mllm, asked, ['knockout'])
    right = metrics.score('gqa', swept.prediction, [answers[i] for i in swept['sample']])
    by_layer = pd.Series(right).groupby(swept.layer.to_numpy()).mean()
    own, other = (
        np.array([contrast.first_pass(mllm, x.image, question or x.question).maps for x in asked])
        for question in (None, baselines.GENERAL)
    )
    costs, depends = 100 * (by_layer[-1] - by_layer.drop(-1)), fusion.dependence(own, other)
    (key, *_) = study.units(study.Job('refine', 'glyph-llava', 'bare', 'evaluation'), s)
    for how, below in (
        ('crop', None),
        ('mask', study.calibrate('glyph-llava', settings=s).review or mllm.n_layers - 1),
    ):
        by_hand = fusion.layers_by_closing(costs, depends, below=below)
        assert key['measured'][how] == dict(early=by_hand.early, late=by_hand.late, how='closing')
        row = rows.loc[f'{how}-calibrated']
        assert not row.why and row.post == by_hand.late and row.prediction


def test_layers_that_cannot_be_measured_are_refused_in_one_sentence(table):
    "No layer of a model without training costs accuracy, and without boxes nothing else tells which one reads"
    model, processor = demo.make_model(layers=4)
    for part in (model, processor):
        part.save_pretrained(table.parent / 'untrained')
    rows = study.require('refine', 'untrained', settings=_without_boxes(table, 'untrained', 2)).set_index('method')
    for method in ('crop-calibrated', 'mask-calibrated'):
        assert rows.why[method].endswith('no layer can be told to read the picture.') and not rows.prediction[method]
    assert rows.why.drop(['crop-calibrated', 'mask-calibrated']).eq('').sum() > 5


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
        ('[benchmark mine]\nfile = mine.jsonl\nmetric = none:fuzzy\n', 'The code none cannot be imported'),
        ('[benchmark mine]\nfile = mine.jsonl\nmetric = json:fuzzy\n', "The code json has no function 'fuzzy'"),
        ('[benchmark mine]\nfile = pictures\n', 'is a folder without a table: put metadata.csv'),
        ('[benchmark mine]\nfile = hf:mine\n', 'hf:mine is no data set on the Hub'),
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


def few(name, benchmark, **more):
    "Rows of a study of one analysis on a few samples"
    report = study.run(
        models=['glyph-llava'], benchmarks=benchmark, analyses=['attention'], limit=3, figures=False, **more
    )
    assert report.code == 0
    rows = report.rows('attention')
    assert {*rows.dataset} == {name} and rows['sample'].nunique() == 3 and rows.mass.notna().all()
    assert {*report.findings.benchmark} == {name}
    return rows


# --- folders of pictures, and pictures inside Parquet


@pytest.fixture
def folder_of_pictures(table):
    "An ImageFolder: the pictures, and metadata.csv beside them"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    about = [dict(question=r['question'], answer=r['answers'][0], box=json.dumps(r['box'])) for r in rows]
    flat = [dict(file_name=Path(r['image']).name) | a for r, a in zip(rows, about)]
    pd.DataFrame(flat).to_csv(table.parent / 'pictures/metadata.csv', index=False)
    return table.parent / 'pictures'


def test_a_folder_of_pictures_becomes_figures(folder_of_pictures, monkeypatch):
    monkeypatch.chdir(folder_of_pictures.parent)
    (folder_of_pictures.parent / 'settings.ini').write_text(SMALL.format('glyph'))
    assert cli.main(['study', '--benchmarks', 'pictures', '--analyses', 'attention']) == 0
    assert (folder_of_pictures.parent / 'figures/glyph-llava/pictures/attention-scores.png').exists()
    (one, *_) = vqa.load('pictures', 'all')
    assert one.id.startswith('pictures-') and one.source == 'metadata.csv, row 0'


def test_a_folder_whose_table_names_no_picture_is_refused(folder_of_pictures):
    metadata = folder_of_pictures / 'metadata.csv'
    metadata.write_text(metadata.read_text().replace('5.png', 'none.png'))
    with pytest.raises(OSError, match='metadata.csv, row 5: no file none.png in'):
        vqa.load(str(folder_of_pictures), 'all')


def test_pictures_inside_parquet(table, monkeypatch):
    monkeypatch.chdir(table.parent)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    vqa.write_table([r | dict(image=table.parent / r['image']) for r in rows], 'inside.parquet')
    shutil.rmtree(table.parent / 'pictures')
    assert {*few('inside', ['inside.parquet']).kind} == {'hue'}


def test_a_damaged_picture_inside_parquet_is_named(table):
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    pictures = [(table.parent / r['image']).read_bytes() for r in rows]
    pictures[2] = b'no picture'
    file = vqa.write_table([r | dict(image=b) for r, b in zip(rows, pictures)], table.parent / 'inside.parquet')
    with pytest.raises(BadInput, match='inside.parquet, row 2: the picture cannot be read'):
        vqa.load(str(file), 'all')


# --- the Hub


@pytest.fixture
def on_hub(table, monkeypatch):
    "A data set laid out as on the Hub, which `datasets` finds under its name in this folder"
    datasets = pytest.importorskip('datasets')
    monkeypatch.chdir(table.parent)
    monkeypatch.setenv('XDG_CACHE_HOME', str(table.parent / 'cache'))
    monkeypatch.setattr('huggingface_hub.dataset_info', lambda name: types.SimpleNamespace(sha='a' * 40))
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    for split in ('train', 'validation'):
        photos = [dict(bytes=(table.parent / r['image']).read_bytes(), path=None) for r in rows]
        about = [dict(question=r['question'], answer=r['answers'][0], box=r['box']) for r in rows]
        some = [dict(photo=photo) | a for photo, a in zip(photos, about)]
        data = datasets.Dataset.from_list(some).cast_column('photo', datasets.Image())
        (table.parent / 'me/mine/data').mkdir(parents=True, exist_ok=True)
        data.to_parquet(str(table.parent / f'me/mine/data/{split}-00000-of-00001.parquet'))
    return table.parent


SECTION = '[benchmark photos]\nfile = hf:me/mine:{}\nimage = photo\nending = Briefly.\n'


def test_a_data_set_on_the_hub_becomes_figures_and_is_read_once(on_hub, capsys):
    text = SMALL.format('photos').replace('masking attention', 'attention')
    (on_hub / 'settings.ini').write_text(text + SECTION.format('validation'))
    assert cli.main(['study', '--analyses', 'attention', '--workers', '2']) == 0
    assert (on_hub / 'figures/glyph-llava/photos/attention-scores.png').exists()
    shutil.rmtree(on_hub / 'me')  # nothing is left to ask
    study.samples.draw.cache_clear()
    s = study.read_settings()
    (one, *_) = study.questions('glyph-llava', s)
    assert one.source.startswith('me/mine@aaaaaaa validation, row ') and one.question.endswith('\nBriefly.')
    assert study.status(s).done.sum() == study.status(s).units.sum() > 0


def test_a_data_set_that_is_not_clear_is_refused(on_hub):
    for name, said in (
        ('hf:me/mine', 'me/mine has the splits train, validation: say which one, as in hf:me/mine:train'),
        ('hf:me/mine:test', "me/mine has no split 'test' but train, validation; before a split"),
        ('hf:me/mine:validation', "me/mine@aaaaaaa validation, row 0: column 'image' is missing; it has photo"),
    ):
        with pytest.raises(BadInput, match=said):
            vqa.load(name, 'all')
    with pytest.raises(OSError, match='me/yours could not be read from the Hub'):
        vqa.load('hf:me/yours', 'all')


def test_the_hub_needs_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(BadInput, match='me/mine from the Hub needs the package datasets'):
        vqa.load('hf:me/mine', cache=tmp_path)


# --- tables in memory


def in_memory(kind, table):
    "The rows of a table as pandas, dicts, samples, or a data set"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    rows = [r | dict(image=str(table.parent / r['image'])) for r in rows]
    if kind == 'pandas':
        return pd.DataFrame(rows)
    if kind == 'datasets':
        datasets = pytest.importorskip('datasets')
        return datasets.Dataset.from_list(rows).cast_column('image', datasets.Image())
    return demo.samples(30, kinds=('colour',)) if kind == 'samples' else rows


@pytest.mark.parametrize('kind', ['pandas', 'dicts', 'samples', 'datasets'])
def test_a_table_in_memory(kind, table, monkeypatch):
    monkeypatch.chdir(table.parent)
    rows = few('mine', dict(mine=in_memory(kind, table)))
    assert {*rows.kind} == {'colour' if kind == 'samples' else 'hue'}
    again = study.choose(models=['glyph-llava'], benchmarks=['data/tables/mine.parquet'], limit=3)
    assert len(study.require('attention', 'glyph-llava', settings=again, compute=False)) == len(rows)


def test_what_is_no_table_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for wrong, said in (
        (7, 'A int is no table'),
        ([], 'it has no rows'),
        ([dict(image='none.png', question='What?', answers=['a'])], 'row 0: its picture cannot be written'),
    ):
        with pytest.raises(BadInput, match=said):
            study.run(models=['glyph-llava'], benchmarks=dict(mine=wrong))


# --- metrics and methods


FUZZY = 'def fuzzy(text, answers):\n    return float(text[:1] == answers[0][:1])\n'


def test_a_metric_of_ones_own_in_all_processes(table, monkeypatch):
    folder = table.parent
    monkeypatch.chdir(folder)
    (folder / 'my_metrics.py').write_text(FUZZY)
    section = '[benchmark mine]\nfile = mine.jsonl\nmetric = my_metrics:fuzzy\n'
    (folder / 'settings.ini').write_text(SMALL.format('mine') + section)
    assert cli.main(['study', '--analyses', 'masking', '--workers', '2']) == 0
    s = study.read_settings()
    rows = study.require('masking', 'glyph-llava', settings=s, compute=False)
    right = {x.id: x.answers[0][:1] for x in study.questions('glyph-llava', s)}
    assert (rows.score == (rows.prediction.str[:1] == rows['sample'].map(right))).all() and len(rows)
    job = study.jobs(s)[0]
    before = study.units(job, s)[0]['added']
    (folder / 'my_metrics.py').write_text(FUZZY + '# changed\n')
    assert study.units(job, s)[0]['added'].keys() == before.keys() and study.units(job, s)[0]['added'] != before


METHOD = '''from fusion_notebooks import baselines, contrast


@baselines.method('twice', 'the question asked twice')
def twice(mllm, picture, question):
    return mllm.answer(picture, f'{question} {question}')


@contrast.crop_by('corner', 'the top left corner')
def corner(view):
    return (0, 0, round(view.base), round(view.base))
'''


def test_methods_of_ones_own_reach_rows_tables_and_figures(table, monkeypatch):
    monkeypatch.chdir(table.parent)
    Path('my_methods.py').write_text(METHOD)
    Path('settings.ini').write_text(
        SMALL.format('mine.jsonl').replace('masking attention', 'refine\ncode = my_methods.py')
    )
    assert cli.main(['study']) == 0
    rows = study.require('refine', 'glyph-llava', settings=study.read_settings(), compute=False)
    mine = rows[rows.method.isin(['twice', 'crop-corner'])]
    assert mine.method.nunique() == 2 and not mine.why.any()
    shown = Path('data/runs/glyph-llava/mine/refine.ipynb').read_text()
    assert 'twice' in shown and 'crop-corner' in shown
    assert Path('figures/glyph-llava/mine/refine.png').exists()


def test_what_only_this_process_knows_is_refused_where_others_take_part(table, monkeypatch):
    monkeypatch.chdir(table.parent)

    @baselines.method('here', 'known here')
    def here(mllm, picture, question):
        return mllm.answer(picture, question)

    given = dict(models=['glyph-llava'], benchmarks=['mine.jsonl'], analyses=['attention'], limit=1)
    for others in (dict(), dict(figures=False, workers=2)):
        with pytest.raises(BadInput, match='baseline here is known to this process only'):
            study.run(**given, **others)
    assert study.run(**given, figures=False).code == 0


def test_what_code_imports_from_beside_it_is_part_of_the_key(table, monkeypatch):
    "And is imported again where it changed: a key must not say new code where the old one ran"
    monkeypatch.chdir(table.parent)
    Path('my_methods.py').write_text('from beside import SHARE\n' + METHOD)
    Path('settings.ini').write_text(
        SMALL.format('mine.jsonl').replace('masking attention', 'refine\ncode = my_methods.py')
    )
    found = []
    for share in ('0.5', '0.75'):
        Path('beside.py').write_text(f'SHARE = {share}\n')
        s = study.read_settings('settings.ini')
        key = study.units(study.Job('refine', s.models[0], s.benchmarks[0], 'evaluation'), s)[0]
        found.append((key['added'], own_module('my_methods.py', s.root).SHARE))
    assert found[0][0] != found[1][0] and found[1][1] == 0.75


def test_all_of_an_installed_package_is_part_of_the_key(table, monkeypatch):
    "Where `code =` names one, the method that it registers may use any of its modules"
    monkeypatch.chdir(table.parent)
    found = []
    for share in ('0.5', '0.75'):
        folder = table.parent / f'site{share}'
        (folder / 'my_package').mkdir(parents=True)
        (folder / 'my_package/__init__.py').write_text('from .beside import SHARE\n' + METHOD)
        (folder / 'my_package/beside.py').write_text(f'SHARE = {share}\n')
        with monkeypatch.context() as installed:
            installed.syspath_prepend(folder)
            Path('settings.ini').write_text(
                SMALL.format('mine.jsonl').replace('masking attention', 'refine\ncode = my_package')
            )
            s = study.read_settings('settings.ini')
            key = study.units(study.Job('refine', s.models[0], s.benchmarks[0], 'evaluation'), s)[0]
            found.append(key['added'])
        for name in [n for n in sys.modules if n.partition('.')[0] == 'my_package']:
            del sys.modules[name]
        own_code._package_text.cache_clear()  # another process would not have it
    assert found[0] != found[1]


def test_code_that_cannot_be_imported_is_refused(table, monkeypatch):
    monkeypatch.chdir(table.parent)
    Path('wrong.py').write_text('raise RuntimeError("not today")')
    for code, said in (('none.py', 'there is no such file'), ('wrong.py', 'RuntimeError: not today')):
        with pytest.raises(BadInput, match=said):
            study.run(models=['glyph-llava'], benchmarks=['mine.jsonl'], code=[code])
