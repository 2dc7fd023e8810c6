"""One Sphinx source folder from the notebooks, the committed figures and tables, and the pages beside this file: python docs/stage.py docs/_staged

Notebooks without stored outputs run here, as in `nbdev-test`; analyses need a whole study, so they show the committed figures instead."""

import ast, base64, csv, html, inspect, os, re, shutil, sys, tomllib
from importlib import import_module
from multiprocessing import current_process, get_context
from pathlib import Path
import pandas as pd
import yaml
from fastcore.nbio import mk_cell, read_nb, write_nb
from nbdev.process import NBProcessor
from nbdev.processors import add_links, add_show_docs, exec_show_docs, hide_line
from fusion_notebooks import plots, publish
from fusion_notebooks.core import catalog
from fusion_notebooks.results.sentences import headline, trust_text

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'fusion_notebooks'
ROOMS = {'.'.join(p.relative_to(PACKAGE).with_suffix('').parts) for p in PACKAGE.rglob('[a-z]*.py')}
markdown = lambda text: mk_cell(text, 'markdown')

# Notebooks


class run_all(exec_show_docs):
    "Every cell runs, not only what show_doc needs, so that examples have their outputs; show_doc looks at the exported module, where sources are found"

    def begin(self):
        super().begin()
        room = next((c.directives_['default_exp'] for c in self.nb.cells if 'default_exp' in c.directives_), '')
        name = f'fusion_notebooks.{room}' if room in ROOMS else '__main__'
        self.k.run_cell(f'from importlib import import_module as _load; exported_room = _load({name!r})')

    def __call__(self, cell):
        if cell.cell_type != 'code' or cell.directives_.get('eval') == 'false':
            return
        cell.source = re.sub(r"^show_doc\(([\w.]+)\)$", r"show_doc(exported_room.\1, name='\1')", cell.source)
        self.k.cell(cell)
        if e := self.k.exc:
            raise RuntimeError(f'{type(e).__name__}: {e}\nin the cell\n{cell.source}') from e

    def end(self):
        self.k.close()


def target(
    room: str,  # name of the module
    name: str,  # as written
) -> str:  # of links; capitals do not count there, so a class says that it is one
    return f'{room}{"-class" if name[:1].isupper() else ""}-{name.lower()}'


def documented(
    text: str,  # what `show_doc` gave
    room: str,  # name of the module
) -> str:  # the same with a link target, the place of the source in words, and no types made up from defaults
    text = re.sub(r'^---\n\n', '', text)
    text = re.sub(r'^\[source\]\(.*?/\w+/\w+\.py#L\w+\).*\n\n', '', text, flags=re.M)
    text = re.sub(r'(?<=[:\[|>])fusion_notebooks\.[\w.]+\.|:NoneType(?==None)', '', text)
    return f'({target(room, re.search("^### (.+)$", text, re.M)[1])})=\n{text}'


ALT = r'^#\| *fig-alt: *(.+)\n'


def drawn(
    source: str,  # of a cell that shows a figure
) -> str:  # alternative text: what stands behind `#| fig-alt:`, else what the function that draws it says of itself
    if said := re.search(ALT, source, re.M):
        return said[1]
    docs = [
        getattr(plots, name).__doc__
        for name in re.findall(r'(\w+)\(', source)
        if inspect.isfunction(getattr(plots, name, None)) and name in plots.__all__
    ]
    return docs[-1] if docs else 'Figure drawn by the code above'


