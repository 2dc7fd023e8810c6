"The explorer's canvas alone, without Jupyter and without a model: made-up maps on a plain page (make test-browser)"

import base64, json
from pathlib import Path
import numpy as np
import pytest

ROOT, SHOTS = Path(__file__).parents[2], Path(__file__).parent / 'shots'
pytestmark = pytest.mark.browser
text = lambda data: base64.b64encode(data).decode()
rng = np.random.default_rng(0)
MAPS = {k: rng.random((8, *more, 64)) for k, more in dict(attention=(3,), relative=()).items()} | dict(
    contrast=rng.normal(size=(8, 64))
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
        maps={k: packed(m) for k, m in MAPS.items()},
        curves=[curve],
        answers=[dict(label='plain', text='<img src=x onerror="window.pwned=1">', p=0.25, note='')],
        crop=[],
        chosen=[],
        layer=5,
        kind=0,
        head=0,
        status='',
        uploads=True,
        upload={},
    )


@pytest.fixture(scope='module')
def page(browser, tmp_path_factory):
    code = (
        (ROOT / 'fusion_notebooks/explore.js')
        .read_text()
        .replace('export default { render }', '')
        .replace('export function', 'function')
    )
    file = tmp_path_factory.mktemp('canvas') / 'page.html'
    made = json.dumps(data()).replace('<', '\\u003c')
    file.write_text(
        f'<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><div id="here"></div><script type="module">{code}\nwindow.model = still({made}); render({{ model, el: document.getElementById("here") }})</script>'
    )
    page = browser.new_page(viewport=dict(width=1000, height=700))
    page.set_default_timeout(120_000)
    page.said, page.asked = [], []
    page.on('pageerror', lambda e: page.said.append(str(e)))
    page.on('request', lambda r: page.asked.append(r.url))
    page.goto(file.as_uri())
    page.wait_for_selector('canvas[data-draws]')
    yield page
    page.screenshot(path=SHOTS / 'canvas.png')
    assert not page.said and page.asked == [file.as_uri()]  # nothing in the console, nothing asked of the net
    page.close()


get = lambda page, k: page.evaluate(f'model.get({k!r})')
put = lambda page, k, v: page.evaluate(f'v => model.set({k!r}, v)', v)
say = lambda page: page.inner_text('.fx p[aria-live]')


def grey(page, i):
    return page.evaluate(
        "([x, y]) => { const c = document.querySelector('canvas'), s = c.width/8; return [...c.getContext('2d').getImageData((x + .25)*s, (y + .5)*s, 1, 1).data].slice(0, 3) }",
        [i % 8, i // 8],
    )


def spot(page, x, y):
    b = page.locator('.fx canvas').bounding_box()
    return b['x'] + (x + 0.5) * b['width'] / 8, b['y'] + (y + 0.5) * b['height'] / 8


@pytest.mark.parametrize('kind, head', [(0, 0), (0, 2), (3, 0), (4, 0)])
def test_pixels_are_the_map(page, kind, head):
    for layer in (0, 7):
        for k, v in dict(kind=kind, head=head, layer=layer).items():
            put(page, k, v)
        m = {0: MAPS['attention'][layer, head], 3: MAPS['contrast'][layer], 4: MAPS['relative'][layer]}[kind]
        want = np.round(255 * ((m / abs(m).max() + 1) / 2 if kind == 3 else m / m.max()))
        for i in (0, 9, 36, 63):
            assert abs(np.array(grey(page, i)) - want[i]).max() <= 1
        assert say(page).startswith(f'Layer {layer}')
    for k in ('kind', 'head'):
        put(page, k, 0)


def test_redraw_is_fast(page):
    for i in range(8):
        put(page, 'layer', i)
    assert float(page.get_attribute('canvas', 'data-ms')) < 50


def test_early_and_late_are_layers(page):
    for kind, layer in ((1, 1), (2, 5), (3, 1)):
        put(page, 'kind', kind)
        assert get(page, 'layer') == layer
    put(page, 'kind', 2)
    put(page, 'layer', 4)
    assert get(page, 'kind') == 0  # another layer is not the late one
    page.click('button:text-is("review layer 6")')
    assert get(page, 'layer') == 6 and 'review layer' in say(page)
    page.click('button:text-is("fusion layer 3")')
    assert get(page, 'layer') == 3 and 'fusion layer' in say(page)
    b = page.locator('.fx svg').bounding_box()
    page.mouse.click(b['x'] + 0.97 * b['width'], b['y'] + 0.5 * b['height'])
    assert get(page, 'layer') == 7


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
    assert get(page, 'chosen') == [] and page.evaluate("document.activeElement.tagName") == 'CANVAS'


def test_crop_is_drawn_and_text_stays_text(page):
    put(page, 'crop', [96, 96, 192, 192])
    line = page.evaluate(
        "() => { const c = document.querySelector('canvas'), s = c.width/384; return [...c.getContext('2d').getImageData(96*s - 3, 120*s, 7, 1).data] }"
    )
    assert max(r - b for r, b in zip(line[::4], line[2::4])) > 100
    put(page, 'crop', [])
    assert (
        page.inner_text('.fx-said') == '<img src=x onerror="window.pwned=1">'
        and not page.locator('.fx table img, .fx svg b, .fx svg i').count()
        and not page.evaluate('window.pwned')
    )
    assert '<b>bold</b>'[:5] in ''.join(page.locator('.fx svg text').all_text_contents())


def test_pictures_from_outside(page):
    page.set_input_files('.fx input[type=file]', dict(name='small.png', mimeType='image/png', buffer=b'12345'))
    page.wait_for_function("() => model.get('upload').name == 'small.png'")
    assert page.evaluate("new TextDecoder().decode(model.get('upload').data)") == '12345'
    page.evaluate(
        "() => { const t = new DataTransfer(); t.items.add(new File([new Uint8Array(9e6)], 'large.png')); document.querySelector('.fx canvas').dispatchEvent(new ClipboardEvent('paste', { clipboardData: t, bubbles: true })) }"
    )
    page.wait_for_function(
        "() => document.querySelector('.fx p[role=status]').textContent.includes('more than the 8 allowed')"
    )
    assert get(page, 'upload')['name'] == 'small.png'
    page.evaluate(
        "() => { const t = new DataTransfer(); t.items.add(new File(['xyz'], 'pasted.png')); document.querySelector('canvas').dispatchEvent(new ClipboardEvent('paste', { clipboardData: t, bubbles: true })) }"
    )
    page.wait_for_function("() => model.get('upload').name == 'pasted.png'")


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
