"The study on a tiny untrained model: what is there is never computed again, what breaks is said and stops nothing else"

import json, shutil, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest
from conftest import replaced
from fusion_notebooks import analyses, study
from fusion_notebooks.core import catalog
from fusion_notebooks.core.errors import BadInput, NotSupported
from fusion_notebooks.results import Store

ROOT = Path(__file__).parents[1]
INI = '''[study]
models = {model}
analyses = masking attention early_exit refine
results = results
runs = runs
figures = figures
[limits]
calibration = 2
evaluation = 2
[quick]
evaluation = 1
results = runs/quick/results
runs = runs/quick
figures = runs/quick/figures
'''


@pytest.fixture(scope='session')
def model_folder(tmp_path_factory):
    "A saved model of four layers in which every token but one ends the answer (a beam search wants one that does not)"
    from fusion_notebooks import demo

    model, processor = demo.make_model(layers=4)
    model.generation_config.eos_token_id = list(range(1, model.config.text_config.vocab_size))
    folder = tmp_path_factory.mktemp('models') / 'tiny'
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def ini(tmp_path, model_folder):
    (tmp_path / 'settings.ini').write_text(INI.format(model=model_folder))
    return tmp_path / 'settings.ini'


@pytest.fixture(scope='session')
def shared(tmp_path_factory, model_folder):
    "Settings whose rows are computed once for all tests that only read"
    folder = tmp_path_factory.mktemp('study')
    (folder / 'settings.ini').write_text(INI.format(model=model_folder))
    return study.read_settings(folder / 'settings.ini')


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    "Tiny tensors: a second thread only waits, and waits badly on a busy machine"
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    yield
    torch.set_num_threads(before)


# settings


def test_settings_of_the_repository():
    s, q = study.read_settings(ROOT / 'settings.ini'), study.read_settings(ROOT / 'settings.ini', quick=True)
    assert (
        s.models == ('glyph-llava', 'glyph-qwen2vl', 'planted-noise')
        and s.results == ROOT / 'data/results'
        and set(s.analyses) <= set(study.notebooks(s))
    )
    assert q.evaluation < s.evaluation and all(
        ROOT / 'data/runs/quick' in (p / 'x').parents for p in (q.results, q.runs, q.figures)
    )


@pytest.mark.parametrize(
    'old, new, said',
    [
        ('[limits]', 'modles = x\n[limits]', "unknown key 'modles' in [study]; known: models, benchmarks, analyses"),
        ('evaluation = 2', 'evaluations = 2', "unknown key 'evaluations' in [limits]; known: calibration, evaluation"),
        ('evaluation = 1', 'evaluations = 1', "unknown key 'evaluations' in [quick]; known: models"),
        ('attention ', 'atention ', "unknown analyses 'atention' in [study]; known: attention, "),
        ('[limits]', '[limit]', 'unknown section [limit]; known: study, limits, quick'),
        ('evaluation = 2', 'evaluation = many', 'evaluation = many must be a whole number above 0'),
        ('[study]', 'models', 'is neither a [section] nor'),
        ('analyses = masking attention early_exit refine', 'analyses =', '[study]: analyses is empty'),
        ('[study]', '[study]\nbenchmarks = gqua', "unknown benchmarks 'gqua' in [study]; known: glyph, gqa"),
    ],
)
def test_what_is_misspelt_is_said(ini, old, new, said):
    text = ini.read_text()
    assert old in text
    ini.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError) as e:
        study.read_settings(ini)
    assert said in str(e.value) and '\n' not in str(e.value)


def test_settings_are_found_from_below(ini, monkeypatch):
    (ini.parent / 'a/b').mkdir(parents=True)
    monkeypatch.chdir(ini.parent / 'a/b')
    assert study.find_settings() == ini
    with pytest.raises(FileNotFoundError, match='No settings at elsewhere.ini'):
        study.find_settings('elsewhere.ini')


# require


def test_only_missing_rows_are_computed(shared, model_folder, monkeypatch):
    got = study.require('attention', str(model_folder), settings=shared)
    assert (
        len(got) == 8 * 4
        and got['sample'].nunique() == 8
        and set(got.split) == {'evaluation'}
        and set(got.kind) == {'fine', 'colour', 'shape', 'relation'}
    )
    replaced(monkeypatch, study, 'load', lambda *a: pytest.fail('a model was loaded though every row was there'))
    again = study.require('attention', str(model_folder), settings=shared)
    pd.testing.assert_frame_equal(got, again)


