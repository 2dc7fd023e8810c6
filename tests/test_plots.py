"Figures: what they say (titles, n, intervals, geometry), and files that only change when the picture does"

import ast, io, json, os
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
import matplotlib.pyplot as plt
from PIL import Image
from fusion_notebooks import plots
from fusion_notebooks.fusion import Layers

rng = np.random.default_rng(0)


def masked(hows=('zero', 'swap', 'knockout'), layers=6, n=20):
    rows = [
        dict(model='m', sample=s, layer=i, how=h, scope='single', score=float(rng.random() < 0.5), logp=-rng.random())
        for h in hows
        for i in range(layers)
        for s in range(n)
    ]
    return pd.DataFrame(
        rows + [dict(model='m', sample=s, layer=-1, how='none', scope='', score=1.0, logp=-0.01) for s in range(n)]
    )


def texts(fig):
    return ' '.join(t.get_text() for t in fig.findobj(plt.Text))


def inside(fig):
    "No text reaches over the figure's edge"
    (canvas := FigureCanvasAgg(fig)).draw()
    box, (w, h) = fig.get_tightbbox(canvas.get_renderer()), fig.get_size_inches()
    return box.x0 > -0.02 and box.y0 > -0.02 and box.x1 < w + 0.02 and box.y1 < h + 0.02


@pytest.fixture
def picture():
    return Image.fromarray(rng.integers(0, 255, (60, 100, 3), dtype='uint8'))


def test_masking_says_what_it_shows():
    table = masked()
    fig = plots.masking(table, Layers((1, 3), {}, None), 5)
    left, right = fig.axes
    assert (
        'n = 20 questions' in texts(fig)
        and 'fusion layers 1, 3' in texts(fig)
        and 'review layer 5' in texts(fig)
        and 'nats' in right.get_ylabel()
        and '%' in left.get_ylabel()
    )
    line = next(l for l in left.lines if l.get_label().startswith('zero'))
    assert np.allclose(line.get_ydata(), 100 * table[table.how == 'zero'].groupby('layer').score.mean())
    assert len(left.collections) == 3 and inside(fig)  # one band per semantic
    both = pd.concat([table, table[table.how == 'knockout'].assign(scope='from')])
    assert {'knockout (at the layer)', 'knockout (from the layer on)', 'swap (from the layer on)'} <= {
        l.get_label() for l in plots.masking(both).axes[0].lines
    }
    assert isinstance(plots.masking(table[table.layer <= 0]), Figure)  # one layer only
    assert 'fusion layers' not in texts(plots.masking(table, Layers((), {}, None), ()))
    curve = pd.DataFrame(
        dict(layer=range(4), how='zero', accuracy=[1.0, 2, 3, 40.0])
    )  # a curve without n, base and interval
    assert 'n not stated' in texts(plots.masking(curve)) and len(plots.masking(curve).axes) == 1


def test_profiles():
    table = pd.DataFrame(
        [
            dict(model='m', sample=s, layer=i, evidence=rng.random(), chance=0.25, hellinger=rng.random(), noise=s / 64)
            for s in range(9)
            for i in range(4)
        ]
    )
    evidence, hellinger, noise = plots.evidence(table), plots.hellinger(table), plots.noise(table)
    assert evidence.axes[0].lines[1].get_ydata()[0] == 0.25 and 'chance' in texts(evidence)
    assert all('n = 9 questions' in texts(f) and inside(f) for f in (evidence, hellinger, noise))
    assert f'mean {100 * 4 / 64:.2f} %' in texts(noise) and isinstance(plots.noise(table.assign(noise=0.0)), Figure)


def test_early_exit_takes_the_last_layer_as_base():
    table = pd.DataFrame(
        [
            dict(sample=s, layer=i, score=float(i > 2 and s > 1), first_score=float(i > 1))
            for s in range(8)
            for i in range(5)
        ]
    )
    fig = plots.early_exit(table)
    assert next(l for l in fig.axes[0].lines if l.get_label() == 'whole model').get_ydata()[0] == 75 and inside(fig)


