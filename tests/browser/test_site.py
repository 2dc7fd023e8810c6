"The site that `make docs` built, page by page in Chromium: nothing in the console, nothing asked of the net, every picture there, search and the recorded explorer work (make test-browser)"

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
import pytest

ROOT, SHOTS = Path(__file__).parents[2], Path(__file__).parent / 'shots'
SITE = ROOT / 'docs/_build/html'
PAGES = sorted(str(p.relative_to(SITE)) for p in SITE.rglob('*.html') if '_static' not in p.parts)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not PAGES, reason='make docs was not run')]


@pytest.fixture(scope='module')
def here():
    quiet = type('Quiet', (SimpleHTTPRequestHandler,), dict(log_message=lambda *a: None))
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(quiet, directory=SITE)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()


@pytest.fixture
def page(browser, here):
    page = browser.new_context(viewport=dict(width=1300, height=900)).new_page()
    page.set_default_timeout(120_000)
    said, asked = [], []
    page.on('console', lambda m: m.type in ('error', 'warning') and said.append(m.text))
    page.on('pageerror', lambda e: said.append(str(e)))
    page.on('request', lambda r: asked.append(r.url))
    page.on('response', lambda r: r.status < 400 or said.append(r.url))
    yield page
    page.context.close()
    assert not said and asked and all(u.startswith((here, 'data:', 'blob:')) for u in asked)


@pytest.mark.parametrize('name', PAGES)
def test_page(page, here, name):
    page.goto(here + name)
    page.evaluate("() => document.querySelectorAll('img').forEach(i => { i.loading = 'eager' })")
    page.wait_for_function("() => [...document.images].every(i => i.complete)")
    pictures = page.evaluate(
        "() => [...document.images].map(i => [i.getAttribute('src').slice(0, 80), i.alt, i.naturalWidth, i.closest('[aria-hidden=true]') != null])"
    )
    assert not [
        p for p in pictures if not p[2] or not p[3] and len(p[1]) < 10
    ]  # drawn, and told to those who do not see
    assert page.evaluate(
        "() => document.documentElement.lang && document.title && [...document.querySelectorAll('a[href], button, input, select')].every(e => e.tabIndex >= -1)"
    )
    wide = page.evaluate('() => document.documentElement.scrollWidth - innerWidth')
    assert wide <= 0, f'{name} is {wide} pixels wider than the screen'
    assert not page.locator('mjx-merror').count()


@pytest.mark.parametrize(
    'word, found', [('contrastive_attention', 'Contrastive'), ('evidence_share', 'Evidence'), ('tutorial', 'Tutorial')]
)
def test_search(page, here, word, found):
    page.goto(here + 'index.html')
    page.fill('.sidebar-search', word)
    page.locator('.sidebar-search').press('Enter')
    page.wait_for_selector(f'ul.search a:has-text("{found}")')
    page.locator(f'ul.search a:has-text("{found}")').first.click()
    page.wait_for_function(
        f'() => document.body.textContent.includes({word!r}) || document.title.toLowerCase().includes({word!r})'
    )


def test_recorded_explorer(page, here, times):
    page.goto(here + 'interactive.html')
    page.wait_for_selector('.fx canvas[data-draws]')
    picture = lambda: page.locator('.fx canvas').evaluate("c => c.toDataURL('image/png')")
    say = lambda: page.inner_text('.fx p[aria-live]')
    pictures, n = [], int(page.get_attribute('.fx input[type=range]', 'max')) + 1
    page.evaluate("""() => { const c = document.querySelector('.fx canvas'); window.drawn = []; document.addEventListener('keydown', () => { window.pressed = performance.now() }, true)
        new MutationObserver(() => { if (window.pressed) drawn.push(performance.now() - window.pressed); window.pressed = null }).observe(c, { attributeFilter: ['data-draws'] }) }""")
    page.focus('.fx input[type=range]')
    page.keyboard.press('Home')
    for i in range(n):
        if i:
            page.keyboard.press('ArrowRight')
        assert say().startswith(f'Layer {i}')
        pictures.append(picture())
    assert len({*pictures}) == n
    times['slider redraw'] += [ms / 1000 for ms in page.evaluate('drawn')]
    answers = lambda: page.locator('.fx tr').all_inner_texts()
    before, b = answers(), page.locator('.fx canvas').bounding_box()
    page.mouse.click(b['x'] + 3.5 * b['width'] / 8, b['y'] + 3.5 * b['height'] / 8)
    assert len(answers()) == len(before) + 1 and 'patch masked' in answers()[-1]
    page.keyboard.press('ArrowRight')
    page.keyboard.press(' ')
    assert len(answers()) == len(before) + 1 and picture() != pictures[-1]
    page.keyboard.press('Escape')
    assert answers() == before
    for scheme in ('light', 'dark'):
        page.emulate_media(color_scheme=scheme)
        page.screenshot(path=SHOTS / f'site-interactive-{scheme}.png', full_page=True)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_shots(page, here, scheme):
    "To look at"
    page.emulate_media(color_scheme=scheme)
    for name in (
        'index',
        'gallery',
        'nbs/guides/comparison',
        'matrix',
        'nbs/guides/tutorial',
        'nbs/14_explore/03_widget',
    ):
        page.goto(f'{here}{name}.html')
        page.screenshot(path=SHOTS / f'site-{Path(name).name}-{scheme}.png')
    page.set_viewport_size(dict(width=390, height=844))
    page.goto(here + 'index.html')
    page.screenshot(path=SHOTS / f'site-index-phone-{scheme}.png')
    assert page.evaluate('() => document.documentElement.scrollWidth - innerWidth') <= 0
