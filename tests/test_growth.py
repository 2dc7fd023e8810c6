"""Growing touches one place: each toy below is added as the page on architecture shows it, in at most twenty lines, and is then seen wherever it should be.

The functions whose names begin with `add_` are that page's examples."""

import ast, inspect
from dataclasses import replace
import nbformat
import numpy as np
import pandas as pd
import pytest
from fusion_notebooks import (
    analyses,
    baselines,
    cli,
    contrast,
    demo,
    fusion,
    hooks,
    masking,
    metrics,
    plots,
    results,
    study,
    vqa,
)
from fusion_notebooks.core import catalog
from fusion_notebooks.mllm import MLLM

REGISTRIES = [
    catalog.SEMANTICS,
    catalog.METHODS,
    baselines.METHODS,
    contrast.CROPS,
    contrast.MASKS,
    analyses.ANALYSES,
    metrics.METRICS,
    vqa.BENCHMARKS,
]


@pytest.fixture(autouse=True)
def as_before():
    "What a test adds is gone after it"
    before = [dict(registry) for registry in REGISTRIES]
    commands = [*cli.app.registered_commands]
    yield
    cli.app.registered_commands[:] = commands
    for registry, old in zip(REGISTRIES, before):
        registry.clear()
        registry.update(old)


@pytest.fixture(scope='module')
def mllm():
    return MLLM.load('glyph-llava')


# ----------------------------------------------------------------- the examples


def add_semantic():
    "A semantic: half of the states"
    from fusion_notebooks.core import catalog

    def halved(states, given, strength):
        return states / 2

    catalog.add_semantic(catalog.Semantic('halve', 'states', 'half of their states', write=halved))


def add_crop():
    "A method of `contrast.refine`: a crop of the corner"
    from fusion_notebooks import contrast

    @contrast.crop_by('corner', 'control: the top left corner')
    def corner(view):
        return (0, 0, round(view.base), round(view.base))


def add_baseline():
    "Another method: the answer to the question asked twice"
    from fusion_notebooks import baselines

    @baselines.method('twice', 'asked twice')
    def twice(mllm, picture, question):
        return mllm.answer(picture, f'{question} {question}')


def add_metric():
    "A metric: is the first letter right?"
    from fusion_notebooks import metrics

    @metrics.metric('initial')
    def initial(prediction, answers):
        return float(any(prediction[:1].lower() == a[:1].lower() for a in answers))


def add_benchmark():
    "A benchmark: rows with words, a picture and one answer"
    from fusion_notebooks import vqa

    def fields(row, part):
        return dict(key=row['n'], image=row['picture'], question=row['words'], answers=[row['right']])

    vqa.BENCHMARKS['toy'] = vqa.Benchmark(metric='gqa', prompt='{question}', fields=fields, files=('toy.json',))


def add_analysis():
    "An analysis: how long the questions are"
    import pandas as pd
    from fusion_notebooks import analyses

    @analyses.analysis('length', modules='hooks', forwards=lambda layers: 0)
    def length_rows(mllm, samples, **_):
        return pd.DataFrame(dict(sample=[s.id for s in samples], length=[len(s.question) for s in samples]))


def add_figure(rows):
    "A figure of its rows, with intervals, as every figure here"
    from fusion_notebooks import metrics, plots

    fig, axes = plots.style._figure()
    mean, low, high = metrics.interval(rows.length, rows['sample'])
    axes[0, 0].errorbar([0], [mean], [[mean - low], [high - mean]], fmt='o')
    plots.style._title(axes[0, 0], rows, 'length of the questions')
    return fig


def add_command():
    "A command: greet somebody"
    from fusion_notebooks import cli
    from fusion_notebooks.core.errors import BadInput

    @cli.command('greet', 'Greetings', 'fusion greet world')
    def greet(name: str) -> int:
        "Say hello"
        if name == 'nobody':
            raise BadInput('There is nobody here: name a person.')
        print(f'Hello {name}')
        return 0


EXAMPLES = [
    add_semantic,
    add_crop,
    add_baseline,
    add_metric,
    add_benchmark,
    add_analysis,
    add_figure,
    add_command,
]


@pytest.mark.parametrize('add', EXAMPLES, ids=lambda f: f.__name__)
def test_an_example_is_short(add):
    body = ast.parse(inspect.getsource(add)).body[0].body[1:]
    lines = sum(node.end_lineno - node.lineno + 1 for node in body)
    assert lines <= 20


# ----------------------------------------------------------------- where they are seen