def document(
    cells: list,  # processed by `NBProcessor`
    room: str,  # name of the module
) -> list:  # cells for MyST-NB
    "API docs become Markdown, the library's code stands folded behind them, its imports and what is hidden go"
    out, docs, folded = [], [], []
    for c in [*cells, markdown('')]:
        if c.source.startswith('show_doc('):
            docs = [
                markdown(documented(''.join(o.data['text/markdown']), room)) for o in c.outputs if 'data' in o
            ] + docs  # nbdev has the last one first
            continue
        out += docs + folded
        docs, folded = [], []
        if not c.source:
            continue
        if {'hide', 'default_exp'} & {*c.directives_}:
            continue
        if {'export', 'exports'} & {*c.directives_}:
            if all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(c.source).body):
                continue
            c.metadata['tags'] = ['hide-input']
            folded = [c]
        else:
            out.append(c)
        c.metadata.pop('execution', None)
        if any('image/png' in o.get('data', {}) for o in c.get('outputs', [])):
            c.metadata['mystnb'] = dict(image=dict(alt=drawn(c.source)))
        c.source = re.sub(ALT, '', c.source, flags=re.M)
    return out


def links(
    text: str,  # Markdown
    page: Path,  # where it stands, from the root of the repository
    to: Path,  # where the page goes, from `out`
    out: Path,  # the staged folder
    targets: set,  # link targets of the API docs
) -> str:
    "Links between symbols, to other notebooks and to files (which come along); a link to a folder, or to what this site lacks, becomes its text"

    def new(m):
        text, url = m[1], m[2]
        if re.match(r'\w+:|#', url):
            return m[0]
        if symbol := re.fullmatch(r'/(?:(?:\d\d_)?(\w+)/)?(\w+)\.html#([\w.]+)', url):  # as nbdev writes it
            room = f'{symbol[1]}.{symbol[2]}' if symbol[1] else symbol[2]
            place = target(room, text.strip('`'))
            return f'[{text}](#{place})' if place in targets else text
        file, _, anchor = url.partition('#')
        file = Path(os.path.normpath(page.parent / file))
        if not (ROOT / file).is_file():
            return text
        if file.suffix != '.ipynb':
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, out / file)
        return f"[{text}]({os.path.relpath(HOMES.get(file, file), to.parent)}{'#' * bool(anchor)}{anchor})"

    return re.sub(r'(?<!\\)\[((?:[^][]|\[[^]]*\])*)\]\(([^)\s]+)\)', new, text)


MODEL = 'glyph-llava'  # whose lines the gallery shows
HOMES = {Path('nbs/index.ipynb'): Path('overview.ipynb')}  # every other notebook keeps its path


FOLDED = 'verdict', 'comparison', 'can_and_cannot'  # guides that are read for what they say: their code is folded
FIRST = r'^#\| *first\n'  # in a cell: what it shows stands behind the title


def verdict_first(
    cells: list,  # of a page
) -> list:
    "Code folded, and what is marked as first behind the title"
    for c in cells:
        if c.cell_type == 'code':
            c.metadata['tags'] = ['hide-input']
    first = [c for c in cells if re.search(FIRST, c.source, re.M)]
    for c in first:
        c.source = re.sub(FIRST, '', c.source, flags=re.M)
    rest = [c for c in cells if not any(c is f for f in first)]
    return [*rest[:1], *first, *rest[1:]]


def process(
    path: Path,  # a notebook
):  # the notebook, its API docs and outputs in place
    nb = read_nb(path)
    stored = (
        any(c.get('outputs') for c in nb.cells) or (path.parent / '.notest').exists()
    )  # what tests do not run does not run here
    os.chdir(path.parent)
    proc = NBProcessor(
        nb=nb, procs=[hide_line, add_links] if stored else [add_show_docs, hide_line, run_all, add_links]
    )
    proc.process()
    package = [path.parent.name[3:]] if path.parent.name[:2].isdigit() else []
    nb.cells = document(nb.cells, '.'.join([*package, path.stem[3:]]))
    if path.parent.name == 'analyses' or path.stem in FOLDED:
        nb.cells = verdict_first(nb.cells)
    return nb


# Figures


def saved(
    source: str,  # of a code cell
) -> list:  # patterns of file names: masking, masking-*
    "The figures that a cell of an analysis saves"
    return [re.sub(r'\{.*?\}', '*', name) for name in re.findall(r"plots\.save\(\w+, [^',]+, f?'([^']+)'", source)]


