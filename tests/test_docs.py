"The site: what is staged, what the pages of errors say, and, where Sphinx is installed, that it builds without a warning and asks the net for nothing"

import ast, builtins, html, importlib.util, json, re, shutil, subprocess, sys
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
import pandas as pd, pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def stage():
    spec = importlib.util.spec_from_file_location('stage', ROOT / 'docs/stage.py')
    module = sys.modules['stage'] = importlib.util.module_from_spec(spec)  # a process for each notebook finds it there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def room(stage, tmp_path, monkeypatch):
    "A repository with one room, one analysis, one page, two figures, and names made to break HTML"
    from nbformat.v4 import new_code_cell as code, new_markdown_cell as text, new_notebook

    def book(path, *cells):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(
            json.dumps(
                new_notebook(
                    cells=cells,
                    metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')),
                )
            )
        )

    shutil.copy(ROOT / 'pyproject.toml', tmp_path)
    book(
        'nbs/index.ipynb',
        text(
            '# Here\n\n[settings](../settings.ini), [room](00_room.ipynb), [all](../nbs), [gone](../gone.txt), [far](https://arxiv.org)'
        ),
    )
    book(
        'nbs/00_room.ipynb',
        text('# 00 room'),
        code('#| default_exp room'),
        code('#| export\nimport math'),
        code(
            '#| export\ndef twice(\n    n:int, # how many\n    layer=None, # which\n)->int: # two times that\n    "Double it"\n    return 2*n'
        ),
        code('#| hide\nsecret = 1'),
        code('print(twice(21), "<script>alert(1)</script>")'),
    )
    book(
        'nbs/analyses/masking.ipynb',
        text('# Masking'),
        code("model = 'm'\nsettings = 'settings.ini'\nquick = False"),
        code('from fusion_notebooks import plots, study'),
        code("s = study.read_settings(settings, quick)\nrows = study.require('masking', model, settings=s)\nother = 1"),
        text('## Where\nText <b>said</b>.'),
        code("fig = plots.masking(rows)\nplots.save(fig, s.figures/rows.model[0], 'masking', {})\nfig"),
        code(
            "for kind, part in rows.groupby('kind'):\n    fig = plots.masking(part)\n    plots.save(fig, folder, f'masking-{kind}', {})"
        ),
    )
    (tmp_path / 'nbs/analyses/.notest').touch()
    (tmp_path / 'settings.ini').write_text('[study]\n')
    for f in ('masking.png', 'masking.pdf', 'masking-fine.png'):
        (tmp_path / 'figures/m').mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / 'figures/glyph-llava/masking.png', tmp_path / 'figures/m' / f)
    for kind, table in dict(csv='how,n\nzero,8\n', md='| how | n |\n|---|---|\n| zero | 8 |\n', tex='how & n').items():
        (tmp_path / f'figures/m/masking-numbers.{kind}').write_text(table)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/matrix.csv').write_text('class,ok,reason\nA,yes,\nB,no,"<script>alert(1)</script>, 2"\n')
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'docs/page.md').write_text('# A page\n')
    (tmp_path / 'docs/index.md').write_text('# Welcome\n')
    monkeypatch.setattr(stage, 'ROOT', tmp_path)
    monkeypatch.setattr(stage, 'MODEL', 'm')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cells(path):
    return [(c['cell_type'], ''.join(c['source'])) for c in json.loads(path.read_text())['cells']]