def test_refine_is_paired():
    score = rng.random(100) < 0.6
    table = pd.concat(
        [
            pd.DataFrame(dict(sample=range(100), kind=np.repeat(['a', 'b'], 50), method=m, score=s.astype(float)))
            for m, s in (('crop', score | (np.arange(100) < 10)), ('base', score), ('mask', score))
        ]
    )
    fig = plots.refine(table)
    assert [a.get_title() for a in fig.axes] == ['all (n = 100)', 'a (n = 50)', 'b (n = 50)'] and inside(fig)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ['base', 'crop', 'mask']
    bar = [l.get_xdata() for l in fig.axes[0].lines if len(l.get_xdata()) == 2 and l.get_linestyle() == '-']
    assert bar[0][0] > 100 * score.mean()  # unpaired, ± 10 points would not tell
    colours = [l.get_color() for l in fig.axes[0].lines if len(l.get_xdata()) == 2 and l.get_linestyle() == '-']
    assert colours[1] == plots.SAME != colours[0]  # what does not differ is grey
    assert len(plots.refine(table, kinds=()).axes) == 1
    with pytest.raises(ValueError, match="no rows of method 'base'"):
        plots.refine(table[table.method != 'base'])


def test_maps_lie_over_the_union_of_their_tokens(picture):
    boxes = [(20 + 15 * x, 15 * y, 35 + 15 * x, 15 + 15 * y) for y in range(4) for x in range(4)]
    fig = plots.attention_maps(picture, rng.random((3, 16)), (4, 4), boxes=boxes, box=(30, 10, 50, 40))
    image, overlay = fig.axes[0].images
    assert overlay.get_extent() == [20, 80, 60, 0] and image.get_extent() == [0, 100, 60, 0]
    assert [r.get_bbox().bounds for r in fig.axes[0].findobj(Rectangle) if r is not fig.axes[0].patch][-1] == (
        30,
        10,
        20,
        30,
    )
    assert np.mean(overlay.get_array()) == pytest.approx(1)  # multiples of uniform
    assert [a.get_title() for a in plots.attention_maps(picture, np.ones((30, 16)), (4, 4)).axes[:8]][-1] == 'layer 29'
    for wrong in (dict(grid_shape=(3, 4)), dict(grid_shape=(4, 4), layers=[3])):
        with pytest.raises(ValueError):
            plots.attention_maps(picture, rng.random((3, 16)), **wrong)


def test_ask_and_examples_leave_text_alone(picture):
    early, late = rng.random((2, 4, 4))
    fig = plots.ask(
        picture,
        early,
        late,
        late - early,
        (10, 10, 40, 30),
        question='$5 or $6_x$?',
        before='a^b',
        after='$',
        layers=(2, 5),
    )
    assert (
        len(fig.axes) == 5 and r'\$5 or \$6_x\$?' in texts(fig) and 'layer 2 (pre-fusion)' in texts(fig) and inside(fig)
    )
    assert len(plots.ask(picture, early, late, late - early).axes) == 4
    sure = plots.ask(picture, early, late, late - early, (10, 10, 40, 30), before='a', after='b', p=(0.25, 0.75))
    assert len(sure.axes) == 6 and [b.get_width() for b in sure.axes[-1].patches] == [0.25, 0.75] and inside(sure)
    assert 'It says “a” (p = 0.25); looking again, “b” (p = 0.75) instead.' in texts(sure)
    rows = pd.DataFrame(
        [
            dict(image=picture, question='q', base='$1', refined='2', box=[1, 2, 30, 40]),
            dict(image=picture, question='q', base='1', refined='2', box=None),
        ]
    )
    fig = plots.refine_examples(rows)
    assert len(fig.axes) == 4 and inside(fig)
    with pytest.raises(ValueError, match='no row'):
        plots.refine_examples([])


def test_save_leaves_equal_pixels_alone(tmp_path):
    table, provenance = masked(), dict(seed=0, commit='a')
    draw = lambda t=table: plots.masking(t)
    state = lambda: {f.name: f.read_bytes() for f in sorted(tmp_path.iterdir())}
    plots.save(draw(), tmp_path, 'masking', provenance, table)
    first = state()
    assert sorted(first) == ['masking.csv', 'masking.json', 'masking.pdf', 'masking.png']
    with Image.open(tmp_path / 'masking.png') as png:
        assert json.loads(first['masking.json']) == provenance == json.loads(png.info['Description'])
    assert b'CreationDate' not in first['masking.pdf'] and b'"commit": "a"' in first['masking.pdf']
    plots.save(draw(), tmp_path, 'masking', provenance | dict(commit='b'), table)
    assert state() == first
    for f in tmp_path.iterdir():
        f.unlink()
    plots.save(draw(), tmp_path, 'masking', provenance, table)
    assert state() == first  # the same bytes from nothing
    (tmp_path / 'masking.png').write_bytes(first['masking.png'][:500])
    plots.save(draw(), tmp_path, 'masking', provenance, table)
    assert state() == first  # half a file is written again
    plots.save(draw(masked(hows=('zero',))), tmp_path, 'masking', provenance | dict(commit='c'), table)
    assert all(state()[f'masking.{e}'] != first[f'masking.{e}'] for e in ('png', 'pdf', 'json'))