def test_a_semantic_reaches_sweeps_layers_figures_and_studies(mllm, tmp_path):
    assert 'halve' not in analyses.masking_options(None)['hows']
    add_semantic()
    samples = demo.samples(2)
    rows = masking.sweep(mllm, samples, ['halve', 'zero'])
    assert set(rows[rows.how == 'halve'].path) == {'naive'}  # nothing is known of it, so nothing is shared
    p = mllm.prompt(samples[0].image, samples[0].question)
    with hooks.edit(mllm, 3, p.visual, 'halve'):
        text = mllm.answer(p).text
    first = rows[(rows['sample'] == samples[0].id) & (rows.layer == 3) & (rows.how == 'halve')]
    assert first.prediction.item() == text
    assert 'halve' in analyses.masking_options(None)['hows'] and list(catalog.added()) == ['semantic halve']
    scored = rows.assign(score=1.0)
    assert fusion.fusion_layers(*fusion.masking_curve(scored, 'halve'), how='halve').layers == ()
    assert len(plots.masking(scored).axes) == 2
    assert '| halve |' in catalog.markdown_table(catalog.SEMANTICS)


def test_methods_reach_rows_tables_and_figures(mllm):
    add_crop()
    add_baseline()
    sample = demo.samples(2, kinds=('fine',))
    rows = analyses.refine_rows(mllm, sample, 'gqa', ['base', 'crop', 'crop-corner', 'twice'], None, None)
    assert not rows.why.any()
    corner = rows[(rows.method == 'crop-corner')].iloc[0]
    s = sample[0]
    asked_twice = mllm.answer(s.image, f'{s.question} {s.question}').text
    assert rows[(rows.method == 'twice') & (rows['sample'] == s.id)].prediction.item() == asked_twice
    side = contrast.view_side(mllm)
    assert tuple(corner.box) == (0, 0, side, side)
    assert 'crop-corner' in analyses.refine_options(lambda: (None, None))['methods']
    table = results.method_table(rows.assign(model='glyph-llava', dataset='glyph', kind='fine', image=rows['sample']))
    assert {'crop-corner', 'twice'} <= set(table.method)
    drawn = rows.assign(model='glyph-llava', kind='fine')
    assert plots.refine(drawn) and plots.pareto(drawn)


def test_a_metric_reaches_scores_and_tables_of_ones_own():
    add_metric()
    assert list(metrics.score('initial', ['red', 'Blue'], [('rose',), ('green',)])) == [1, 0]
    assert vqa.benchmark('mine.csv', metric='initial').metric == 'initial'


def test_a_benchmark_reaches_loading_and_settings(tmp_path):
    add_benchmark()
    folder = tmp_path / 'toy'
    folder.mkdir()
    demo.samples(1)[0].image.save(folder / 'a.png')
    row = dict(n='1', picture='a.png', words='What is it?', right='a star')
    (folder / 'toy.json').write_text(pd.Series([row]).to_json(orient='values'))
    (sample,) = vqa.load('toy', root=folder)
    assert (sample.question, sample.answers) == ('What is it?', ('a star',))
    (tmp_path / 'settings.ini').write_text('[study]\nmodels = glyph-llava\nbenchmarks = toy\nanalyses = masking\n')
    assert study.read_settings(tmp_path / 'settings.ini').benchmarks == ('toy',)


def test_an_analysis_and_a_figure_reach_a_study(tmp_path):
    add_analysis()
    notebooks = tmp_path / 'nbs/analyses'
    notebooks.mkdir(parents=True)
    cell = nbformat.v4.new_code_cell(
        "model = 'glyph-llava'\nsettings = 'settings.ini'", metadata=dict(tags=['parameters'])
    )
    kernel = dict(kernelspec=dict(name='python3', language='python', display_name='Python 3'))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), notebooks / 'length.ipynb')
    (tmp_path / 'settings.ini').write_text(
        '[study]\nmodels = glyph-llava\nanalyses = length\n[limits]\ncalibration = 1\nevaluation = 1\n'
    )
    s = study.read_settings(tmp_path / 'settings.ini')
    assert [job.analysis for job in study.jobs(s)] == ['length']
    given = study.parameters(notebooks / 'length.ipynb', dict(model='glyph-llava'))
    assert given == dict(model='glyph-llava')  # it would be run with the model that a study gives it
    rows = study.require('length', 'glyph-llava', settings=s)
    assert np.array_equal(rows.length, [len(x.question) for x in study.questions('glyph-llava', s)])
    fig = add_figure(rows)
    plots.save(fig, tmp_path, 'length', study.provenance(rows), rows)
    assert (tmp_path / 'length.png').exists() and (tmp_path / 'length.csv').exists()