def test_interrupted_work_is_kept(ini, model_folder, monkeypatch):
    s, real, seen = study.work_units.replace(study.read_settings(ini), unit=2), study.ANALYSES['attention'], []

    def dies(mllm, samples, **kw):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(samples))
        return real.rows(mllm, samples, **kw)

    dies.__wrapped__ = real.rows  # the same code to the key
    monkeypatch.setitem(study.ANALYSES, 'attention', real._replace(rows=dies))
    with pytest.raises(KeyboardInterrupt):
        study.require('attention', str(model_folder), settings=s)
    assert Store(s.results).read()['sample'].nunique() == 4
    done = {f.name: f.stat().st_mtime_ns for f in s.results.iterdir()}
    assert not list(s.results.glob('*.lock'))
    monkeypatch.setitem(study.ANALYSES, 'attention', real)
    assert study.require('attention', str(model_folder), settings=s)['sample'].nunique() == 8
    assert done.items() <= {f.name: f.stat().st_mtime_ns for f in s.results.iterdir()}.items()


def test_other_weights_are_other_rows(ini, model_folder, tmp_path):
    other = tmp_path / 'models/tiny'
    shutil.copytree(model_folder, other)
    assert study.revision(other) == study.revision(model_folder)
    weights = other / 'model.safetensors'
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert study.revision(other) != study.revision(model_folder)


def test_the_key_holds_what_is_asked(shared, model_folder):
    a, b = (
        study.listing(study.Job('', str(model_folder), 'glyph', split), shared)
        for split in ('calibration', 'evaluation')
    )
    assert not {i for i, *_ in a} & {i for i, *_ in b} and not {h for *_, h in a} & {h for *_, h in b}
    assert a == [[x.id, x.kind, study.samples._content(x)] for x in study.draw('glyph', 'calibration', 2)]
    keys = study.units(study.Job('masking', str(model_folder), 'glyph', 'evaluation'), shared)
    assert {
        'revision',
        'samples',
        'content',
        'code',
        'package',
        'transformers',
        'torch',
        'hows',
        'seed',
        'metric',
        'settings',
    } <= set(keys[0])


def test_code_counts_with_the_functions_it_uses_and_without_comments():
    assert (
        study.code_of('metrics')
        != study.code_of('metrics', study.masking_rows)
        != study.code_of('metrics', study.refine_rows)
    )
    assert study.code_of('', study.masking_rows) != study.code_of('', study.early_exit_rows)


def test_modules_whose_names_begin_with_an_underscore_count(tmp_path, monkeypatch):
    "Only what holds no definitions is left out of a key"
    (tmp_path / 'hooks').mkdir()
    for name in ('__init__', '_modidx', '_private', 'edits'):
        (tmp_path / 'hooks' / f'{name}.py').write_text(f'x = "{name}"')
    replaced(monkeypatch, study, 'PACKAGE', tmp_path)
    assert [f.stem for f in study.modules_of('hooks')] == ['_private', 'edits']


def test_code_of_a_module_that_is_not_there_is_refused():
    "A renamed module hashed to nothing, so rows of other code would have been taken"
    for name in ('hooks.gone', 'gone', 'metrics gone'):
        with pytest.raises(ValueError, match=f"No module '{name.split()[-1]}'"):
            study.code_of(name)
    assert len({study.code_of(name) for name in ('hooks', 'hooks.edits', 'hooks.recording', 'engine', '*')}) == 5


def test_names_of_the_methods_are_those_of_contrast():
    from fusion_notebooks import contrast

    for how, known in dict(mask=contrast.MASKS, crop=contrast.CROPS).items():
        mine = [m for m in catalog.METHODS.values() if m.how == how]
        assert [m.by for m in mine] == [*known] and [m.by for m in mine if m.measured] == ['calibrated']


def test_unknown_names(shared, model_folder):
    for kw, said in (
        (dict(analysis='x'), 'No analysis'),
        (dict(analysis='masking', split='test'), 'No split'),
        (dict(analysis='masking', benchmark='gqua'), 'No benchmark'),
    ):
        with pytest.raises(ValueError, match=said):
            study.require(**dict(model=str(model_folder), settings=shared) | kw)
    with pytest.raises(ValueError, match="No model 'nosuch'"):
        study.require('masking', 'nosuch', settings=shared)


# rows


def test_every_semantic_at_every_layer(shared, model_folder):
    rows = study.require('masking', str(model_folder), settings=shared)
    assert len(rows) == 8 * (1 + 5 * 4) and not rows.duplicated(['sample', 'layer', 'how', 'scope']).any()
    assert (rows[rows.how == 'none'].layer == -1).all() and set(rows.how) == {'none', *catalog.SEMANTICS}


def test_base_is_the_same_in_every_analysis(shared, model_folder):
    masking, refine, early = (
        study.require(a, str(model_folder), settings=shared) for a in ('masking', 'refine', 'early_exit')
    )
    base = masking[masking.how == 'none'].set_index('sample')
    plain, last = refine[refine.method == 'base'].set_index('sample'), early[early.layer == 3].set_index('sample')
    assert (base.prediction == plain.prediction.reindex(base.index)).all() and (
        base.prediction == last.prediction.reindex(base.index)
    ).all()
    np.testing.assert_allclose(base.logp, plain.logp.reindex(base.index), atol=1e-4)