# the card

NAMES = ['analysis', 'finding', 'kind', 'value', 'low', 'high', 'p', 'layers', 'n']


def findings(rows):
    nan = np.nan
    return pd.DataFrame(
        [
            ('masking', 'fusion layers', 'zero', nan, nan, nan, nan, '1 3', 20),
            ('masking', 'fusion layers', 'knockout', nan, nan, nan, nan, 'none', 20),
            ('masking', 'review layer', 'zero', nan, nan, nan, nan, '5', 20),
            ('masking', 'review layer', 'knockout', nan, nan, nan, nan, 'none', 20),
            ('attention', 'most attention on the evidence', 'all', 0.5, 0.4, 0.6, nan, '2', 9),
            ('attention', 'chance', 'all', 0.25, nan, nan, nan, nan, 9),
            ('attention', 'attention on the evidence above twice chance', 'all', nan, nan, nan, nan, 'none', 9),
            ('attention', 'bright tokens without evidence', 'all', 0.01, 0, 0.02, nan, nan, 9),
            ('early_exit', 'first exit with 90 % of the last', 'all', 0.7, 0.6, 0.8, nan, '4', 9),
            ('early_exit', 'last exit', 'all', 0.8, 0.7, 0.9, nan, '5', 9),
            ('refine', 'mask − base', 'all', -0.05, -0.09, -0.01, 0.01, nan, 9),
            ('refine', 'crop − base', 'all', 0.02, -0.01, 0.05, 0.3, nan, 9),
            ('refine', 'crop-late − base', 'all', 0.1, 0.05, 0.15, 0.001, nan, 9),
            ('refine', 'crop − base', 'fine', 0.2, 0.1, 0.3, 0.001, nan, 9),
        ],
        columns=NAMES,
    )[lambda t: t.analysis.isin(rows)]


@pytest.fixture
def carded():
    attention = pd.DataFrame(
        [
            dict(model='m', sample=s, layer=i, evidence=rng.random(), chance=0.25, hellinger=rng.random(), noise=0.0)
            for s in range(9)
            for i in range(6)
        ]
    )
    rows = dict(masking=masked(), attention=attention, early_exit=attention, refine=attention)
    return dict(rows=rows, found=findings(rows), provenance=dict(model='m', dataset='glyph', split='evaluation', n=9))


def test_the_card_says_what_was_found(carded):
    said = dict(plots.statements(carded['found']))
    assert (
        said['Where do vision and language meet?']
        == 'Layers 1, 3 (zero), none under knockout; n = 20 calibration questions.'
    )
    assert said['Does it review the image late?'].startswith('Layer 5 (zero), none under knockout')
    assert (
        '50.0 % [40.0, 60.0]' in said['How much does it look at the evidence?']
        and 'chance is 25.0 %' in said['How much does it look at the evidence?']
        and 'n = 9 questions' in said['How much does it look at the evidence?']
    )
    gains = said['What does refinement gain or cost?']
    assert (
        'mask -5.0 points [-9.0, -1.0], a cost (p = 0.01)' in gains
        and 'crop +2.0 points [-1.0, +5.0], no difference found (p = 0.3)' in gains
        and '20.0' not in gains
    )
    found = carded['found']
    boxless = found[found.analysis != 'attention']
    assert (
        'cannot be said' in dict(plots.statements(boxless, ['attention']))['How much does it look at the evidence?']
        and 'Not computed yet' in dict(plots.statements(boxless))['How much does it look at the evidence?']
    )
    nothing = found.assign(layers=found.layers.where(found.analysis != 'masking', 'none'))
    assert (
        dict(plots.statements(nothing))['Does it review the image late?']
        == 'None found under any semantic; n = 20 calibration questions.'
    )
    assert all('Not computed yet' in a for _, a in plots.statements(found[:0]))


