"The explorer's canvas alone, without Jupyter and without a model: made-up maps on a plain page (make test-browser)"

import base64, json
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from fusion_notebooks.explore.canvas import _source

ROOT, SHOTS = Path(__file__).parents[2], Path(__file__).parent / 'shots'
pytestmark = pytest.mark.browser
text = lambda data: base64.b64encode(data).decode()
rng = np.random.default_rng(0)
MAPS = {k: rng.random((8, *more, 64)) for k, more in dict(attention=(3,), relative=()).items()} | dict(
    contrast=rng.normal(size=(8, 64)), words=rng.random((2, 8, 64))
)
ABOUT = dict(
    attention=dict(title='Attention', about='Where it looks.', unit='× uniform', whole='mean over heads'),
    contrast=dict(title='Contrast', about='Late minus early.', unit='× uniform', signed=True),
    relative=dict(title='Relative', about='Divided.', unit='× the general question'),
    words={},
)
RAMP = np.stack([np.arange(256)] * 3 + [np.full(256, 255)], 1).astype(
    'uint8'
)  # opaque grey: the colour of a patch is its value


def packed(m):
    top = abs(m).max(-1, keepdims=True)
    return dict(
        data=text(np.round(32767 * m / top).astype('<i2').tobytes()),
        shape=list(m.shape),
        top=top.ravel().tolist(),
        sum=m.sum(-1).ravel().tolist(),
    )


def data():
    boxes = [[48 * x, 48 * y, 48 * x + 48, 48 * y + 48] for y in range(8) for x in range(8)]
    curve = dict(
        values=[-1.0, -2, None, -4, -3, -2, -1, -0.5],
        labels=['a', 'a', None, '<b>bold</b>', 'a', 'a', 'a', 'a'],
        usual='a',
        base=-0.5,
        colour='#0072B2',
        title='<i>title</i>',
    )
    return dict(
        picture=text((ROOT / 'data/example.png').read_bytes()),
        size=[384, 384],
        shape=[8, 8],
        boxes=boxes,
        tokens=64,
        palettes={k: text(RAMP.tobytes()) for k in ('heat', 'signed')},
        marks=dict(fusion=[3], review=6, pre=1, post=5),
        maps={k: packed(m) | ABOUT[k] for k, m in MAPS.items()},
        curves=[curve],
        question='Which <b>digit</b>?',
        truth='7',
        story='',
        words=['7', '1'],
        answers=[
            dict(label='plain', text='<img src=x onerror="window.pwned=1">', p=0.25, note='', right=False),
            dict(label='refined', text='7', p=0.5, note='Looked again.', right=True),
        ],
        crop=[],
        chosen=[],
        layer=5,
        kind='attention',
        head=0,
        word=0,
        paint='heat',
        blend=1,  # nothing of the picture: the colour of a patch is its value
        common=False,
        other=-1,
        status='',
        uploads=True,
        upload={},
    )


@pytest.fixture(scope='module')
def page(browser, tmp_path_factory):
    file = tmp_path_factory.mktemp('canvas') / 'page.html'
    made = json.dumps(data()).replace('<', '\\u003c')
    call = f'const {{ render, still }} = explorer()\nwindow.model = still({made})\nrender({{ model, el: document.getElementById("here") }})'
    file.write_text(
        f'<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><div id="here"></div><script type="module">{_source()}\n{call}</script>'
    )
    page = browser.new_page(viewport=dict(width=1000, height=700))
    page.set_default_timeout(30_000)
    page.said, page.asked = [], []
    page.on('pageerror', lambda e: page.said.append(str(e)))
    page.on('request', lambda r: page.asked.append(r.url))
    page.goto(file.as_uri())
    page.wait_for_selector('.fx-main[data-draws]')
    yield page
    page.screenshot(path=SHOTS / 'canvas.png')
    assert not page.said and [u for u in page.asked if not u.startswith(('data:', 'blob:'))] == [
        file.as_uri()
    ]  # nothing in the console, nothing asked of the net
    page.close()