def test_refine_uses_what_calibration_found(shared, model_folder):
    c = study.calibrate(str(model_folder), settings=shared)
    assert c.n == 8 and c.n_layers == 4
    c.fusion['knockout'].layers = (0, 1, 2, 3)
    assert c.candidates == [0, 1] and c.review is None  # the mask reads at layer 2 and acts on layer 3
    c.reviews['zero'].layers = (2,)
    assert c.review == 2 and c.candidates == [0]
    rows = study.require('refine', str(model_folder), settings=shared)
    assert set(rows.method) == set(catalog.METHODS) and (rows[rows.method == 'crop-oracle'].hit == 1).all()


def test_measured_layers_are_those_of_the_calibration_split_by_hand(shared, model_folder):
    "`crop-calibrated` and `mask-calibrated` answer at the pair that `layers_by_boxes` names on the calibration pictures"
    from fusion_notebooks import contrast, fusion

    model = str(model_folder)
    rows = study.require('refine', model, settings=shared)
    mllm, maps, shares = study.load(model), [], []
    for x in study.questions(model, shared, split='calibration'):
        first = contrast.first_pass(mllm, x.image, x.question)
        grid = first.prompt.grids[0]
        maps.append(grid.of(first.maps))
        shares.append(fusion.evidence_share(grid.boxes, x.box))
    review = study.calibrate(model, settings=shared).review
    (key, *_) = study.units(study.Job('refine', model, 'glyph', 'evaluation'), shared)
    x, chosen = study.questions(model, shared)[0], rows.set_index(['sample', 'method'])
    for how, below in (('crop', None), ('mask', review or 3)):
        by_hand = fusion.layers_by_boxes(maps, shares, below)
        assert key['measured'][how] == dict(early=by_hand.early, late=by_hand.late, how='boxes')
        measured = study.measured_layers(model, settings=shared, how=how)
        assert (measured.early, measured.late) == (by_hand.early, by_hand.late)
        assert abs(measured.held - by_hand.held) < 1e-5
        answer = contrast.refine(mllm, x.image, x.question, how, 'calibrated', layers=by_hand, review=review).answer
        row = chosen.loc[(x.id, f'{how}-calibrated')]
        assert row.prediction == answer.text and row.post == by_hand.late and not row.why


def _no_maps(mllm, samples, **_):
    raise NotSupported('This model shows no maps.')


def test_where_maps_are_refused_the_other_methods_answer(ini, model_folder, monkeypatch):
    "As of a model that thinks before it answers"
    known = analyses.ANALYSES['attention']
    monkeypatch.setitem(analyses.ANALYSES, 'attention', known._replace(rows=_no_maps))
    s = study.work_units.replace(study.read_settings(ini), calibration=1, evaluation=1, analyses=('refine',))
    rows = study.require('refine', str(model_folder), settings=s)
    refused = rows.method.isin(['crop-calibrated', 'mask-calibrated'])
    assert (rows.why[refused] == 'This model shows no maps.').all() and (rows.why[~refused] == '').all()
    assert len(study.require('refine', str(model_folder), settings=s, compute=False)) == len(rows)


def test_measuring_reads_no_evaluation_picture(shared, model_folder):
    first = study.Job('attention', str(model_folder), 'glyph', 'calibration')
    assert first in study.jobs(shared)
    assert study.jobs(study.work_units.replace(shared, analyses=('attention',)))[0].split == 'evaluation'
    few = study.work_units.replace(shared, calibration=1)
    measured = [
        study.units(first._replace(analysis='refine', split='evaluation'), s)[0]['measured'] for s in (shared, few)
    ]
    assert measured[0] and measured[1] is None  # of another calibration split nothing has been computed


def test_findings_come_with_interval_and_n(shared, model_folder):
    found = study.findings(str(model_folder), settings=shared, compute=True)
    numbers = found[found.value.notna() & found.finding.ne('chance')]
    assert set(found.analysis) == set(study.FINDINGS) <= set(study.ANALYSES) and numbers[
        ['low', 'high', 'n']
    ].notna().all(axis=None)
    assert ((numbers.low <= numbers.value) & (numbers.value <= numbers.high)).all()
    assert found.finding.eq('crop − crop-late').any() and len(study.summary_text(found).splitlines()) < 24 + len(
        catalog.METHODS
    )