def made_by(
    sources: list,  # code cells of an analysis
    pattern: str,  # one of `saved`
    model: str,  # name of the model
) -> str:  # Python
    "Only those lines of an analysis that the figure needs"
    names = lambda node, kind: {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, kind)}

    def made(node):
        if isinstance(node, ast.FunctionDef):
            return {node.name}
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return {(a.asname or a.name).split('.')[0] for a in node.names}
        return names(node, ast.Store)

    plain = [
        re.sub(r'(?<=[( ])model(?=[,)])', repr(model), s).replace(', settings=s', '').replace('(settings, quick)', '()')
        for s in sources
    ]
    body = [ast.get_source_segment(s, node) for s in plain for node in ast.parse(s).body]
    at = next(i for i, text in enumerate(body) if pattern in saved(text))
    last = '\n'.join(
        l for l in body[at].splitlines() if 'plots.save(' not in l
    )  # of a loop or a condition everything else stays
    lines, needed = ([last], names(ast.parse(last), ast.Load) - {'fig'}) if last else ([], {'fig'})
    for text in body[at - 1 :: -1] if at else []:
        node = ast.parse(text).body[0]
        if made(node) & needed:
            lines.insert(0, text)
            needed = needed - made(node) | names(node, ast.Load)
    return '\n'.join(lines)


def pictures(
    pattern: str,  # one of `saved`
    alt: str,  # what such a figure shows
    page: Path,  # where they will stand, from the staged folder
) -> str:  # Markdown
    "The committed figures of every model, each with its alternative text and a link to its PDF"
    out = []
    for f in sorted((ROOT / 'figures').glob(f'*/{pattern}.png')):
        kind, at = (
            f.stem[len(pattern) - 1 :] if '*' in pattern else '',
            os.path.relpath(f.relative_to(ROOT), page.parent),
        )
        target = f':target: {at[:-4]}.pdf\n' if f.with_suffix('.pdf').exists() else ''
        out.append(
            f':::{{image}} {at}\n:alt: {alt}; {" ".join([f.parent.name, kind])}\n:class: {"small" if kind else "whole"}\n{target}:::'
        )
    return '\n'.join(out)


def entries():  # pattern, alternative text, title, what is said about it, notebook, code cells
    "Every figure that an analysis saves"
    for path in sorted((ROOT / 'nbs/analyses').glob('*.ipynb')):
        cells = read_nb(path).cells
        sources, said, title = [c.source for c in cells if c.cell_type == 'code'], '', path.stem
        for c in cells:
            if c.cell_type == 'markdown':
                title = (re.findall(r'^#+ (.+)$', c.source, re.M) or [title])[-1]
                said = re.sub(r'^(#|> ).*\n*', '', c.source, flags=re.M).split('\n\n')[0]
                said = '' if said.startswith('|') else said
            for pattern in saved(c.source) if c.cell_type == 'code' else ():
                doc = getattr(plots, re.search(r'plots\.(?!save)(\w+)\(', c.source)[1]).__doc__
                yield pattern, doc, title, said, path.relative_to(ROOT), sources


def drawing() -> list:  # names
    "The functions that draw a figure: found by what they return"
    return [
        n
        for n in plots.__all__
        if inspect.isfunction(f := getattr(plots, n))
        and inspect.signature(f).return_annotation is plots.style.plt.Figure
    ]


CARD = "from fusion_notebooks import plots, study\nfig = plots.card(**study.card({model!r}))"


def raw(page):
    return f'````{{raw}} html\n{page}\n````'


def folded(
    title: str,  # what is seen of it
    inside: str,  # Markdown
) -> str:  # Markdown
    opened = raw(f'<details class="folded"><summary>{html.escape(title)}</summary>')
    return '\n\n'.join([opened, inside, raw('</details>')])


def bold(
    said: str,  # Markdown
) -> str:  # the same, its first sentence in bold
    first = re.match(r'(.+?[.:?])(?=\s|$)', said, re.S)
    if not first or '*' in first[1] or first[1].count('`') % 2:
        return said
    return f'**{first[1]}**{said[len(first[1]) :]}'