@pytest.mark.parametrize(
    'name, begins, says',
    [
        ('planted-noise', 'says little by itself', ('is expected to help: +',)),
        ('glyph-llava', 'shows what is looked at: 0.0 %', ('is not expected to help', 'is expected to help: +')),
    ],
)
def test_the_card_says_how_far_a_map_can_be_trusted(name, begins, says):
    "Of a model with planted noise, and of one without: layers are chosen on calibration pictures, and the numbers are of others"
    from fusion_notebooks import analyses, demo, fusion
    from fusion_notebooks.mllm import MLLM
    from fusion_notebooks.results.findings import attention_findings

    mllm = MLLM.load(name)
    first, rows = (
        analyses.attention_rows(mllm, demo.samples(24, split, kinds=('fine',)))
        for split in ('calibration', 'evaluation')
    )
    layers = fusion.layers_from_rows(first, None)
    found = pd.DataFrame(attention_findings(rows.assign(kind='fine'), layers)).assign(analysis='attention')
    said = dict(plots.statements(found, ['attention']))['How far can its maps be trusted?']
    assert said.startswith(f'The map of layer {layers.late} {begins}') and any(s in said for s in says)
    maps = np.stack([np.stack(some.sort_values('layer')['map']) for _, some in rows.groupby('sample')])
    named = fusion.sinks(maps)
    on = maps[:, layers.late][:, named.token[named.layer == layers.late].astype(int)].sum(-1).mean()
    assert f'{100 * on:.1f} % [' in said and said.endswith('(n = 24).') and said.count('. ') == 0
    assert (on > 0.5) == (name == 'planted-noise')
    unmeasured = pd.DataFrame(attention_findings(rows.assign(kind='fine'), None)).assign(analysis='attention')
    assert dict(plots.statements(unmeasured, ['attention']))['How far can its maps be trusted?'].startswith(
        'Not measured'
    )


def test_the_card_draws_the_rows(carded):
    fig = plots.card(**carded)
    panels = {a.get_title().split(' (')[0]: a for a in fig.findobj(plt.Axes)}
    assert len(panels) == 4 and inside(fig) and all(' (n = ' in a.get_title() for a in panels.values())
    looks, taken, gains = (
        panels['attention inside the evidence box'],
        panels['the image taken away'],
        panels['refined answers against the base'],
    )
    assert (
        np.allclose(looks.lines[0].get_ydata(), carded['rows']['attention'].groupby('layer').evidence.mean())
        and looks.lines[1].get_ydata()[0] == 0.25
    )
    assert {l.get_label() for l in taken.lines} >= {'zero (from the layer on)', 'knockout (at the layer)', 'unmasked'}
    assert [t.get_text() for t in gains.get_yticklabels()] == ['crop-late', 'crop', 'mask'] and np.allclose(
        gains.lines[4].get_xdata(), [-9, -1]
    )  # by size
    tiles = [r.get_xy() for r in panels['found: F fusion, R review'].patches]
    assert tiles == [
        (0.5, -0.5),
        (2.5, -0.5),
        (4.5, -0.5),
    ]  # fusion layers 1 and 3, review layer 5, all of the first line
    boxless = carded['rows'] | dict(attention=carded['rows']['attention'].assign(evidence=np.nan))
    assert "distance to the last layer's map (n = 9)" in texts(plots.card(**carded | dict(rows=boxless), words=False))
    some = dict(masking=carded['rows']['masking'])
    fig = plots.card(some, findings(some), carded['provenance'])
    assert inside(fig) and 'refine: not computed' in texts(fig) and 'attention: not computed' in texts(fig)


def test_the_card_is_one_file_of_text(carded):
    "Whatever a model, a dataset or a kind is called: nothing of it is HTML or mathematics, nothing is loaded"
    from html.parser import HTMLParser

    bad = '<script>alert(1)</script> $\\frac{1$ "\' & <img src=http://x.example/a.png>'

    class Tags(HTMLParser):
        def __init__(self, text):
            super().__init__()
            self.tags, self.loads = set(), []
            self.feed(text)

        def handle_starttag(self, tag, attrs):
            self.tags.add(tag)
            self.loads += [v for k, v in attrs if k in ('src', 'href')]

    hostile = carded | dict(
        provenance=dict.fromkeys(carded['provenance'], bad) | dict(n=9),
        found=carded['found'].assign(kind=lambda t: t.kind.replace('fine', bad)),
    )
    page = plots.card_page([hostile, carded])
    got = Tags(page)
    assert (
        'script' not in got.tags
        and len(got.loads) == 2
        and all(l.startswith('data:image/svg+xml;base64,') for l in got.loads)
    )
    assert "default-src 'none'" in page and '&lt;script&gt;' in page and page == plots.card_page([hostile, carded])
    assert inside(plots.card(**carded | dict(provenance=hostile['provenance'])))