def test_refine_rows_are_enough_for_every_figure(shared, model_folder):
    "Method by method as asked for alone, with its cost"
    from fusion_notebooks import baselines, contrast
    from fusion_notebooks.engine import capabilities

    rows = study.require('refine', str(model_folder), settings=shared)
    mllm, asked = study.load(str(model_folder)), {x.id: x for x in study.questions(str(model_folder), shared)}
    assert (
        [m.name for m in catalog.METHODS.values() if m.how == 'baseline'] == [*baselines.METHODS]
        and (rows.why == '').all()
        and rows[['score', 'lenient', 'forwards', 'flops']].notna().all(axis=None)
    )
    capabilities(mllm, mllm.prompt(next(iter(asked.values())).image, 'a'))  # probed once
    candidates = study.units(study.Job('refine', str(model_folder), 'glyph', 'evaluation'), shared)[0]['candidates']
    for i in rows['sample'].unique()[:2]:  # the first of a unit is asked one by one and timed, the others in batches
        mine, s = rows[rows['sample'] == i].set_index('method'), asked[i]
        assert set(mine.before) == {mine.prediction['base']} and json.loads(mine.answers['base']) == [*s.answers]
        assert mine[mine.box.notna()].index.tolist() == [
            m.name for m in catalog.METHODS.values() if m.crops
        ] and mine.hit.notna().equals(mine.box.notna())
        assert set(mine[mine.seconds.isna()].index) == (
            set()
            if i == rows['sample'].iloc[0]
            else {m.name for m in catalog.METHODS.values() if m.crops or m.how == 'mask'}
        )
        for m in ('base', 'crop', 'crop-read', 'mask-late', 'vicrop-rel', 'carve', 'dola'):
            with baselines.counting(mllm) as cost:
                if m == 'base':
                    a = mllm.answer(s.image, s.question)
                elif (known := catalog.METHODS[m]).how != 'baseline':
                    a = contrast.refine(mllm, s.image, s.question, known.how, known.by, candidates=candidates).answer
                else:
                    a = baselines.answer(mllm, s.image, s.question, m).answer
            assert (mine.prediction[m], mine.forwards[m], mine.rows[m], mine.flops[m]) == (
                a.text,
                cost.forwards,
                cost.rows,
                cost.flops(mllm),
            ), m
            assert abs(mine.logp[m] - a.logp) < 1e-4


def test_what_a_model_cannot_do_is_said(shared, model_folder, monkeypatch):
    from fusion_notebooks import baselines, results

    def refuses(*a, **kw):
        raise ValueError('no such thing here')

    monkeypatch.setitem(baselines.METHODS, 'opera', refuses)
    rows = study.refine_rows(
        study.load(str(model_folder)),
        study.questions(str(model_folder), shared)[:2],
        'gqa',
        ['base', 'dola', 'opera'],
        None,
        None,
    )
    odd = rows[rows.method == 'opera']
    assert (
        (odd.why == 'no such thing here').all()
        and odd.score.isna().all()
        and rows[rows.method != 'opera'].score.notna().all()
    )
    found = pd.DataFrame(results.refine_findings(rows.assign(kind='fine', group=rows['sample']), None))
    assert not found.finding.str.contains('opera').any() and found.finding.eq('dola − base').any()


def test_choices_one_at_a_time(shared, model_folder, monkeypatch):
    "Each row is what `refine` says with that one thing chosen differently, on calibration pictures"
    from fusion_notebooks import contrast

    replaced(
        monkeypatch,
        analyses,
        'CHOICES',
        dict(
            mask=dict(candidates=('all', 'fixed'), rho=(0.4,), soft=(0.1,)),
            crop=dict(distance=('js2',), rule=('meanstd',), order=('before',)),
        ),
    )
    s = study.work_units.replace(shared, calibration=1)
    rows = study.require('candidates', str(model_folder), settings=s)
    found = study.units(study.Job('candidates', str(model_folder), 'glyph', 'calibration'), s)[0]
    assert (
        set(rows.split) == {'calibration'}
        and rows['sample'].nunique() == 4
        and len(rows) == 4 * (3 + 4 + 3)
        and (rows.why == '').mean() > 0.5
    )
    mllm, x = study.load(str(model_folder)), study.questions(str(model_folder), s, split='calibration')[0]
    mine, seen = (
        rows[rows['sample'] == x.id].set_index(['method', 'choice', 'value']),
        contrast.first_pass(mllm, x.image, x.question),
    )
    fixed = (found['candidates'] or [1])[-1]
    for key, kw in {
        ('mask', 'default', 'default'): {},
        ('mask', 'candidates', 'fixed'): dict(candidates=fixed),
        ('mask', 'soft', '0.1'): dict(soft=True, strength=0.1),
        ('crop', 'rule', 'meanstd'): dict(rule='meanstd'),
        ('crop', 'order', 'before'): dict(order='before'),
    }.items():
        ask = lambda: contrast.refine(
            mllm,
            seen,
            how=key[0],
            review=found['review'],
            seed=analyses.seed_of(x),
            **dict(candidates=found['candidates']) | kw,
        )
        if mine.why[key]:  # what a model of random weights cannot do, it says
            with pytest.raises(ValueError) as e:
                ask()
            assert str(e.value) == mine.why[key]
            continue
        r = ask()
        assert (
            mine.prediction[key] == r.answer.text
            and abs(mine.logp[key] - r.answer.logp) < 1e-4
            and mine.pre[key] == r.contrast.pre
        )
    assert [j.split for j in study.jobs(study.work_units.replace(s, analyses=('candidates',)))] == [
        'calibration',
        'calibration',
    ]