def entry(title, shown, said, lines, source, alt=''):
    "What there is to see stands first, in bold; the lines that make the figure are folded"
    code = folded('The lines that make it', f'```python\n{lines}\n```')
    return f'## {title}\n\n{bold(said or alt)}\n\n{shown}\n\n{code}\n\nFrom {source}.'


def gallery(
    out: Path = None,  # the staged folder, where pictures of examples go
    cells=(),  # of the notebooks of `plots`, with their outputs; none: only what a study draws
) -> str:  # Markdown
    "Every committed figure with the lines that make it, then what else `plots` draws, as in its own examples"
    text = [
        '# Gallery\n\nEvery figure of a study, as committed, and the lines that make it: `study.require` computes only the rows that are not there yet. '
        'A click opens the PDF; the provenance (versions, revision, seed, n) lies in each file and in the JSON beside it.'
    ]
    for pattern, alt, title, said, path, sources in entries():
        shown = pictures(pattern, alt, Path('gallery.md'))
        if shown:
            text.append(
                entry(
                    ': '.join(dict.fromkeys([path.stem.replace('_', ' ').capitalize(), title]))
                    + ', one by one' * ('*' in pattern),
                    shown,
                    said,
                    made_by(sources, pattern, MODEL),
                    f'[{path.stem}]({path})',
                    alt,
                )
            )
    if shown := pictures('card*', plots.card.__doc__, Path('gallery.md')):
        pages = ', '.join(
            f'[{p.parent.name}]({p.relative_to(ROOT)})' for p in sorted((ROOT / 'figures').glob('*/card.html'))
        )
        text.append(
            entry(
                'Fusion card',
                shown,
                f'The page to attach to a model, as HTML: {pages}.',
                CARD.format(model=MODEL),
                '`fusion figures --card`',
            )
        )
    done = re.findall(r'plots\.(\w+)\(', ''.join(text))
    for name in [n for n in drawing() if n not in done] if cells else ():
        for c in cells:
            drawn_here = [o.data['image/png'] for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]
            if not drawn_here or not re.search(rf'(?<!\w){name}\(', c.source):
                continue
            file = Path('figures/examples') / f'{name}.png'
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            (out / file).write_bytes(base64.b64decode(''.join(drawn_here[-1])))
            alt = getattr(plots, name).__doc__
            text.append(
                entry(
                    alt,
                    f':::{{image}} {file}\n:alt: {alt}; layout example\n:class: whole\n:::',
                    f'`plots.{name}`, on the numbers of its own example, which are invented.',
                    c.source,
                    '[the notebooks of plots](nbs/12_plots/01_layers.ipynb)',
                )
            )
            break
    return '\n\n'.join(text) + '\n'


# Tables