def test_stage(stage, room):
    out = room / 'out'
    stage.stage(out)
    index = cells(out / 'overview.ipynb')[0][1]
    assert (
        '[settings](settings.ini), [room](nbs/00_room.ipynb), all, gone, [far](https://arxiv.org)' in index
        and (out / 'settings.ini').exists()
    )
    toc = (out / 'index.md').read_text()
    assert (
        toc.index('results') < toc.index('nbs/analyses/masking') < toc.index('nbs/00_room') < toc.index('page')
        and 'EXPLORER' not in toc
    )
    nb = json.loads((out / 'nbs/00_room.ipynb').read_text())['cells']
    source = [''.join(c['source']) for c in nb]
    assert not any('import math' in s or 'secret' in s or 'default_exp' in s for s in source)
    doc = next(s for s in source if s.startswith('(room-twice)=\n### twice'))
    assert (
        'n:int, # how many' in doc and 'layer=None, # which' in doc and '# two times that' in doc and 'Double it' in doc
    )
    folded = next(c for c in nb if 'return 2*n' in ''.join(c['source']))
    assert folded['metadata']['tags'] == ['hide-input'] and nb.index(folded) > source.index(doc)
    assert ''.join(nb[-1]['outputs'][0]['text']).startswith('42 <script>')  # the example ran
    analysis = cells(out / 'nbs/analyses/masking.ipynb')
    shown = [s for kind, s in analysis if ':::{image}' in s]
    assert (
        len(shown) == 2
        and '../../figures/m/masking.png' in shown[0]
        and ':target: ../../figures/m/masking.pdf' in shown[0]
        and 'masking-fine.png' in shown[1]
        and ':target:' not in shown[1]
    )
    assert re.search(r':alt: \w[^\n]{20,}; m fine', shown[1])
    assert sorted(str(f.relative_to(out)) for f in out.rglob('masking-numbers*')) == [
        '_files/figures/m/masking-numbers.md',
        '_files/figures/m/masking-numbers.tex',
    ]


def test_gallery_shows_the_lines_that_make_a_figure(stage, room):
    text = stage.gallery()
    assert 'Where' in text and text.count(':::{image} figures/m/masking') == 2
    first, second = re.findall(r'```python\n(.*?)\n```', text, re.S)
    assert (
        first
        == "from fusion_notebooks import plots, study\nrows = study.require('masking', 'm')\nfig = plots.masking(rows)"
    )
    assert (
        second.splitlines()[-2:] == ["for kind, part in rows.groupby('kind'):", '    fig = plots.masking(part)']
        and 'other' not in second
        and 'save' not in second
    )


def test_gallery_finds_every_function_that_draws(stage, tmp_path):
    "Also one that was added a minute ago: by what it returns"
    from fastcore.xtras import dict2obj

    names = stage.drawing()
    assert (
        {
            'masking',
            'evidence',
            'hellinger',
            'noise',
            'attention_maps',
            'early_exit',
            'refine',
            'refine_examples',
            'ask',
            'card',
        }
        <= {*names}
        and 'save' not in names
        and 'statements' not in names
    )
    source = ''.join(p.read_text() for p in sorted((ROOT / 'nbs/12_plots').glob('*.ipynb')))
    assert not [n for n in names if not re.search(rf'(?<![\w.])(?<!def ){n}\(', source)], 'a figure without an example'
    png = stage.base64.b64encode(b'png').decode()
    book = dict2obj(
        dict(
            cells=[
                dict(cell_type='code', source=f'table = 1\n{n}(table)', outputs=[dict(data={'image/png': png})])
                for n in names
            ]
        )
    )
    text = stage.gallery(tmp_path, book.cells)
    for n in names:
        assert re.search(rf'(?<!\w){n}\(', text), n
    shown = re.findall(r'\{image\} figures/examples/(\w+)\.png\n:alt: (.+)', text)
    assert {n for n, _ in shown} == {n for n in names if f'plots.{n}(' not in text} and all(
        len(alt) > 20 and (tmp_path / f'figures/examples/{n}.png').read_bytes() == b'png' for n, alt in shown
    )


def test_every_function_is_in_the_reference(stage, room):
    stage.stage(room / 'out')
    text = (room / 'out/api.md').read_text()
    assert '## [00 room](nbs/00_room.ipynb)' in text and '| [`twice`](#room-twice) | Double it |' in text