get = lambda page, k: page.evaluate(f'model.get({k!r})')
put = lambda page, k, v: page.evaluate(f'v => model.set({k!r}, v)', v)
say = lambda page: page.inner_text('.fx p[aria-live]')


@pytest.fixture(autouse=True)
def fresh(page):
    "Every test begins with the plain view"
    for k, v in dict(
        kind='attention', head=0, word=0, paint='heat', blend=1, common=False, other=-1, chosen=[]
    ).items():
        put(page, k, v)


def grey(page, i):
    return page.evaluate(
        "([x, y]) => { const c = document.querySelector('canvas.fx-main'), s = c.width/8; return [...c.getContext('2d').getImageData((x + .25)*s, (y + .5)*s, 1, 1).data].slice(0, 3) }",
        [i % 8, i // 8],
    )


def spot(page, x, y):
    b = page.locator('.fx-main').bounding_box()
    return b['x'] + (x + 0.5) * b['width'] / 8, b['y'] + (y + 0.5) * b['height'] / 8


@pytest.mark.parametrize('kind, head', [('attention', 0), ('attention', 2), ('contrast', 0), ('relative', 0)])
def test_pixels_are_the_map(page, kind, head):
    for layer in (0, 7):
        for k, v in dict(kind=kind, head=head, layer=layer).items():
            put(page, k, v)
        m = MAPS['attention'][layer, head] if kind == 'attention' else MAPS[kind][layer]
        want = np.round(255 * ((m / abs(m).max() + 1) / 2 if kind == 'contrast' else m / m.max()))
        for i in (0, 9, 36, 63):
            assert abs(np.array(grey(page, i)) - want[i]).max() <= 1
        assert say(page).startswith(f'Layer {layer}')


def test_redraw_is_fast(page):
    for i in range(8):
        put(page, 'layer', i)
    assert float(page.get_attribute('.fx-main', 'data-ms')) < 50


def menu(page, words):
    return page.get_by_label(words, exact=True)


def test_named_layers_are_marked(page):
    page.click('.fx-strip [aria-label="Layer 6, review layer"]')
    assert get(page, 'layer') == 6 and 'review layer' in say(page)
    page.click('.fx-strip [aria-label="Layer 3, fusion layer"]')
    assert get(page, 'layer') == 3 and 'fusion layer' in say(page)
    page.keyboard.press('ArrowRight')
    assert get(page, 'layer') == 4 and page.evaluate("document.activeElement.getAttribute('aria-label')") == 'Layer 4'
    assert page.locator('.fx-strip [aria-pressed=true]').inner_text() == '4'
    b = page.locator('.fx-curves').bounding_box()
    page.mouse.click(b['x'] + 0.97 * b['width'], b['y'] + 0.5 * b['height'])
    assert get(page, 'layer') == 7
    menu(page, 'Map').select_option('contrast')
    assert get(page, 'kind') == 'contrast' and get(page, 'layer') == 1  # the one that refines
    assert page.inner_text('.fx-about') == 'Late minus early.'


def test_small_pictures_are_the_maps(page):
    page.wait_for_timeout(100)  # a frame of the screen
    shown = page.evaluate(
        "() => [...document.querySelectorAll('.fx-strip canvas')].map(c => [0, 9, 36, 63].map(i => c.getContext('2d').getImageData((i % 8 + .5)*c.width/8, (Math.floor(i/8) + .5)*c.height/8, 1, 1).data[0]))"
    )
    for layer in range(8):
        m = MAPS['attention'][layer, 0]
        assert abs(np.array(shown[layer]) - np.round(255 * m / m.max())[[0, 9, 36, 63]]).max() <= 1


def test_blending_keeps_the_colours(page):
    colours = lambda: np.array([grey(page, i) for i in (31, 33, 49)], float)
    over = colours()
    page.locator('.fx-blend input').fill('0')
    under = colours()
    assert get(page, 'blend') == 0 and np.ptp(under, 1).max() > 40  # the picture's own colours
    page.locator('.fx-blend input').fill('0.5')
    assert abs(colours() - (over + under) / 2).max() <= 2


def test_light_on_what_counts(page):
    put(page, 'layer', 2)
    page.locator('.fx-blend input').fill('0')
    under = np.array(grey(page, 0), float)
    page.locator('.fx-blend input').fill('1')
    menu(page, 'Draw as').select_option('light')
    m = MAPS['attention'][2, 0]
    assert abs(np.array(grey(page, 0)) - under * m[0] / m.max()).max() <= 2


def test_one_scale_for_all_layers(page):
    put(page, 'layer', 2)
    m = MAPS['attention'][:, 0] / MAPS['attention'][:, 0].sum(-1, keepdims=True)
    menu(page, 'One scale for all layers').check()
    assert abs(np.array(grey(page, 9)) - 255 * m[2, 9] / m.max()).max() <= 1
    menu(page, 'One scale for all layers').uncheck()
    assert abs(np.array(grey(page, 9)) - 255 * m[2, 9] / m[2].max()).max() <= 1


def test_the_token_of_the_answer(page):
    put(page, 'layer', 2)
    menu(page, 'Answer token').select_option(label='2: 1')
    m = MAPS['words'][1, 2]
    assert abs(np.array(grey(page, 36)) - 255 * m[36] / m.max()).max() <= 1 and 'answer token 2' in say(page)
    assert menu(page, 'Head').is_disabled()
    menu(page, 'Answer token').select_option('0')
    menu(page, 'Map').select_option('relative')
    assert menu(page, 'Answer token').is_disabled() and menu(page, 'Head').is_disabled()
    menu(page, 'Map').select_option('attention')
    menu(page, 'Head').select_option('head 1')
    assert get(page, 'head') == 2 and 'head 1' in say(page)


def test_two_layers_side_by_side(page):
    put(page, 'layer', 2)
    first = page.locator('.fx-main').bounding_box()
    menu(page, 'Beside the picture').select_option('layer')
    page.locator('.fx-second').fill('6')
    assert get(page, 'other') == 6 and not page.locator('.fx-curves').is_visible()
    m = MAPS['attention'][6, 0]
    other = "() => { const c = document.querySelector('.fx-other'); return c.getContext('2d').getImageData(c.width/16, c.height/16, 1, 1).data[0] }"
    assert abs(page.evaluate(other) - 255 * m[0] / m.max()) <= 1
    assert page.locator('.fx-main').bounding_box() == first  # nothing jumped
    second = page.locator('.fx-other').bounding_box()
    assert abs(second['y'] - first['y']) < 2 and abs(second['width'] - first['width']) < 2
    page.mouse.move(*spot(page, 3, 2))
    here = page.inner_text('.fx-hover')
    assert 'layer 2: ' in here and 'layer 6: ' in here
    menu(page, 'Beside the picture').select_option('curves')
    assert page.locator('.fx-curves').is_visible() and not page.locator('.fx-other').is_visible()


def test_the_mouse_tells_place_and_value(page):
    put(page, 'layer', 2)
    page.mouse.move(*spot(page, 3, 2))
    m = MAPS['attention'][2, 0]
    assert page.inner_text('.fx-hover') == (
        f'Patch row 2, column 3 · pixels 144–192 × 96–144 · {64 * m[19] / m.sum():.2f} × uniform'
    )
    page.mouse.move(2, 2)
    assert page.inner_text('.fx-hover').startswith('Point at a patch')


def test_question_and_answers_stand_above(page):
    assert page.inner_text('.fx-asked') == 'Which <b>digit</b>?' and page.inner_text('.fx-truth') == 'Correct answer: 7'
    assert page.locator('.fx-answers tr').nth(0).locator('.fx-wrong').inner_text() == '✗ wrong'
    assert page.locator('.fx-answers tr').nth(1).locator('.fx-right').inner_text() == '✓ right'
    top = page.locator('.fx-main').bounding_box()['y']
    assert page.locator('.fx-answers').bounding_box()['y'] < top


def test_saved_as_a_picture_and_as_a_page(page, browser, tmp_path):
    put(page, 'chosen', [9])
    with page.expect_download() as saved:
        page.click('button:text-is("Save as PNG")')
    saved.value.save_as(tmp_path / 'view.png')
    assert np.asarray(Image.open(tmp_path / 'view.png').convert('RGB')).std() > 20
    saved.value.save_as(SHOTS / 'saved.png')
    with page.expect_download() as saved:
        page.click('button:text-is("Save as HTML")')
    saved.value.save_as(tmp_path / 'view.html')
    other = browser.new_page()
    said, asked = [], []
    other.on('pageerror', lambda e: said.append(str(e)))
    other.on('console', lambda m: m.type == 'error' and said.append(m.text))
    other.on('request', lambda r: asked.append(r.url))
    other.goto((tmp_path / 'view.html').as_uri())
    other.wait_for_selector('.fx-main[data-draws]')
    assert other.inner_text('.fx-asked') == 'Which <b>digit</b>?' and '1 of 64 patches masked' in say(other)
    other.locator('.fx-layer').fill('7')
    m = MAPS['attention'][7, 0]
    assert say(other).startswith('Layer 7') and abs(np.array(grey(other, 36)) - 255 * m[36] / m.max()).max() <= 1
    other.locator('.fx-main').click(position=dict(x=3, y=3))
    assert 'was not recorded' in other.inner_text('.fx p[role=status]')
    assert not said and [u for u in asked if not u.startswith('blob:')] == [(tmp_path / 'view.html').as_uri()]
    other.close()
    put(page, 'chosen', [])


def test_patches_by_mouse(page):
    put(page, 'chosen', [])
    before = grey(page, 0)
    page.mouse.move(*spot(page, 3, 3))
    page.mouse.down()
    page.mouse.move(*spot(page, 4, 4), steps=4)
    page.mouse.up()
    assert (
        get(page, 'chosen') == [27, 28, 35, 36]
        and max(grey(page, 27)) < 60
        and grey(page, 0) == before
        and '4 of 64 patches masked' in say(page)
    )
    page.mouse.click(*spot(page, 3, 3))
    assert get(page, 'chosen') == [28, 35, 36]
    page.mouse.move(*spot(page, 2, 4))
    page.mouse.down()
    page.mouse.move(*spot(page, 3, 4), steps=4)
    page.mouse.up()
    assert get(page, 'chosen') == [28, 34, 35, 36]
    page.click('button:text-is("Unmask all")')
    assert get(page, 'chosen') == []


def test_patches_by_keyboard(page):
    page.mouse.click(*spot(page, 0, 0))
    put(page, 'chosen', [])
    for key in ('ArrowRight', 'ArrowDown', ' '):
        page.keyboard.press(key)
    assert get(page, 'chosen') == [9] and 'row 1, column 1' in say(page)
    page.keyboard.press('Shift+ArrowRight')
    assert get(page, 'chosen') == [9, 10]
    for key in ('ArrowUp', 'ArrowUp', 'ArrowUp', 'Enter'):
        page.keyboard.press(key)
    assert get(page, 'chosen') == [2, 9, 10]  # the edge holds
    put(page, 'layer', 7)
    page.keyboard.press('PageUp')
    assert get(page, 'layer') == 7
    page.keyboard.press('PageDown')
    assert get(page, 'layer') == 6
    page.keyboard.press('Escape')
    assert get(page, 'chosen') == [] and page.evaluate('document.activeElement.tagName') == 'CANVAS'


def test_crop_is_drawn_and_text_stays_text(page):
    put(page, 'crop', [96, 96, 192, 192])
    line = page.evaluate(
        "() => { const c = document.querySelector('canvas.fx-main'), s = c.width/384; return [...c.getContext('2d').getImageData(96*s - 3, 120*s, 7, 1).data] }"
    )
    assert max(r - b for r, b in zip(line[::4], line[2::4])) > 100
    put(page, 'crop', [])
    assert (
        page.locator('.fx-text').first.inner_text() == '<img src=x onerror="window.pwned=1">'
        and not page.locator('.fx table img, .fx svg b, .fx svg i').count()
        and not page.evaluate('window.pwned')
    )
    assert '<b>bold</b>'[:5] in ''.join(page.locator('.fx svg text').all_text_contents())


def test_pictures_from_outside(page):
    page.set_input_files('.fx input[type=file]', dict(name='small.png', mimeType='image/png', buffer=b'12345'))
    page.wait_for_function("() => model.get('upload').name == 'small.png'")
    assert page.evaluate("new TextDecoder().decode(model.get('upload').data)") == '12345'
    page.evaluate(
        "() => { const t = new DataTransfer(); t.items.add(new File([new Uint8Array(9e6)], 'large.png')); document.querySelector('.fx-main').dispatchEvent(new ClipboardEvent('paste', { clipboardData: t, bubbles: true })) }"
    )
    page.wait_for_function(
        "() => document.querySelector('.fx p[role=status]').textContent.includes('more than the 8 allowed')"
    )
    assert get(page, 'upload')['name'] == 'small.png'
    page.evaluate(
        "() => { const t = new DataTransfer(); t.items.add(new File(['xyz'], 'pasted.png')); document.querySelector('canvas.fx-main').dispatchEvent(new ClipboardEvent('paste', { clipboardData: t, bubbles: true })) }"
    )
    page.wait_for_function("() => model.get('upload').name == 'pasted.png'")


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_nobody_is_kept_out(page, barriers, scheme):
    page.emulate_media(color_scheme=scheme)
    assert barriers(page, '.fx') == []
    page.screenshot(path=SHOTS / f'canvas-{scheme}.png', full_page=True)


def test_narrow(page):
    page.set_viewport_size(dict(width=400, height=800))
    assert page.evaluate('document.documentElement.scrollWidth') <= 400
    assert page.locator('.fx-main').bounding_box()['width'] > 340
    page.screenshot(path=SHOTS / 'canvas-narrow.png', full_page=True)
    page.set_viewport_size(dict(width=1000, height=700))


def test_under_the_rules_of_vs_code(browser, tmp_path):
    "Its notebook renderer loads modules from blobs, forbids everything else, and has colours of its own"
    policy = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline' blob:"
    module = json.dumps(f'{_source()}\nexport default {{ render: explorer().render, still: explorer().still }}')
    made = json.dumps(data() | dict(answers=[]))
    call = f"""const url = URL.createObjectURL(new Blob([{module}], {{ type: 'text/javascript' }}))
    const m = (await import(url)).default
    m.render({{ model: m.still({made}), el: document.getElementById('here') }})""".replace('</', '<\\/')
    file = tmp_path / 'code.html'
    file.write_text(
        f'<!doctype html><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}"><style>body {{ --vscode-foreground: #cccccc; --vscode-editor-background: #1e1e1e; background: #1e1e1e }}</style><div id="here"></div><script type="module">{call}</script>'
    )
    page, said = browser.new_page(), []
    page.on('pageerror', lambda e: said.append(str(e)))
    page.on('console', lambda m: m.type == 'error' and said.append(m.text))
    page.goto(file.as_uri())
    page.wait_for_selector('.fx-main[data-draws]')
    page.locator('.fx-layer').fill('6')
    assert say(page).startswith('Layer 6') and not said
    assert page.evaluate("getComputedStyle(document.querySelector('.fx-asked')).color") == 'rgb(204, 204, 204)'
    page.close()


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_can_be_read(page, scheme):
    page.emulate_media(color_scheme=scheme)
    ink, ground = (
        page.evaluate("""() => { const d = document.createElement('canvas').getContext('2d'), c = v => { d.fillStyle = v; d.fillRect(0, 0, 1, 1); return [...d.getImageData(0, 0, 1, 1).data].slice(0, 3) }
        const g = document.body.appendChild(document.createElement('div')); g.style.background = 'Canvas'
        return [c(getComputedStyle(document.querySelector('.fx p')).color), c(getComputedStyle(g).backgroundColor)] }""")
    )
    light = lambda c: sum(
        w * (v / 255 / 12.92 if v / 255 <= 0.03928 else ((v / 255 + 0.055) / 1.055) ** 2.4)
        for w, v in zip((0.2126, 0.7152, 0.0722), c)
    )
    a, b = sorted((light(ink), light(ground)))
    assert (b + 0.05) / (a + 0.05) > 4.5