def table(
    path: Path,  # CSV
) -> str:  # Markdown
    "A table that can be sorted; whatever stands in it is text, never HTML"
    with path.open(newline='') as f:
        head, *rows = csv.reader(f)

    def cell(v):
        if v in ('yes', 'no'):
            return f'<span class="{v}">{v}</span>'
        try:
            return f'{float(v):.4g}' if '.' in v else str(int(v))
        except ValueError:
            return re.sub(r'(?<=\w)(?=For[A-Z])', '<wbr>', html.escape(v))  # long class names may break there

    flags = [{r[i] for r in rows} <= {'yes', 'no', ''} for i in range(len(head))]
    line = lambda tag, values: (
        '<tr>' + ''.join(f'<{tag}{" class=flag" * flag}>{v}</{tag}>' for v, flag in zip(values, flags)) + '</tr>'
    )
    body = '\n'.join(line('td', map(cell, r)) for r in rows)
    return raw(
        f'<div class="wide"><table class="sortable">\n<thead>{line("th", map(html.escape, head))}</thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def methods() -> str:  # Markdown
    "The methods of the catalog, with links to what they come from"
    text = catalog.markdown_table(catalog.METHODS, ('name', 'sentence', 'source'))
    text = re.sub(r'arXiv (\d{4}\.\d{5})', r'[arXiv \1](https://arxiv.org/abs/\1)', text)
    return re.sub(r'(?<=\| )(github\.com/[\w./-]+)', r'[\1](https://\1)', text)


MATRIX = """# Which models work

Every image-text class of the transformers version this was tested with, each checked on a small random model of its own kind: what holds, and the reason for each *no*. The column *methods* counts those that there were when the table was made; `fusion doctor --all` makes it anew.

"""
ABOUT_TABLES = {  # part of the title → what stands in it
    'summary': 'Findings: every number of the study with its 95 % interval and its n',
    'candidates': 'Candidates: one choice at a time, on calibration pictures',
    'known_answers': 'Known answers: which layers each estimator names',
    'known_answers-named': 'Known answers: how often each layer is named',
    'known_answers-threshold': 'Known answers: by the mark and the number of samples',
}


def figure_of(
    path: Path,  # a table
) -> Path | None:
    "The figure that shows what stands in a table: a card for the findings, else the one whose name begins as the table's"
    name = dict(summary='card', candidates='refine').get(path.stem, path.stem.split('-')[0])
    there = path.with_name(f'{name}.png')
    return there if there.is_file() else None


def verdict(
    summary: Path,  # a table of findings
) -> str:  # Markdown
    "What was found on a model, in one line, and how far its maps can be trusted"
    found = pd.read_csv(summary, dtype=dict(layers=str))
    return f'**{headline(found)}** {trust_text(found)}'.strip()


def results() -> str:  # Markdown
    "One page with every table of the study, folded; each model's figures stand before its tables"
    text = [
        '# Results\n\nEvery number of the study, folded behind the figure that shows it. Layers are chosen on calibration pictures, everything else is measured on others; '
        'intervals are of 95 %. What the numbers mean for the paper is said in [the verdicts](nbs/guides/verdict.ipynb), and every other figure stands in [the gallery](gallery.md).'
    ]
    for folder in sorted({p.parent for p in (ROOT / 'figures').glob('*/*.csv')}):
        text.append(f'## {folder.name}')
        if (folder / 'summary.csv').is_file():
            text.append(verdict(folder / 'summary.csv'))
        drawn = None
        for path in sorted(folder.glob('*.csv'), key=lambda p: (p.stem != 'summary', p.stem)):
            figure = figure_of(path)
            if figure and figure != drawn:
                alt = {'card': plots.card.__doc__, 'refine': plots.refine.__doc__}.get(
                    figure.stem, 'Which layers each edit names on a model whose answers are known'
                )
                text.append(f':::{{image}} {figure.relative_to(ROOT)}\n:alt: {alt}; {folder.name}\n:class: whole\n:::')
                drawn = figure
            title = ABOUT_TABLES.get(path.stem, path.stem.replace('_', ' ').capitalize())
            text.append(folded(title, table(path)))
    published = ROOT / 'data/reference/paper_tables.csv'
    if published.is_file():
        text.append(
            "## The paper's numbers\n\nAs published in [arXiv 2601.08151](https://arxiv.org/abs/2601.08151); the per-layer logs of its authors lie beside this table in `data/reference`.\n\n"
            + folded('Published accuracies', table(published))
        )
    challenge = ROOT / 'data/reference/challenge.csv'
    if challenge.is_file():
        text.append(
            '## The challenge\n\nWhat the estimators of this package, and rules of others, name in planted models (`fusion challenge`, seed 0, 60 questions): layers and heads against those that read the picture, maps against the evidence with 95 % intervals, sinks against the visual tokens that draw attention and show nothing.\n\n'
            + folded('First entries', table(challenge))
        )
    if costs := sorted((ROOT / 'benchmarks/results').glob('*.md')):
        text.append(
            '## What it costs\n\nRatios are to one plain forward of the same prompt; `make bench`, and `python benchmarks/gpu.py` on a GPU, measure all of it again.'
        )
    for path in costs:
        title, about, *_ = path.read_text().split('\n\n')
        text.append(f'{about}.\n\n' + folded(title.lstrip('# '), table(path.with_suffix('.csv'))))
    return '\n\n'.join(text) + '\n'


def tables():  # name of the page, Markdown
    "The pages of tables: the matrix, and all others in one"
    if (ROOT / 'data/matrix.csv').is_file():
        yield 'matrix', MATRIX + table(ROOT / 'data/matrix.csv') + '\n'
    yield 'results', results()


# Pages made from other files


def api(
    books: dict,  # path → processed notebook
) -> str:  # Markdown
    "Every documented function by room, with its first sentence and a link"
    unlinked = lambda said: re.sub(r'\[(.+?)\]\(.+?\)', r'\1', said)
    text = [
        '# Library\n\nOne notebook is one module and one page; a package imports from lower numbers only. Each function is documented where it is shown at work.'
    ]
    for path, nb in books.items():
        found = [re.match(r'\(([\w.-]+)\)=\n### (.+)', c.source) for c in nb.cells]
        rows = [
            f'| [`{m[2]}`](#{m[1]}) | {unlinked(said[1]) if (said := re.search(r"^[*](.+)[*]$", c.source, re.M)) else ""} |'
            for m, c in zip(found, nb.cells)
            if m
        ]
        about = re.search(r'^> (.+)', nb.cells[0].source, re.M) if nb.cells else None
        if rows:
            text.append(
                f"## [{' '.join(path.with_suffix('').parts[1:]).replace('_', ' ')}]({path})\n\n{about[1] if about else ''}\n\n| | |\n|---|---|\n"
                + '\n'.join(rows)
            )
    return '\n\n'.join(text) + '\n'


def citation() -> str:  # Markdown
    "How to cite, from CITATION.cff"
    cff = yaml.safe_load((ROOT / 'CITATION.cff').read_text())

    def bib(kind, key, c, **more):
        who = ' and '.join(a.get('name') or f"{a['family-names']}, {a['given-names']}" for a in c['authors'])
        return (
            f'@{kind}{{{key},\n'
            + ',\n'.join(f'  {k} = {{{v}}}' for k, v in dict(title='{' + c['title'] + '}', author=who, **more).items())
            + '\n}'
        )

    paper = cff['references'][0]
    number = paper['identifiers'][0]['value'].split(':')[-1]
    entries = [
        bib('software', 'fusion_notebooks', cff, version=cff['version'], license=cff['license']),
        bib('article', 'song2026', paper, year=paper['year'], journal=f'arXiv:{number}'),
    ]
    return (
        '# Citation\n\n'
        + cff['message']
        + '\n\n```bibtex\n'
        + '\n\n'.join(entries)
        + f"\n```\n\nThe paper is [arXiv {number}](https://arxiv.org/abs/{number}). The file that other tools read is `CITATION.cff` in the repository.\n"
    )


def recorded(
    books: dict,  # path → processed notebook
    call: str,  # what the cell calls that shows it
) -> str:  # HTML; '' without the explorer
    "What a cell of the notebook of recorded questions shows"
    shown = [
        ''.join(o.data['text/html'])
        for p, nb in books.items()
        if p.stem == '04_recorded'
        for c in nb.cells
        if c.cell_type == 'code' and re.search(call, c.source, re.M)
        for o in c.get('outputs', [])
        if 'text/html' in o.get('data', {})
    ]
    return shown[0] if shown else ''


def interactive(
    books: dict,  # path → processed notebook
) -> str:  # Markdown; '' without the explorer
    "The explorer over six recorded questions: the page that its notebook shows, alone"
    page = recorded(books, r'^HTML\(page\(')
    return (
        '# Try it here\n\n**Six questions to a small model, read, misread, mended and broken: choose one, move through the layers, click a patch to mask it.** No kernel runs and nothing is fetched; '
        f'with your own picture it runs in JupyterLab, see [explore](nbs/14_explore/03_widget.ipynb).\n\n{raw(page)}\n'
        if page
        else ''
    )


TUTORIAL = 'nbs/guides/tutorial.ipynb'


def launch() -> str:  # Markdown; '' while nobody has said where the repository is
    "Buttons that open the tutorial elsewhere: `git_url` in settings.ini, which is `Repository` in pyproject.toml"
    address = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project'].get('urls', {}).get('Repository', '')
    if not (m := re.fullmatch(r'https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?', address)):
        return ''
    return f':::{{container}} launch\n[Open in Colab](https://colab.research.google.com/github/{m[1]}/blob/main/{TUTORIAL}) [Open in Binder](https://mybinder.org/v2/gh/{m[1]}/main?labpath={TUTORIAL}) [Source]({m[0]})\n:::'


MODELS = '''# Models side by side

Fusion layers on a common depth axis, review layers, attention on the evidence, what each method gains and what it costs: the demo models and the planted models of this package, and the curves of real models that others published.

```{raw} html
<p><a href="models/index.html">Open the gallery</a>: sort, filter, and open the card of a model.</p>
<p><a href="models/challenge.html">Open the challenge</a>: what methods name in planted models.</p>
```

`fusion publish` makes a dataset repository of your study, and `fusion gallery` a page like this one of any number of them: see [publishing](nbs/guides/publishing.ipynb). `fusion challenge score` makes one of the challenge; its first entries stand in [a table](results.md#the-challenge), too.
'''


# The site

ABOUT = 'CONTRIBUTING.md', 'CHANGELOG.md', 'SECURITY.md'  # beside the README


def cores() -> int:  # that this process may use
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def may_have_children():
    "Workers of a pool are daemons, which may not start processes; some notebooks do"
    current_process().daemon = False


def stage(
    out: Path,  # made anew
):
    "Write everything that Sphinx reads"
    shutil.rmtree(out, ignore_errors=True)
    paths = [
        p.relative_to(ROOT)
        for p in sorted((ROOT / 'nbs').rglob('*.ipynb'))
        if not re.search(r'/[._]', str(p.relative_to(ROOT)))
    ]
    for room in sorted(ROOMS):
        import_module(f'fusion_notebooks.{room}')  # once, for all that fork from here
    # a process each, as in nbdev-test: rooms register things under the same names
    with get_context('fork').Pool(min(4, cores()), may_have_children, maxtasksperchild=1) as fresh:
        books = dict(zip(paths, fresh.map(process, [ROOT / p for p in paths], chunksize=1)))
    targets = {t for nb in books.values() for c in nb.cells for t in re.findall(r'^\(([\w.-]+)\)=$', c.source, re.M)}
    shown = {}
    for pattern, alt, *_, path, _sources in entries():
        shown.setdefault(path, {})[pattern] = alt
    pages = {
        p.relative_to(ROOT / 'docs'): p.read_text().replace('METHODS', methods())
        for p in sorted((ROOT / 'docs').rglob('*.md'))
        if not re.search(r'/[._]', str(p.relative_to(ROOT)))
    }
    pages |= {p.relative_to(ROOT): p.read_text() for p in sorted((ROOT / 'data/models').glob('*/README.md'))}
    pages |= {Path(name): (ROOT / name).read_text() for name in ABOUT if (ROOT / name).exists()}
    shutil.copytree(
        ROOT / 'figures', out / 'figures', ignore=shutil.ignore_patterns('*.csv', '*.pdf', '*.json', '*.md', '*.tex')
    )  # tables have pages of their own
    shutil.copytree(ROOT / 'figures', out / '_files/figures', ignore=shutil.ignore_patterns('*.csv', '*.png'))
    extra = {Path(f'{name}.md'): text for name, text in tables()} | {
        Path('gallery.md'): gallery(
            out, [c for p, nb in books.items() if p.parent.name == '12_plots' for c in nb.cells]
        ),
        Path('api.md'): api(books),
    }
    if (ROOT / 'CITATION.cff').exists():
        extra[Path('citation.md')] = citation()
    drawn = [ROOT / 'figures'] if any((ROOT / 'figures').rglob('summary.csv')) else []
    publish.gallery(drawn, out / '_files/models', reference=True)
    publish.leaderboard(out / '_files/models/challenge.html', {'first entries': publish.known_entries()})
    extra[Path('models.md')] = MODELS
    if page := interactive(books):
        extra[Path('interactive.md')] = page
    if book := books.get(Path(TUTORIAL)):
        book.cells = (
            [*book.cells[:1], markdown(launch()), *book.cells[1:]]
            if launch()
            else [c for c in book.cells if 'google.colab' not in c.source]
        )
    alive = recorded(books, r'^HTML\(html\)')
    start = pages.get(Path('index.md'), '# Start').replace('EXPLORER', raw(alive) if alive else '')
    pages[Path('index.md')] = '\n\n'.join([start, launch(), contents(books, {**pages, **extra})])
    for path, nb in books.items():
        to = HOMES.get(path, path)
        for c in [*nb.cells]:
            if c.cell_type == 'markdown':
                c.source = links(c.source, path, to, out, targets)
            elif not c.outputs:
                for pattern in saved(c.source) if path in shown else ():
                    nb.cells.insert(nb.cells.index(c) + 1, markdown(pictures(pattern, shown[path][pattern], to)))
            for o in c.get('outputs', []):
                if 'text/markdown' in o.get('data', {}):
                    o.data['text/markdown'] = links(''.join(o.data['text/markdown']), path, to, out, targets)
        nb.metadata = dict(kernelspec=nb.metadata.get('kernelspec', {}), language_info=dict(name='python'))
        (out / to).parent.mkdir(parents=True, exist_ok=True)
        write_nb(nb, out / to)
    for path, text in [*pages.items(), *extra.items()]:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text(
            links(text, path, path, out, targets) if path in pages and path.parts[0] in ('data', *ABOUT) else text
        )


def contents(
    books,  # paths of notebooks
    pages,  # paths of pages
) -> str:  # Markdown
    "The table of contents, in the order in which things are read"
    some = lambda start, names: [str(p.with_suffix('')) for p in names if re.match(start, str(p))]
    there = lambda *names: [
        n for n in names if any(str(Path(p).with_suffix('')) == re.sub(r'.*<|>', '', n) for p in pages)
    ]
    guides = lambda *names: [p for p in (f'nbs/guides/{name}' for name in names) if Path(f'{p}.ipynb') in books]
    learn = guides(
        'tutorial', 'read_figures', 'can_and_cannot', 'trust', 'your_model', 'your_data', 'refine_loop', 'clusters'
    )
    found = guides('verdict', 'comparison')
    named = {'index', 'interactive', 'gallery', 'api', 'citation', 'methods', 'matrix', 'security', 'results', 'models'}
    named |= {Path(name).stem for name in ABOUT}
    parts = {
        'Start': there('Try it here <interactive>') + ['Overview <overview>'],
        'Learn': learn + [p for p in some('nbs/guides/', books) if p not in learn + found],
        'Results': found[:1]
        + there('results', 'Models side by side <models>', 'gallery', 'matrix', 'methods')
        + found[1:]
        + some('nbs/analyses/', books),
        'Library': there('Every function <api>')
        + some(r'nbs/\d\d_', books)
        + [f'Model card of {Path(p).parent.name} <{p}>' for p in some('data/', pages)],
        'Trouble': some('errors/', pages)
        + [p for p in some('(?!errors/|data/)', pages) if p not in named]
        + there(
            'Attacks and what they did <security>',
            'Security <SECURITY>',
            'Contributing <CONTRIBUTING>',
            'Changelog <CHANGELOG>',
            'citation',
        ),
    }
    return '\n\n'.join(
        f'```{{toctree}}\n:hidden:\n:caption: {name}\n\n' + '\n'.join(names) + '\n```'
        for name, names in parts.items()
        if names
    )


if __name__ == '__main__':
    stage(Path(sys.argv[1]).resolve())