def test_buttons_appear_when_there_is_somewhere_to_go(stage, room):
    assert stage.launch() == '' and 'launch' not in (stage.stage(room / 'out') or (room / 'out/index.md')).read_text()
    pyproject = (room / 'pyproject.toml').read_text()
    for address, shown in (
        ('https://github.com/some-one/fusion_notebooks.git', True),
        ('https://github.com/some-one/fusion_notebooks', True),
        ('https://example.org/x', False),
        ('javascript:alert(1)', False),
    ):
        (room / 'pyproject.toml').write_text(f'{pyproject}\n[project.urls]\nRepository = "{address}"\n')
        assert bool(stage.launch()) == shown
        if shown:
            assert (
                '(https://colab.research.google.com/github/some-one/fusion_notebooks/blob/main/nbs/guides/tutorial.ipynb)'
                in stage.launch()
                and '(https://mybinder.org/v2/gh/some-one/fusion_notebooks/main?labpath=nbs/guides/tutorial.ipynb)'
                in stage.launch()
            )


def test_the_tutorial_knows_where_it_comes_from():
    "Colab brings the notebook alone, so its first cell must name what settings.ini names"
    import configparser

    ini = configparser.ConfigParser(default_section='', interpolation=None)
    ini.read(ROOT / 'settings.ini')
    source = ''.join(
        ''.join(c['source']) for c in json.loads((ROOT / 'nbs/guides/tutorial.ipynb').read_text())['cells']
    )
    assert re.search(r"^REPOSITORY = '(.*)'$", source, re.M)[1] == ini['DEFAULT'].get('git_url', '')


def test_citation_says_what_the_file_says(stage):
    text = stage.citation()
    assert (
        text.count('@') == 2
        and 'version = {0.1.0}' in text
        and 'author = {Song, S. and Li, S. and Yu, J.}' in text
        and 'arXiv:2601.08151' in text
    )


def test_tables_hold_text_never_html(stage, room):
    found = dict(stage.tables())
    text = found['matrix']
    assert (
        set(found) == {'matrix', 'results'}
        and '<script>' not in text
        and '&lt;script&gt;alert(1)&lt;/script&gt;, 2' in text
        and '<span class="no">no</span>' in text
    )
    folded = found['results']
    assert (
        folded.index('## m\n')
        < folded.index('figures/m/masking.png')
        < folded.index('<details')
        < folded.index('<td>zero</td><td>8</td>')
    )
    (room / 'data/matrix.csv').unlink()
    assert set(dict(stage.tables())) == {'results'}


def test_verdicts_stand_before_code(stage):
    from fastcore.xtras import dict2obj

    def cell(source, kind='code'):
        return dict2obj(dict(cell_type=kind, source=source, metadata={}))

    shown = stage.verdict_first([cell('# T', 'markdown'), cell('a = 1'), cell('#| first\na')])
    assert [c.source for c in shown] == ['# T', 'a', 'a = 1'] and shown[1].metadata['tags'] == ['hide-input']
    assert stage.bold('See it. And more.') == '**See it.** And more.' and stage.bold('no end') == 'no end'


@pytest.mark.parametrize(
    'pattern',
    [
        p
        for nb in sorted((ROOT / 'nbs/analyses').glob('*.ipynb'))
        for p in re.findall(r"plots\.save\([^']*f?'([^']+)'", nb.read_text())
    ],
)
def test_lines_of_the_real_gallery_use_nothing_undefined(stage, pattern):
    pattern = re.sub(r'\{.*?\}', '*', pattern)
    _, alt, _, _, _, sources = next(e for e in stage.entries() if e[0] == pattern)
    lines = stage.made_by(sources, pattern, 'glyph-llava')
    tree = ast.parse(lines)
    known = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} | {
        *dir(builtins),
        'display',
    }
    known |= {
        (a.asname or a.name) for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names
    }
    known |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)} | {
        n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)
    }
    assert not {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} - known, lines
    assert 'plots.' in lines and 'save' not in lines and len(alt) > 20


def test_every_committed_figure_is_in_the_gallery(stage):
    shown = {*re.findall(r'\{image\} (\S+)', stage.gallery())}
    assert {str(p.relative_to(ROOT)) for p in (ROOT / 'figures').glob('*/*.png')} <= shown