def test_a_command_reaches_the_help_and_the_refusals(capsys):
    with pytest.raises(SystemExit):
        cli.main(['greet', 'world'])
    assert 'No such command' in capsys.readouterr().err
    add_command()
    with pytest.raises(SystemExit):
        cli.main(['--help'])
    listed = capsys.readouterr().out
    assert '─ Greetings ─' in listed and 'Say hello' in listed
    with pytest.raises(SystemExit):
        cli.main(['greet', '--help'])
    assert 'Example: fusion greet world' in capsys.readouterr().out
    assert cli.main(['greet', 'world']) == 0
    assert cli.main(['greet', 'nobody']) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ('Hello world\n', 'fusion: There is nobody here: name a person.\n')


def test_rows_of_what_was_added_have_keys_of_their_own(tmp_path):
    "Another function of the same name must not be taken for it"
    (tmp_path / 'settings.ini').write_text(
        '[study]\nmodels = glyph-llava\nanalyses = masking\n[limits]\ncalibration = 1\nevaluation = 1\n'
    )
    s = study.read_settings(tmp_path / 'settings.ini')
    job = study.jobs(s)[0]
    plain = study.units(job, s)[0]
    add_semantic()
    added = study.units(job, s)[0]

    def halved(states, given, strength):
        return states / 2.0

    catalog.SEMANTICS['halve'] = replace(catalog.SEMANTICS['halve'], write=halved)
    other = study.units(job, s)[0]
    assert len({str(sorted(k.items(), key=str)) for k in (plain, added, other)}) == 3
    exec('def nowhere(states, given, strength): return states', globals_ := {'__name__': 'elsewhere'})
    catalog.SEMANTICS['halve'] = replace(catalog.SEMANTICS['halve'], write=globals_['nowhere'])
    with pytest.raises(ValueError, match="The source of 'semantic halve' cannot be read"):
        study.units(job, s)


def test_a_semantic_of_attention_keeps_its_own_strength_in_a_study(tmp_path, tiny):
    (tmp_path / 'settings.ini').write_text(
        '[study]\nmodels = glyph-llava\nanalyses = masking\n[limits]\ncalibration = 1\nevaluation = 1\n'
    )
    s = study.read_settings(tmp_path / 'settings.ini')
    job = study.jobs(s)[0]
    keys = []
    for strength in (0.5, 0.25):
        catalog.SEMANTICS['faint'] = catalog.Semantic('faint', 'attention', 'less', strength=strength)
        keys.append(study.units(job, s)[0]['added'])
    assert keys[0].keys() == keys[1].keys() == {'semantic faint'} and keys[0] != keys[1]
    rows = analyses.masking_rows(tiny, demo.samples(2), lambda: demo.samples(2), 'gqa', ['faint', 'soft'])
    alone = masking.sweep(tiny, demo.samples(2), 'faint', strength=0.25)
    here, there, soft = (
        r[r.how == how].logp.to_numpy() for r, how in ((rows, 'faint'), (alone, 'faint'), (rows, 'soft'))
    )
    np.testing.assert_allclose(here, there, rtol=1e-6)
    assert not np.allclose(here, soft, rtol=1e-6)
    with pytest.raises(ValueError, match='semantic faint is known to this process only'):
        study.run(str(tmp_path / 'settings.ini'))


def test_a_decorator_with_a_sentence_may_stand_in_a_notebook_of_the_package():
    "The notebook is run beside its export: the same record a second time changes nothing, another one is refused"

    def corner(view):
        return (0, 0, 1, 1)

    corner.__module__ = 'fusion_notebooks.contrast.crops_and_masks'
    contrast.crop_by('nook', 'the corner')(corner)
    contrast.crop_by('nook', 'the corner')(corner)
    assert catalog.METHODS['crop-nook'].sentence == 'the corner'
    with pytest.raises(ValueError, match="'crop-nook' already"):
        contrast.crop_by('nook', 'another corner')(corner)


def test_a_baseline_that_gives_a_crop_must_say_so(tiny):
    @baselines.method('undeclared', 'a crop without a word')
    def undeclared(mllm, picture, question):
        return baselines.propose(mllm, picture, question, 'vicrop-rel')

    with pytest.raises(ValueError, match="The method 'undeclared' gave a crop: register it with crops=True"):
        baselines.answer(tiny, demo.samples(1)[0].image, 'Which digit is on the purple star?', 'undeclared')