def test_a_summary_without_findings_says_so(ini, shared, model_folder, capsys):
    "As after the choices alone; where there are rows, it says what they say"
    study.runs._summarise(str(model_folder), 'tiny', study.work_units.replace(study.read_settings(ini), compute=False))
    assert (
        'No rows of masking, attention, early_exit, refine, causal yet: what was computed stands in its tables'
        in capsys.readouterr().out
    )
    study.require('masking', str(model_folder), settings=shared)
    study.runs._summarise(
        str(model_folder),
        'tiny',
        study.work_units.replace(shared, compute=False, figures=ini.parent / 'figures' / 'others'),
    )
    said = capsys.readouterr().out
    assert 'No rows' not in said and 'of 8 questions right' in said


FIXTURES = ROOT / 'tests/fixtures/vqa'


@pytest.fixture
def official(ini):
    "The same settings, with official files at hand"
    ini.write_text(ini.read_text().replace('[limits]', f'annotations = {FIXTURES}\n[limits]'))
    return study.read_settings(ini)


def test_rotations_count_together(official, model_folder, monkeypatch):
    "The model always says A; the rows are those of first rotations, with the score of all"
    from fusion_notebooks import metrics, vqa

    mllm, s = study.load(str(model_folder)), study.work_units.replace(official, evaluation=3)
    monkeypatch.setattr(type(mllm), 'decode', lambda self, ids: 'A')
    rows = study.require('early_exit', str(model_folder), 'mmbench', settings=s)
    asked = vqa.load('mmbench', 'evaluation', 3, 'random', 0, FIXTURES, family='llava')
    want = metrics.circular(
        metrics.score('mmbench', ['A'] * len(asked), [a.answers for a in asked]), [a.group for a in asked]
    )
    got = rows[rows.layer == 3].set_index('group').score
    assert (
        len(asked) > 3 == len(want)
        and got.reindex(want.index).tolist() == want.tolist()
        and rows['sample'].str.endswith('.0').all()
        and len(rows) == 3 * 4
    )


def test_several_benchmarks_in_one_run(official, model_folder):
    "Each with its official metric and figures of its own; without evidence boxes no figure on evidence, said in words"
    s = study.work_units.replace(
        study.choose(official.file, benchmarks=['glyph', 'pope'], analyses=['attention']), models=(str(model_folder),)
    )
    report = study.run(s)
    assert report.code == 0 and report.done == [('tiny', 'attention'), ('tiny/pope', 'attention')]
    assert (
        (s.figures / 'tiny/attention-evidence.png').exists()
        and (s.figures / 'tiny/pope/attention-hellinger.png').exists()
        and not (s.figures / 'tiny/pope/attention-evidence.png').exists()
    )
    assert 'come without evidence boxes' in (
        s.runs / 'tiny/pope/attention.ipynb'
    ).read_text() and 'come without evidence boxes' not in json.dumps(
        [
            c['outputs']
            for c in json.loads((s.runs / 'tiny/attention.ipynb').read_text())['cells']
            if c['cell_type'] == 'code'
        ]
    )
    rows = study.require('attention', str(model_folder), 'pope', settings=s)
    assert (
        set(rows.metric) == {'pope'}
        and rows.evidence.isna().all()
        and rows.noise.isna().all()
        and rows.image.str.startswith('COCO').all()
    )
    assert {j.benchmark for j in study.jobs(s)} == {'glyph', 'pope'} and study.figure_dir(
        rows, s
    ) == s.figures / 'tiny/pope'