@pytest.mark.parametrize('page', sorted((ROOT / 'docs/errors').glob('*.md')), ids=lambda p: p.stem)
def test_pages_of_errors_are_true(page, monkeypatch):
    "The wrong code goes wrong as described and the right code is right: each page's code runs from top to bottom"
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    assert re.findall(r'^## (.+)$', text, re.M) == ['Symptom', 'Cause', 'Wrong', 'Right']
    space = {}
    for block in re.findall(r'```python\n(.*?)```', text, re.S):
        exec(compile(block, page.name, 'exec'), space)
    assert space['mllm'].model.config.get_text_config()._attn_implementation == 'sdpa'


# the built site


class Page(HTMLParser):
    "What a page loads, where it links to, which anchors it has"

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.ids, self.alts = [], [], set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if 'id' in a:
            self.ids.add(a['id'])
        if tag == 'img':
            self.alts.append(a.get('alt'))
        if tag == 'a' and 'href' in a:
            self.links.append(a['href'])
        elif tag in ('script', 'img', 'link', 'iframe', 'source'):
            self.loads += [a[k] for k in ('src', 'href') if a.get(k)]


def check(site):
    "No page of a site loads from outside, and every link inside it leads somewhere"
    pages = {p: Page(p) for p in site.rglob('*.html') if '_static' not in p.parts}
    for path, page in pages.items():
        for url in page.loads + [u for u in page.links if not re.match(r'https?://|mailto:', u)]:
            file, _, anchor = url.partition('#')
            if url.startswith('data:'):
                continue
            assert not re.match(r'\w+:|//', url), f'{path.name} loads {url}'
            there = (path.parent / file.partition('?')[0]).resolve() if file else path
            assert there.exists(), f'{path.name} links to {url}'
            if anchor and there in pages:
                assert anchor in pages[there].ids, f'{path.name} links to {url}'
    return pages