# pixels

ROOT = Path(__file__).parents[1]
PIXELS = ROOT / 'tests/fixtures/plots'


@pytest.fixture(scope='module')
def examples():
    "Name → `small` figure, drawn by the last line of a cell in nbs/12_plots that calls it; the first example counts"
    found, cwd = {}, os.getcwd()
    plt.close('all')  # what tests before left open
    os.chdir(ROOT / 'nbs/12_plots')
    try:
        for path in sorted(Path('.').glob('*.ipynb')):
            draw(path, found)
    finally:
        os.chdir(cwd)
    return found


def draw(path, found):
    "Run one notebook and keep the figures that its cells end in"
    space = {}
    for c in json.loads(path.read_text())['cells']:
        source = ''.join(c['source'])
        if c['cell_type'] != 'code' or 'showdoc' in source:
            continue
        tree = ast.parse(source)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, path.stem, 'exec'), space)
        fig = eval(compile(ast.Expression(last.value), path.stem, 'eval'), space) if last else None
        if isinstance(fig, Figure) and isinstance(last.value, ast.Call) and last.value.func.id not in found:
            found[last.value.func.id] = small(fig)


def small(fig):
    "Grey, 400 pixels wide: what a reader sees, not how a font was hinted"
    fig.savefig(buffer := io.BytesIO(), format='png', dpi=100)
    image = Image.open(buffer).convert('L')
    return image.resize((400, round(400 * image.height / image.width)), Image.LANCZOS)


def apart(a, b):
    "Largest mean difference of any 20 × 20 pixels, of 255; infinite for another shape"
    if abs(a.height - b.height) > 2:
        return np.inf
    blocks = [np.asarray(i.resize((20, 20), Image.BOX), float) for i in (a, b.resize(a.size))]
    return np.abs(blocks[0] - blocks[1]).max()


@pytest.mark.parametrize('name', sorted(p.stem for p in PIXELS.glob('*.png')))
def test_figures_look_as_they_did(examples, name):
    "After a change that is meant: draw `small(fig)` of the example anew into tests/fixtures/plots, and look at it"
    assert apart(examples[name], Image.open(PIXELS / f'{name}.png')) < 12, name


def test_another_figure_looks_different(examples):
    pairs = [(a, b) for a in examples for b in examples if a < b]
    close = [(a, b) for a, b in pairs if apart(examples[a], examples[b]) < 24]
    assert len(pairs) > 40 and not close
    table = pd.DataFrame(
        [
            dict(model='m', sample=s, layer=i, evidence=0.1 * i, chance=0.25, hellinger=0.0, noise=0.0)
            for s in range(9)
            for i in range(4)
        ]
    )
    assert (
        apart(
            small(plots.evidence(table)),
            small(plots.evidence(table.assign(evidence=table.evidence * (1 + 0.5 * (table.layer == 2))))),
        )
        > 12
    )


def test_front_has_what_is_better_than_all_that_is_cheaper_but_for_the_oracle():
    methods = {
        'base': (10, 1),
        'mask': (9, 1),
        'crop': (14, 2),
        'crop-oracle': (18, 2),
        'vicrop-rel': (13, 3),
        'carve': (16, 4),
    }
    rows = pd.DataFrame(
        [
            dict(sample=f's{k}', method=m, score=float(k < right), flops=cost)
            for m, (right, cost) in methods.items()
            for k in range(20)
        ]
    )
    axes = plots.pareto(rows).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[1, 50], [2, 70], [4, 80]]
    assert {t.get_text() for t in axes.texts} == {*methods}


def test_controls_are_hollow():
    assert {
        m
        for m in (
            'base',
            'mask',
            'crop',
            'crop-read',
            'crop-focus',
            'vicrop-rel',
            'cd',
            'mask-late',
            'mask-highest',
            'crop-random',
            'crop-centre',
            'crop-oracle',
        )
        if plots.style._inner(m) == 'white'
    } == {'mask-late', 'mask-highest', 'crop-random', 'crop-centre', 'crop-oracle'}
