"The site that `make docs` built, page by page in Chromium: nothing in the console, nothing asked of the net, every picture there, search and the recorded explorer work (make test-browser)"

import io
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
import pytest
from PIL import Image

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
    page.wait_for_selector('.fx-main[data-draws]')
    picture = lambda: page.locator('.fx-main').evaluate("c => c.toDataURL('image/png')")
    say = lambda: page.inner_text('.fx p[aria-live]')
    pictures, n = [], int(page.get_attribute('.fx-layer', 'max')) + 1
    page.evaluate("""() => { const c = document.querySelector('.fx-main'); window.drawn = []; document.addEventListener('keydown', () => { window.pressed = performance.now() }, true)
        new MutationObserver(() => { if (window.pressed) drawn.push(performance.now() - window.pressed); window.pressed = null }).observe(c, { attributeFilter: ['data-draws'] }) }""")
    page.focus('.fx-layer')
    page.keyboard.press('Home')
    for i in range(n):
        if i:
            page.keyboard.press('ArrowRight')
        assert say().startswith(f'Layer {i}')
        pictures.append(picture())
    assert len({*pictures}) == n
    times['slider redraw'] += [ms / 1000 for ms in page.evaluate('drawn')]
    answers = lambda: page.locator('.fx-answers tr').all_inner_texts()
    before, b = answers(), page.locator('.fx-main').bounding_box()
    page.mouse.click(b['x'] + 3.5 * b['width'] / 8, b['y'] + 3.5 * b['height'] / 8)
    assert len(answers()) == len(before) + 1 and '9 patches masked' in answers()[-1]
    page.keyboard.press('ArrowRight')
    page.keyboard.press(' ')
    assert len(answers()) == len(before) + 1 and picture() != pictures[-1]
    page.keyboard.press('Escape')
    assert answers() == before
    for scheme in ('light', 'dark'):
        page.emulate_media(color_scheme=scheme)
        page.screenshot(path=SHOTS / f'site-interactive-{scheme}.png', full_page=True)


RIGHT = {  # title → whether the plain answer, the crop, the focus are right, as the notebook asserts
    'Read': [True, True, True],
    'Mended': [False, False, True],
    'Mended, but why?': [False, True, False],
    'Broken': [True, False, False],
    'Seen, misread': [False, False, False],
    'Sure and wrong': [False, False, False],
}


def test_every_recorded_question(page, here):
    "Its sentence, its answers and its picture, on a phone as well"
    page.set_viewport_size(dict(width=400, height=800))
    page.goto(here + 'interactive.html')
    page.wait_for_selector('.fx-main[data-draws]')
    seen, buttons = set(), page.locator('.fx-examples button')
    assert buttons.all_inner_texts() == [*RIGHT]
    asked = page.inner_text('.fx-asked')
    for k, (title, right) in enumerate(RIGHT.items()):
        buttons.nth(k).click()
        assert buttons.nth(k).get_attribute('aria-pressed') == 'true'
        if k:  # another picture is unpacked
            page.wait_for_function('before => document.querySelector(".fx-asked").innerText != before', arg=asked)
        asked = page.inner_text('.fx-asked')
        rows = page.locator('.fx-answers tr')
        assert [rows.nth(i).locator('.fx-right').count() == 1 for i in range(3)] == right, title
        assert len(page.inner_text('.fx-story')) > 60 and page.inner_text('.fx-truth').startswith('Correct answer: ')
        seen.add((page.inner_text('.fx-asked'), page.locator('.fx-main').evaluate("c => c.toDataURL('image/png')")))
        b = page.locator('.fx-main').bounding_box()
        page.locator('.fx-main').click(position=dict(x=b['width'] / 2, y=b['height'] / 2))
        assert rows.count() == 4 and 'keeps p = ' in rows.nth(3).inner_text()
        assert page.evaluate('document.documentElement.scrollWidth') <= 400
    assert len(seen) == 6
    page.screenshot(path=SHOTS / 'site-interactive-phone.png', full_page=True)


def test_moving_picture(page, here):
    "The one in the README (docs/_static/explorer.gif): an answer that a crop mends, another question, the layer moves, patches are masked, the answer changes"
    frames = film(page, here + 'interactive.html')
    frames[0].save(SHOTS / 'explorer.gif', save_all=True, append_images=frames[1:], duration=900, loop=0, optimize=True)
    assert len({f.tobytes() for f in frames}) > 8 and (SHOTS / 'explorer.gif').stat().st_size < 1_000_000


def padded(frames):
    "Frames of one height, the shorter ones with white below"
    height = max(f.height for f in frames)
    out = []
    for frame in frames:
        whole = Image.new('RGB', (frame.width, height), 'white')
        whole.paste(frame)
        out.append(whole.quantize(48, dither=0))
    return out


def film(page, address):
    "Screenshots of the explorer at work, in few colours"
    page.set_viewport_size(
        dict(width=820, height=1600)
    )  # all of it in sight, so that nothing scrolls under the site's head
    page.goto(address)
    page.wait_for_selector('.fx-main[data-draws]')
    page.add_style_tag(content='.mobile-header, .back-to-top { display: none !important }')
    explorer, frames = page.locator('.fx'), []

    def shoot():
        page.wait_for_timeout(250)
        image = Image.open(io.BytesIO(explorer.screenshot())).convert('RGB')
        frames.append(image.resize((700, round(700 * image.height / image.width)), Image.LANCZOS))

    def ask(title):
        asked = page.inner_text('.fx-asked')
        page.locator('.fx-examples button').nth([*RIGHT].index(title)).click()
        page.wait_for_function('before => document.querySelector(".fx-asked").innerText != before', arg=asked)

    ask('Mended')
    page.locator('.fx-layer').fill('3')
    shoot()
    ask('Read')
    for layer in (0, 1, 2, 3, 5, 3):
        page.locator('.fx-layer').fill(str(layer))
        shoot()
    page.get_by_label('Map', exact=True).select_option('causal')
    shoot()
    page.get_by_label('Map', exact=True).select_option('attention')
    b = page.locator('.fx-main').bounding_box()
    for x, y in ((1.5, 1.5), (4.5, 6.5)):
        page.locator('.fx-main').click(position=dict(x=x * b['width'] / 8, y=y * b['height'] / 8))
        shoot()
    said = page.locator('.fx-text').all_inner_texts()
    assert said[3] != said[0]  # without the thing, another answer
    return padded(frames)


@pytest.mark.parametrize(
    'name', ['index', 'interactive', 'results', 'nbs/guides/verdict', 'nbs/14_explore/04_recorded']
)
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_nobody_is_kept_out(page, here, barriers, name, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto(f'{here}{name}.html')
    page.wait_for_timeout(500)
    assert barriers(page, 'article') == []


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_shots(page, here, scheme):
    "To look at"
    page.emulate_media(color_scheme=scheme)
    for name in (
        'index',
        'gallery',
        'nbs/guides/comparison',
        'matrix',
        'results',
        'nbs/guides/verdict',
        'nbs/guides/tutorial',
        'nbs/14_explore/03_widget',
    ):
        page.goto(f'{here}{name}.html')
        page.screenshot(path=SHOTS / f'site-{Path(name).name}-{scheme}.png')
    page.set_viewport_size(dict(width=390, height=844))
    page.goto(here + 'index.html')
    page.screenshot(path=SHOTS / f'site-index-phone-{scheme}.png')
    assert page.evaluate('() => document.documentElement.scrollWidth - innerWidth') <= 0