def build(source, out):
    run = subprocess.run(
        [sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-c', str(ROOT / 'docs'), str(source), str(out)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return out


def add_what_fixed_pages_link_to(room):
    "The guides and the table that pages of the real site refer to"
    for name in ('verdict', 'publishing'):
        book = json.loads((room / 'nbs/index.ipynb').read_text())
        book['cells'][0]['source'] = f'# {name}'
        (room / 'nbs/guides').mkdir(exist_ok=True)
        (room / f'nbs/guides/{name}.ipynb').write_text(json.dumps(book))
    (room / 'data/reference').mkdir(parents=True, exist_ok=True)
    (room / 'data/reference/challenge.csv').write_text('method,layers\nswap,exact\n')


def test_a_small_site_builds(stage, room):
    "Links between pages, escaping, alternative texts; the whole site is `make docs`"
    for name in ('sphinx', 'myst_nb', 'furo', 'sphinx-mathjax-offline'):
        pytest.importorskip(name)
    add_what_fixed_pages_link_to(room)
    stage.stage(room / 'out')
    pages = check(build(room / 'out', room / 'site/html'))
    assert {
        'index.html',
        'overview.html',
        'api.html',
        'gallery.html',
        'matrix.html',
        'results.html',
        'page.html',
        '00_room.html',
        'masking.html',
    } <= {p.name for p in pages}
    for path, page in pages.items():
        assert '<script>alert' not in path.read_text() and '<b>said' not in path.read_text()
        assert all(alt and len(alt) > 10 for alt in page.alts), path
    assert html.escape('<script>alert(1)</script>', quote=False) in (room / 'site/html/nbs/00_room.html').read_text()


def test_the_built_site_is_whole():
    "Looks at what `make docs` left, where it was run since the last change"
    built = ROOT / 'docs/_build/html/index.html'
    if not built.exists() or built.stat().st_mtime < max(p.stat().st_mtime for p in (ROOT / 'nbs').rglob('*.ipynb')):
        pytest.skip('make docs was not run')
    pages = check(ROOT / 'docs/_build/html')
    names = {str(p.relative_to(ROOT / 'docs/_build/html')) for p in pages}
    assert {
        str(p.relative_to(ROOT).with_suffix('.html')) for p in (ROOT / 'nbs').rglob('[0-9]*.ipynb')
    } <= names and 'errors/mask-none.html' in names


def test_pages_in_a_browser(stage, room):
    "Chromium: nothing in the console, no request leaves, search finds a function, a table sorts"
    sync = pytest.importorskip('playwright.sync_api')
    for name in ('sphinx', 'myst_nb', 'furo', 'sphinx-mathjax-offline'):
        pytest.importorskip(name)
    chromium = shutil.which('chromium') or pytest.skip('no chromium')
    add_what_fixed_pages_link_to(room)
    stage.stage(room / 'out')
    site = build(room / 'out', room / 'site/html')
    said, asked = [], []
    quiet = type('Quiet', (SimpleHTTPRequestHandler,), dict(log_message=lambda *a: None))
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(quiet, directory=site))
    Thread(target=server.serve_forever, daemon=True).start()
    here = f'http://127.0.0.1:{server.server_port}/'
    with sync.sync_playwright() as p, server:
        page = p.chromium.launch(executable_path=chromium, args=['--no-sandbox']).new_page()
        page.on('console', lambda m: said.append(m.text))
        page.on('pageerror', lambda e: said.append(str(e)))
        page.on('request', lambda r: asked.append(r.url))
        page.on('response', lambda r: r.status < 400 or said.append(r.url))
        for f in sorted(site.rglob('*.html')):
            page.goto(here + str(f.relative_to(site)))
        page.goto(here + 'search.html?q=twice')
        page.wait_for_selector('ul.search a:has-text("00 room")')
        page.goto(here + 'matrix.html')
        first = lambda: page.inner_text('table.sortable tbody tr:first-child td')
        assert first() == 'A'
        page.click('th:has-text("ok")')
        assert first() == 'B'  # no before yes
        page.focus('th:has-text("class")')
        page.keyboard.press('Enter')
        assert first() == 'A'
        page.context.browser.close()
        server.shutdown()
    assert not said and len(asked) > 10 and all(u.startswith((here, 'data:')) for u in asked)


def test_the_readme_counts_what_the_tables_say():
    "Its sentences have numbers of the matrix and of the study"
    said = (ROOT / 'README.md').read_text()
    matrix = pd.read_csv(ROOT / 'data/matrix.csv')
    assert f'{(matrix.ok == "yes").sum()} of {len(matrix)} pass every check' in said
    found = pd.read_csv(ROOT / 'figures/glyph-llava/summary.csv')
    gain = found[found.finding == 'crop-focus − base'].set_index('kind').value * 100
    assert f'gains {gain["all"]:.1f} points: {gain["fine"]:.0f} on small details' in said
    relation = found[(found.finding == 'crop-focus − base') & (found.kind == 'relation')].iloc[0]
    assert relation.low < 0 < relation.high  # "none found on relations"
    planted = pd.read_csv(ROOT / 'figures/planted-noise/summary.csv').query('analysis == "refine"')
    crop = planted[planted.finding == 'crop − base'].set_index('kind')
    assert f'`crop` gains {100 * crop.value["all"]:.1f} points, {100 * crop.value["fine"]:.0f} on small details' in said
    focus = planted[(planted.finding == 'crop-focus − base') & (planted.kind == 'all')].iloc[0]
    assert focus.low < 0 < focus.high and crop.low['all'] > 0 and crop.n['all'] == 2000


def test_the_readme_shows_the_findings_as_they_are_now():
    "Its outputs are saved with the notebook, so that new figures alone would leave old numbers in it"
    rows = pd.read_csv(ROOT / 'figures/glyph-llava/summary.csv').query('analysis == "refine"')
    said = (ROOT / 'README.md').read_text()
    shown = re.findall(r'^ +([a-z-]+) +([+-]\d+\.\d) \[([+-]\d+\.\d), ([+-]\d+\.\d)\]', said, re.M)
    assert len(shown) >= 8
    for method, *numbers in shown:
        found = rows[(rows.finding == f'{method} − base') & (rows.kind == 'all')].iloc[0]
        assert numbers == [f'{100 * x:+.1f}' for x in (found.value, found.low, found.high)], method
