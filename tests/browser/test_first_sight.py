"What a newcomer meets first, as pictures to look at: the README as a page, a study in the terminal, the page and the card of its run"

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from rich.console import Console
from rich.text import Text

ROOT, SHOTS = Path(__file__).parents[2], Path(__file__).parent / 'shots'
pytestmark = pytest.mark.browser
PAGE = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
    '<style>body {{ max-width: 56em; margin: 2em auto; padding: 0 1em; font: 16px/1.5 sans-serif }}'
    ' img {{ max-width: 100% }} pre {{ overflow-x: auto; background: #f4f4f4; padding: 1em }}'
    ' table {{ border-collapse: collapse }} td, th {{ border: 1px solid #ccc; padding: .3em .6em }}</style>'
    '<base href="{base}">{body}</html>'
)
SETTINGS = """[study]
models = glyph-llava
results = results
runs = runs
figures = figures
[limits]
calibration = 4
evaluation = 4
"""


@pytest.fixture
def page(browser):
    page = browser.new_context(viewport=dict(width=1200, height=900)).new_page()
    said, asked = [], []
    page.on('pageerror', lambda e: said.append(str(e)))
    page.on('request', lambda r: asked.append(r.url))
    yield page
    page.context.close()
    assert not said and all(u.startswith(('file:', 'data:', 'about:', 'blob:')) for u in asked), asked


def fits(page):
    "Are all pictures drawn, and is nothing wider than the screen?"
    page.evaluate("() => document.querySelectorAll('img').forEach(i => { i.loading = 'eager' })")
    page.wait_for_function('() => [...document.images].every(i => i.complete)')
    assert page.evaluate('() => [...document.images].every(i => i.naturalWidth > 0)')
    assert page.evaluate('() => document.documentElement.scrollWidth - innerWidth') <= 0


def test_readme(page, tmp_path):
    body = MarkdownIt('commonmark', dict(html=True)).enable('table').render((ROOT / 'README.md').read_text())
    (tmp_path / 'readme.html').write_text(PAGE.format(title='README', base=ROOT.as_uri() + '/', body=body))
    page.goto((tmp_path / 'readme.html').as_uri())
    fits(page)
    assert page.locator('img').count() >= 2
    page.screenshot(path=SHOTS / 'readme.png', full_page=True)
    page.set_viewport_size(dict(width=400, height=800))
    fits(page)
    page.screenshot(path=SHOTS / 'readme-phone.png', full_page=True)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "(folder of a small study, what a terminal of 100 columns received)"
    folder = tmp_path_factory.mktemp('first')
    (folder / 'settings.ini').write_text(SETTINGS)
    ours, theirs = pty.openpty()
    environment = os.environ | dict(TERM='xterm-256color', COLUMNS='100', LINES='40', OMP_NUM_THREADS='1')
    command = [Path(sys.executable).with_name('fusion'), 'study']
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    received = b''
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        received += part
    os.close(ours)
    assert process.wait() == 0, received.decode(errors='replace')[-2000:]
    return folder, received.decode(errors='replace')


def as_shown(received):
    "Lines as they stand at the end: what follows a carriage return has replaced what was before it"
    return [line.rstrip('\r').split('\r')[-1] for line in received.split('\n')]


def test_terminal(page, run, tmp_path):
    folder, received = run
    assert '\x1b[' in received and '\r' in received  # colours, and a bar that moves
    lines = as_shown(received)
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line))
    last = [line for line in Text.from_ansi('\n'.join(lines)).plain.strip().split('\n') if line.strip()][-25:]
    assert any('index.html' in line for line in last)
    assert any('points' in line for line in last)
    (tmp_path / 'terminal.html').write_text(console.export_html())
    page.goto((tmp_path / 'terminal.html').as_uri())
    page.screenshot(path=SHOTS / 'terminal.png', full_page=True)


@pytest.mark.parametrize('width', [1200, 400])
def test_page_of_a_run(page, run, width):
    page.set_viewport_size(dict(width=width, height=900))
    page.goto((run[0] / 'figures/index.html').as_uri())
    fits(page)
    page.screenshot(path=SHOTS / f'run-{width}.png', full_page=True)


def test_card(page, run):
    page.goto(next((run[0] / 'figures').rglob('card.html')).as_uri())
    fits(page)
    page.screenshot(path=SHOTS / 'card.png', full_page=True)