def test_the_real_checkpoints_layout(official, tmp_path, capsys):
    "fusion study --models llava-hf/llava-1.5-7b-hf --benchmarks textvqa --limit 1000, on a tiny folder with that checkpoint's files; every token ends the answer, or it would take long"
    from fusion_notebooks.cli import main
    from twins import checkpoint

    folder = tmp_path / 'models/llava-1.5-7b-hf'
    checkpoint(folder)
    end = json.loads((folder / 'generation_config.json').read_text()) | dict(eos_token_id=list(range(1, 32064)))
    (folder / 'generation_config.json').write_text(json.dumps(end))
    assert (
        main(
            [
                'study',
                '--settings',
                str(official.file),
                '--models',
                str(folder),
                '--benchmarks',
                'textvqa',
                '--limit',
                '2',
            ]
        )
        == 0
    )
    s = study.choose(official.file, models=[str(folder)], benchmarks=['textvqa'], limit=2)
    rows, masking = (
        study.require('refine', str(folder), settings=s, compute=False),
        study.require('masking', str(folder), settings=s, compute=False),
    )
    measured = rows.method.isin([m.name for m in catalog.METHODS.values() if m.measured])
    assert (
        set(rows.metric) == {'vqa-evalai'}
        and rows['sample'].nunique() == 2
        and set(rows.method) == {*catalog.METHODS} - {'crop-oracle'}
        and (rows.why[~measured] == '').all()
        and rows.why[measured].str.endswith('no layer can be told to read the picture.').all()  # no boxes, no training
        and rows.hit.isna().all()
    )
    assert set(masking.how) == {'none', *catalog.SEMANTICS} and not set(rows.image) & set(
        study.require('masking', str(folder), 'textvqa', 'calibration', settings=s).image
    )
    figures = s.figures / 'llava-1.5-7b-hf/textvqa'
    assert (
        all(
            (figures / f'{name}.png').exists()
            for name in ('masking', 'attention-hellinger', 'early_exit', 'refine', 'refine-pareto')
        )
        and 'on textvqa' in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    'harm, said',
    [
        (lambda d: d['data'][0].update(answers=['one']), '1 answers; every question has 10'),
        (lambda d: d['data'][0].update(answers='red'), 'a list of texts is needed'),
        (lambda d: d['data'][0].update(image_id='nowhere'), 'no file nowhere.jpg'),
    ],
)
def test_refusals_reach_the_shell(official, model_folder, tmp_path, capsys, harm, said):
    "One sentence and exit code 2, before a model is loaded"
    from fusion_notebooks.cli import main

    shutil.copytree(FIXTURES / 'textvqa', tmp_path / 'official/textvqa')
    file = next((tmp_path / 'official/textvqa').glob('*.json'))
    data = json.loads(file.read_text())
    data['data'] = data['data'][:1]
    harm(data)
    file.write_text(json.dumps(data))
    official.file.write_text(official.file.read_text().replace(str(FIXTURES), str(tmp_path / 'official')))
    assert (
        main(
            [
                'study',
                '--rows',
                '--settings',
                str(official.file),
                '--models',
                str(model_folder),
                '--benchmarks',
                'textvqa',
                '--analyses',
                'attention',
            ]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert said in err and err.count('\n') == 1 and 'Traceback' not in err


def test_unknown_benchmark_reaches_the_shell(official, model_folder, capsys):
    from fusion_notebooks.cli import main

    assert main(['study', '--settings', str(official.file), '--models', str(model_folder), '--benchmarks', 'gqua']) == 2
    assert "No benchmark 'gqua'; known: glyph, gqa" in capsys.readouterr().err


# run


def test_run_goes_on_after_failures_and_reports_them(ini, model_folder, monkeypatch, capsys):
    folder = ini.parent / 'nbs/analyses'
    shutil.copytree(ROOT / 'nbs/analyses', folder, ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    untagged = json.loads((folder / 'masking.ipynb').read_text())
    for c in untagged['cells']:
        c['metadata'].pop('tags', None)
    (folder / 'masking.ipynb').write_text(json.dumps(untagged))
    broken = json.loads((folder / 'early_exit.ipynb').read_text())
    code = [c for c in broken['cells'] if c['cell_type'] == 'code']
    code[1]['source'] = 'raise RuntimeError("a cell broke\\nbadly")'
    (folder / 'early_exit.ipynb').write_text(json.dumps(broken))

    report = study.run(
        ini, quick=True, models=[str(model_folder), 'nosuch'], analyses=['masking', 'early_exit', 'attention']
    )
    said = capsys.readouterr()
    assert report.code == 1 and report.done == [('tiny', 'attention')]
    assert report.failed['tiny', 'masking'].startswith("masking.ipynb has no cell tagged 'parameters'")
    assert (
        report.failed['tiny', 'early_exit'] == 'RuntimeError: a cell broke badly'
        and "No model 'nosuch'" in report.failed['nosuch', 'nosuch']
    )
    assert 'Traceback' not in said.err and said.err.count('FAILED') == 3 and 'figures and summary.csv' in said.out
    quick = ini.parent / 'runs/quick'
    assert (
        (quick / 'figures/tiny/attention-evidence.png').exists()
        and (quick / 'figures/tiny/attention-evidence.pdf').exists()
        and (quick / 'tiny/attention.ipynb').exists()
    )
    assert {p.name for p in ini.parent.iterdir()} == {'settings.ini', 'nbs', 'runs'}

    import papermill  # again: nothing is run that stands; rows or figures that are gone bring it back

    ran, real = [], papermill.execute_notebook
    monkeypatch.setattr(
        papermill, 'execute_notebook', lambda nb, *a, **kw: (ran.append(Path(nb).stem), real(nb, *a, **kw))
    )
    again = study.run(ini, quick=True, analyses=['attention'])
    assert again.code == 0 and ran == [] and not again.fresh and again.done == [('tiny', 'attention')]
    (quick / 'figures/tiny/attention-evidence.png').unlink()
    assert study.run(ini, quick=True, analyses=['attention']).fresh == {'tiny'} and ran == ['attention']
    assert (quick / 'figures/tiny/attention-evidence.png').exists()
    (quick / 'tiny/attention.json').write_text('{')  # what is no record counts as none
    assert study.run(ini, quick=True, analyses=['attention']).code == 0 and ran == ['attention'] * 2


def test_a_notebook_about_all_models_runs_once(ini, model_folder, monkeypatch, capsys):
    import papermill

    ran = []

    def execute(nb, out, given, **kw):
        ran.append((Path(nb).stem, Path(out), given))
        Path(out).write_text('{}')

    monkeypatch.setattr(papermill, 'execute_notebook', execute)
    other = shutil.copytree(model_folder, ini.parent / 'other')
    s = study.choose(ini, models=[str(model_folder), str(other)], analyses=['tables'])
    assert (
        study.takes_all_models(study.notebooks(s)['tables'])
        and not study.takes_all_models(study.notebooks(s)['refine'])
        and study.jobs(s) == []
    )
    for _ in range(2):
        assert study.run(s).done == [('study', 'tables')]  # the second time nothing has to be done
    ((name, out, given),) = ran
    assert (
        (name, out) == ('tables', s.runs / 'study/tables.ipynb')
        and given['models'] == [str(model_folder), str(other)]
        and 'model' not in given
    )


def test_parameters_are_names_the_notebook_lists_and_json(ini, tmp_path):
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    nb = study.notebooks(study.read_settings(ini))['attention']
    for given, said in (
        ({'model = 1; import os  #': 'x'}, "has no parameter 'model = 1; import os  #'"),
        (dict(modle='x'), "has no parameter 'modle'; it has model, settings, quick"),
        (dict(model=Path('x')), 'is a PosixPath, which JSON cannot hold'),
        (dict(model=float('nan')), 'JSON cannot hold'),
        (dict(model={1: 2}), 'JSON cannot hold'),
        (dict(model=(1, 2)), 'JSON'),
    ):
        with pytest.raises(ValueError) as e:
            study.parameters(nb, given)
        assert said in str(e.value) and '\n' not in str(e.value)
    hostile = [
        '"; raise SystemExit #',
        "'''\nimport os\n'''",
        '\\"\n__import__("os").abort()',
        '{{ 7*7 }}',
        '\u2028exit()',
        {'a"]; exit() #': ['\'+exit()+\'']},
    ]
    for value in hostile:  # written down as a literal, whatever it holds
        cell = next(
            c
            for c in parameterize_notebook(load_notebook_node(str(nb)), study.parameters(nb, dict(model=value))).cells
            if 'injected-parameters' in c.metadata.get('tags', [])
        )
        exec(cell.source, space := {})
        assert space['model'] == value
    untagged = json.loads(nb.read_text())
    for c in untagged['cells']:
        c['metadata'].pop('tags', None)
    (tmp_path / 'untagged.ipynb').write_text(json.dumps(untagged))
    with pytest.raises(ValueError, match="no cell tagged 'parameters'"):
        study.parameters(tmp_path / 'untagged.ipynb', dict(model='x'))


def test_settings_reach_a_notebook_as_a_dict(ini):
    s = study.read_settings(dict(file=str(ini), evaluation=1, compute=False, benchmarks=['glyph'], runs='elsewhere'))
    assert (
        s.evaluation == 1
        and not s.compute
        and s.benchmarks == ('glyph',)
        and s.runs == ini.parent / 'elsewhere'
        and s.calibration == 2
    )
    few = study.choose(ini, limit=1)
    assert (
        few.evaluation == few.calibration == 1
        and few.results == ini.parent / 'results'
        and few.figures == ini.parent / 'runs/limit-1/figures'
    )


def test_a_limit_shares_its_rows_with_the_whole(shared, model_folder):
    job = study.Job('attention', str(model_folder), 'glyph', 'evaluation')
    few, all_ = (study.units(job, study.work_units.replace(shared, evaluation=n)) for n in (2, 4))
    assert few == all_[:1] and len(all_) == 2


def test_rows_of_different_origin_do_not_mix(shared, model_folder, monkeypatch):
    rows = study.require('attention', str(model_folder), settings=shared)
    both = pd.concat([rows, rows.assign(sample='other', dtype='bfloat16')])
    monkeypatch.setattr(study.work_units, '_computed', lambda *_: both)
    with pytest.raises(ValueError, match='dtype is float32 and bfloat16: set mixed = yes'):
        study.require('attention', str(model_folder), settings=shared)
    mixed = study.work_units.replace(shared, mixed=True)
    assert len(study.require('attention', str(model_folder), settings=mixed)) == 2 * len(rows)


def test_a_model_that_is_no_number_on_a_sample(ini, model_folder, monkeypatch):
    "Its unit fails with the sample's name; all others are as they would be"

    s = study.work_units.replace(study.read_settings(ini), unit=2)
    want = study.require('early_exit', str(model_folder), settings=s)
    mllm, bad = study.load(str(model_folder)), want['sample'].unique()[3]
    question = next(x.question for x in study.draw('glyph', 'evaluation', 2) if x.id == bad)
    real, asked = type(mllm).prompt, []
    monkeypatch.setattr(type(mllm), 'prompt', lambda self, images, q: (asked.append(q), real(self, images, q))[1])

    def spoil(layer, args, out):
        return (
            out * float('nan') if asked[-1] == question and out.shape[1] > 1 else out
        )  # what is read of its prompt; answers are decoded together

    hook = mllm.layers[0].register_forward_hook(spoil)
    other = study.work_units.replace(s, results=s.results.with_name('other'))
    try:
        with pytest.raises(ValueError, match=f'1 of 4 units of early_exit .* Sample {bad}: .* no number'):
            study.require('early_exit', str(model_folder), settings=other)
    finally:
        hook.remove()
    got = study.require('early_exit', str(model_folder), settings=other, compute=False)
    pd.testing.assert_frame_equal(got, want[~want['sample'].isin(want['sample'].unique()[2:4])].reset_index(drop=True))
    pd.testing.assert_frame_equal(study.require('early_exit', str(model_folder), settings=other), want)


def test_verify_and_status(shared, model_folder):
    s = study.work_units.replace(shared, analyses=('masking', 'attention', 'early_exit', 'refine'))
    for a in s.analyses:
        study.require(a, str(model_folder), settings=s)
    got = study.verify(s, 0.1, 0)
    assert set(got.analysis) == set(s.analyses) and (got.difference < 1e-5).all() and (got.rows > 3).all()
    store = Store(s.results)
    key = study.units(study.Job('attention', str(model_folder), 'glyph', 'evaluation'), s)[0]
    part, rows = store.path(key).read_bytes(), store.read([key])
    store.add(rows.assign(mass=rows.mass + 0.01), key)
    again = study.verify(study.work_units.replace(s, analyses=('attention',)), 1.0, 0)
    assert (again.difference > 0.009).all() and not again.same.any()
    store.path(key).write_bytes(part)
    t = study.status(s).set_index(['analysis', 'split'])
    assert (t.done == t.units).all() and (t.forwards == 0).all() and len(t) == 6
    more = study.status(study.work_units.replace(s, evaluation=4)).set_index(['analysis', 'split'])
    assert (
        more.forwards['masking', 'evaluation'] == 8 * (2 + 5 * 4)
        and more.gigabytes.iloc[0] > 0
        and more.done['attention', 'evaluation'] == 1
    )
    with pytest.raises(ValueError, match='No rows of this study'):
        study.verify(study.work_units.replace(s, seed=7))


def test_nothing_but_bad_input_is_exit_code_two(ini):
    assert study.run(ini, models=['nosuch']).code == 2


def test_a_card_needs_rows_and_no_torch(shared, model_folder):
    from fusion_notebooks import plots

    for analysis, split in (('masking', 'calibration'), ('masking', 'evaluation'), ('attention', 'evaluation')):
        study.require(analysis, str(model_folder), split=split, settings=shared)
    code = f"import sys; from fusion_notebooks.cli import main; sys.exit(main(['figures', '--card', '--settings', {str(shared.file)!r}]) or 10*('torch' in sys.modules))"
    subprocess.run([sys.executable, '-c', code], check=True, cwd=shared.root)
    folder = shared.figures / 'tiny'
    assert {'card.html', 'card.pdf', 'card.png', 'card.json'} <= {f.name for f in folder.iterdir()} and (
        folder / 'card.pdf'
    ).read_bytes().startswith(b'%PDF')
    page, c = (folder / 'card.html').read_text(), study.card(str(model_folder), settings=shared)
    assert (
        page == plots.card_page([c])
        and {'masking', 'attention'} <= set(c['rows'])
        and ('Not computed yet' in page) == (not {'early_exit', 'refine'} <= set(c['rows']))
        and json.loads((folder / 'card.json').read_text())['model'] == 'tiny'
    )
    from dataclasses import replace

    with pytest.raises(ValueError, match='No rows of .* on glyph'):
        study.card(str(model_folder), settings=replace(shared, results=shared.root / 'none'))


def test_the_parent_counts_units_that_hang_on_the_calibration(tmp_path, monkeypatch):
    "Their keys are known only when workers have calibrated: what was listed before would never be there"
    late, done = (study.Job('refine', model, 'glyph', 'evaluation') for model in 'ab')
    early = study.Job('masking', 'a', 'glyph', 'evaluation')
    s = SimpleNamespace(results=tmp_path)
    there = dict(analysis='refine', samples=['x'], n=1)
    Store(tmp_path).add(pd.DataFrame(dict(sample=['x'], score=[1.0])), there)
    monkeypatch.setattr(study.workers, 'units', lambda job, s: [dict(new=job.model)])
    todo = {late: [dict(old=1)], early: [dict(old=2)], done: [there, dict(old=3)]}
    study.workers._renew(todo, s)
    assert todo == {late: [dict(new='a')], early: [dict(old=2)], done: [there, dict(old=3)]}

    def refused(job, s):
        raise BadInput('nothing can be found')

    monkeypatch.setattr(study.workers, 'units', refused)
    study.workers._renew(todo, s)  # the workers say why; the parent goes on
    assert todo[late] == [dict(new='a')]
