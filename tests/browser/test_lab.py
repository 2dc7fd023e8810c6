"JupyterLab and Notebook 7 in Chromium: the tutorial and the explorer's notebook run, and what a person does to the explorer changes picture and answers as the model's side says (make test-browser)"

import base64, io, json, os, re, secrets, shutil, signal, socket, subprocess, sys, time, urllib.error, urllib.request
from contextlib import contextmanager
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from fusion_notebooks import demo, explore, plots
from fusion_notebooks.mllm import MLLM

ROOT, SHOTS = Path(__file__).parents[2], Path(__file__).parent / 'shots'
pytestmark = pytest.mark.browser
pytest.importorskip('jupyterlab')
QUESTION, STAR, PATIENCE = 'Which digit is on the purple star?', [27, 28, 35, 36], 180_000
FRONTS = dict(
    lab='lab/workspaces/{}/tree', notebook='notebooks'
)  # a workspace of its own: the default one opens again what was open before
# Notebook 7's own, on any notebook, from its start: a plug-in without a schema; a file browser that opens a path before the command is there
FAULTS = ("Cannot read properties of undefined (reading 'schema')", "Command 'filebrowser:open-path' not registered.")


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    "What `make lab` starts, on a copy of the notebooks, with a token and a port of its own: (address, token)"
    room, token = tmp_path_factory.mktemp('lab'), secrets.token_hex(16)
    for folder in ('nbs', 'figures'):
        shutil.copytree(ROOT / folder, room / folder)
    shutil.copy(ROOT / 'settings.ini', room)
    (room / 'data').mkdir()
    file = (
        room / '.JUPYTERLAB_SETTINGS_DIR/@jupyterlab/apputils-extension/notification.jupyterlab-settings'
    )  # no question about news
    file.parent.mkdir(parents=True)
    file.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    for f in (ROOT / 'data').iterdir():
        if f.name not in ('results', 'runs'):
            (room / 'data' / f.name).symlink_to(f)
    started = re.search(r'^lab:.*\n\t\$\(BIN\)/jupyter (.+)$', (ROOT / 'Makefile').read_text(), re.M)[1].split()
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    own = {
        k: str(room / f'.{k}')
        for k in (
            'JUPYTER_CONFIG_DIR',
            'JUPYTER_DATA_DIR',
            'JUPYTER_RUNTIME_DIR',
            'JUPYTERLAB_SETTINGS_DIR',
            'JUPYTERLAB_WORKSPACES_DIR',
            'IPYTHONDIR',
        )
    }
    process = subprocess.Popen(
        [
            sys.executable,
            '-m',
            'jupyter',
            *started,
            '--no-browser',
            f'--port={port}',
            '--ServerApp.port_retries=0',
            f'--IdentityProvider.token={token}',
            '--LabApp.expose_app_in_browser=True',
            '--JupyterNotebookApp.expose_app_in_browser=True',
        ]
        + ['--allow-root'] * (os.geteuid() == 0),
        cwd=room,
        env=os.environ | own | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1'),
        stdout=(room / 'log').open('w'),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    here = f'http://127.0.0.1:{port}/'
    try:
        for _ in range(600):
            assert process.poll() is None, (room / 'log').read_text()[-2000:]
            try:
                urllib.request.urlopen(f'{here}api/status?token={token}', timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        yield here, token
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


@pytest.fixture(scope='module')
def mllm():
    return MLLM.load('glyph-llava')


@pytest.fixture(scope='module')
def seen(mllm):
    return explore.see(
        mllm, ROOT / 'data/example.png', QUESTION, **dict(zip(('fusion', 'review'), explore.known('glyph-llava')))
    )


def asked(server, path, method='GET'):
    here, token = server
    with urllib.request.urlopen(
        urllib.request.Request(f'{here}api/{path}', method=method, headers=dict(Authorization=f'token {token}'))
    ) as r:
        return json.loads(r.read() or 'null')


@contextmanager
def opened(browser, server, front, path):
    "A notebook opened in a front end, all its cells run; afterwards its kernel is gone"
    here, token = server
    page = browser.new_context(viewport=dict(width=1400, height=1000)).new_page()
    page.set_default_timeout(PATIENCE)
    page.front, page.failed, page.asked = front, [], []
    page.on('pageerror', lambda e: page.failed.append(f'{e}\n{e.stack}'))
    page.on('request', lambda r: page.asked.append(r.url))
    try:
        page.goto(f'{here}{FRONTS[front].format(secrets.token_hex(4))}/{path}?token={token}')
        page.wait_for_function(
            """path => { const w = window.jupyterapp?.shell.currentWidget
            return w?.context?.path == path && w.context.isReady && w.sessionContext.isReady && w.sessionContext.session?.kernel?.connectionStatus == 'connected' }""",
            arg=path,
        )
        page.evaluate(
            'async () => { await jupyterapp.restored; await jupyterapp.shell.currentWidget.sessionContext.session.kernel.info; jupyterapp.commands.execute("notebook:run-all-cells").then(() => { window.ran = true }) }'
        )
        page.wait_for_function(
            '() => window.ran && jupyterapp.shell.currentWidget.sessionContext.session.kernel.status == "idle"',
            timeout=3 * PATIENCE,
        )
        yield page
        assert not [e for e in page.failed if e.splitlines()[0] not in FAULTS[: 2 * (front == 'notebook')]] and not [
            u for u in page.asked if not u.startswith((here, here.replace('http', 'ws', 1), 'data:', 'blob:'))
        ]
    finally:
        page.context.close()
        for s in asked(server, 'sessions'):
            asked(server, f'sessions/{s["id"]}', 'DELETE')


def bring(page, start):
    "Scroll to the cell with a line that starts so"
    page.evaluate(
        '''async start => { const n = jupyterapp.shell.currentWidget.content, i = n.widgets.findIndex(w => w.model.type == 'code' && w.model.sharedModel.source.split('\\n').some(l => l.startsWith(start)))
        n.activeCellIndex = i; await n.scrollToItem(i, 'start') }''',
        start,
    )


CELLS = """() => jupyterapp.shell.currentWidget.content.widgets.filter(w => w.model.type == 'code' && w.model.sharedModel.source.trim()).map(w => ({
    count: w.model.executionCount, source: w.model.sharedModel.source, outputs: w.model.outputs.toJSON().map(o => ({ kind: o.output_type, types: Object.keys(o.data ?? {}), text: (o.evalue ?? o.text ?? o.data?.['text/plain'] ?? '').toString() })) }))"""


def finished(page):
    "Every cell ran and none failed"
    cells = page.evaluate(CELLS)
    assert not [(c['source'][:60], o['text']) for c in cells for o in c['outputs'] if o['kind'] == 'error']
    assert not [c['source'][:60] for c in cells if not c['count']]
    return cells


def test_nobody_comes_in_without_the_token(server):
    here, token = server
    for url, code in (
        (f'{here}api/contents', 403),
        (f'{here}api/contents?token={"0" * 32}', 403),
        (f'{here}api/contents?token={token}', 200),
    ):
        try:
            got = urllib.request.urlopen(url).status
        except urllib.error.HTTPError as e:
            got = e.code
        assert got == code
    assert '/login' in urllib.request.urlopen(f'{here}lab').url


# what the explorer shows

WIDGET = '.jupyter-widgets .fx'
get = lambda page, css: page.locator(f'{WIDGET} {css}')
caption = lambda page: get(page, 'p[aria-live]').inner_text()


ROWS = f"""() => [...document.querySelectorAll('{WIDGET} tr')].map(r => {{ const of = c => r.querySelector(c)?.textContent ?? ''
    return {{ label: r.dataset.label, text: of('.fx-text'), p: of('.fx-prob'), note: of('.fx-note'), right: r.querySelector('.fx-right') ? true : r.querySelector('.fx-wrong') ? false : null }} }})"""


def rows(page):
    return {r['label']: (r['text'], float(r['p']), r['note']) for r in page.evaluate(ROWS)}


def until(page, say):
    "Nothing is being computed, and `say` holds of label → 'answer probability note'"
    page.wait_for_function(
        f"say => {{ const s = document.querySelector('{WIDGET} p[role=status]').textContent; return !s && eval(say)(Object.fromEntries(({ROWS})().map(r => [r.label, [r.text, r.p, r.note].join(' ')]))) }}",
        arg=say,
    )


def moved(page, layer):
    page.wait_for_function(
        f"layer => parseInt(document.querySelector('{WIDGET} p[aria-live]').textContent.slice(6)) == layer", arg=layer
    )


def control(page, words):
    return page.locator(f'.widget-inline-hbox:has(> label:text-is("{words}"))')


def button(page, words):
    return page.locator(f'button.jupyter-button:text-is("{words}")')


def pixels(page):
    return np.array(
        Image.open(
            io.BytesIO(base64.b64decode(get(page, '.fx-main').evaluate("c => c.toDataURL('image/png')").split(',')[1]))
        ).convert('RGB'),
        float,
    )


def patches(a):
    h, w = a.shape[0] // 8, a.shape[1] // 8
    return np.array(
        [[a[y * h + 3 : (y + 1) * h - 3, x * w + 3 : (x + 1) * w - 3].mean((0, 1)) for x in range(8)] for y in range(8)]
    ).reshape(64, 3)


def press(page, i):
    side = get(page, '.fx-main').bounding_box()['width'] / 8
    get(page, '.fx-main').click(
        position=dict(x=(i % 8 + 0.5) * side, y=(i // 8 + 0.5) * side)
    )  # waits until nothing moves


def bare(page):
    "The mean colour of each patch without a map; the focus lies on the blending afterwards"
    blend = get(page, '.fx-blend input')
    shown = blend.input_value()
    blend.fill('0')
    under = patches(pixels(page))
    blend.fill(shown)
    return under


def painted(under, m, palette):
    "The mean colour of each patch, by hand: `under`, what the page shows without a map, under the map's colour"
    colours = palette(np.clip((m / abs(m).max() + 1) / 2 if palette is plots.SIGNED else m / m.max(), 0, 1))
    over = 0.7 * colours[:, 3:]
    return under * (1 - over) + 255 * colours[:, :3] * over


def off(page, seen, m, palette, under=None):
    "Largest difference of the shown picture's patches from those painted by hand; the frame of the crop lies over some"
    left, top, right, bottom = explore.refined(seen)[1]
    inner = [left + 8 < b[0] and top + 8 < b[1] and b[2] < right - 8 and b[3] < bottom - 8 for b in seen.grid.boxes]
    outer = [b[2] < left - 8 or right + 8 < b[0] or b[3] < top - 8 or bottom + 8 < b[1] for b in seen.grid.boxes]
    free = np.array(inner) | np.array(outer)
    under = bare(page) if under is None else under
    return abs(patches(pixels(page)) - painted(under, m, palette)).max(1)[free].max()


# from a key to the picture: a listener before every other, an observer after the last draw
WATCH = f"""() => {{ const c = document.querySelector('{WIDGET} .fx-main'); window.drawn = []
    document.addEventListener('keydown', () => {{ window.pressed = performance.now() }}, true)
    new MutationObserver(() => {{ if (window.pressed) drawn.push([performance.now() - window.pressed, Number(c.dataset.ms)]); window.pressed = null }}).observe(c, {{ attributeFilter: ['data-draws'] }}) }}"""


def test_tutorial(browser, server, mllm):
    "Before `page`, which stays open for all that follow: the tutorial has the machine to itself"
    with opened(browser, server, 'lab', 'guides/tutorial.ipynb') as page:
        cells = finished(page)
        assert sum('image/png' in o['types'] for c in cells for o in c['outputs']) >= 7 and not [
            o['text'] for c in cells for o in c['outputs'] if 'Warning' in o['text']
        ]
        bring(page, 'explore(')
        get(page, '.fx-main[data-draws]').wait_for()
        until(page, "a => 'refined by crop' in a")
        s = next(s for s in demo.samples(48) if s.kind == 'fine')
        want = mllm.answer(s.image, s.question)
        assert rows(page)['plain'][:2] == (want.text, round(want.p, 3)) and any(
            'evidence-and-answer.png' in o['text'] for c in cells for o in c['outputs']
        )
        press(page, 9)
        until(page, "a => '1 token masked' in a")
        page.screenshot(path=SHOTS / 'tutorial.png')


@pytest.fixture(scope='module', params=FRONTS)
def page(request, browser, server):
    with opened(browser, server, request.param, '14_explore/03_widget.ipynb') as page:
        finished(page)
        bring(page, 'explore(')
        get(page, '.fx-main[data-draws]').wait_for()
        until(page, "a => 'refined by crop' in a")
        yield page
        page.screenshot(path=SHOTS / f'explorer-{page.front}.png')


def test_slider_moves_the_map(page, seen, times):
    page.evaluate(WATCH)
    attention, pictures, under = seen.grid.of(seen.first_pass.maps), [], bare(page)
    slider = get(page, '.fx-layer')
    slider.focus()
    page.keyboard.press('End')
    for _ in range(7):
        page.keyboard.press('ArrowLeft')
    for layer in range(8):
        if layer:
            page.keyboard.press('ArrowRight')
        moved(page, layer)
        assert slider.input_value() == f'{layer}'
        assert off(page, seen, attention[layer], plots.HEAT, under) < 3
        pictures.append(patches(pixels(page)))
    assert all(abs(a - b).max() > 10 for a, b in zip(pictures, pictures[1:]))  # another layer's picture is another one
    both = np.array(page.evaluate('drawn')) / 1000
    times['slider redraw'] += both[:, 0].tolist()
    times['drawing alone'] += both[:, 1].tolist()
    assert len(both) >= 14 and np.median(both[:, 0]) < 0.05


def test_slider_by_mouse(page, seen):
    slider, under = get(page, '.fx-layer'), bare(page)
    slider.scroll_into_view_if_needed()
    track = slider.bounding_box()
    y, at = track['y'] + track['height'] / 2, lambda layer: track['x'] + 8 + (track['width'] - 16) * layer / 7
    page.mouse.move(at(int(slider.input_value())), y)
    page.mouse.down()
    for layer in (0, 5, 7, 2):
        page.mouse.move(at(layer), y, steps=4)
        moved(page, layer)
        assert off(page, seen, seen.grid.of(seen.first_pass.maps)[layer], plots.HEAT, under) < 3
    page.mouse.up()
    get(page, '.fx-strip [aria-label^="Layer 7"]').click()
    moved(page, 7)


def test_maps_and_heads(page, seen):
    select = lambda words, what: get(page, f'select[aria-label="{words}"]').select_option(what)
    select('Map', 'contrast')
    assert f'Layer {seen.contrast.pre} (' in caption(page) and 'Contrast' in caption(page)
    assert off(page, seen, seen.grid.of(seen.contrast.map), plots.SIGNED) < 3
    select('Map', 'relative')
    assert off(page, seen, seen.relative[seen.contrast.pre], plots.HEAT) < 3
    select('Map', 'attention')
    select('Head', 'head 2')
    assert 'head 2' in caption(page) and off(page, seen, seen.heads[seen.contrast.pre, 2], plots.HEAT) < 3
    select('Head', 'mean over heads')
    get(page, f'.fx-strip [aria-label^="Layer {seen.post},"]').click()
    assert f'Layer {seen.post} ' in caption(page) and 'late map of the contrast' in caption(page)
    page.wait_for_function(f"() => document.querySelector('{WIDGET} select[aria-label=Map] option[value=causal]')")
    select('Map', 'causal')
    assert (
        off(page, seen, seen.causal.sum(1)[seen.post], plots.SIGNED) < 3
        and 'nats' in get(page, '.fx-ramp').inner_text()
    )
    select('Map', 'attention')


def test_masked_patches_change_the_answer(page, seen, times):
    before, start = pixels(page), rows(page)
    assert start['plain'][:2] == (seen.first_pass.base.text, round(seen.first_pass.base.p, 3))
    for k, i in enumerate(STAR):
        began = time.perf_counter()
        press(page, i)
        until(page, f"a => Object.keys(a).some(l => l.startsWith('{k + 1} token'))")
        times['answer with patches masked'].append(time.perf_counter() - began)
        want = explore.mask_cells(seen, STAR[: k + 1])
        text, p, note = rows(page)[f'{k + 1} token{"s" * (k > 0)} masked']
        assert (text, p) == (want.answer.text, round(want.answer.p, 3)) and f'keeps p = {np.exp(want.logp):.3f}' in note
    assert want.answer.text != seen.first_pass.base.text
    after = pixels(page)
    assert (patches(after)[STAR] < patches(before)[STAR] - 20).all() and np.median(
        abs(patches(after) - patches(before))
    ) < 1
    get(page, '.fx-main').screenshot(path=SHOTS / f'masked-{page.front}.png')
    assert np.median(times['answer with patches masked']) < 1


def test_masking_follows_its_controls(page, seen):
    control(page, 'Mask by').locator('select').select_option('zero')
    until(page, "a => Object.values(a).some(v => v.includes('(zero, layers 0 to 7'))")
    want = explore.mask_cells(seen, STAR, None, 'zero')
    assert rows(page)['4 tokens masked'][:2] == (want.answer.text, round(want.answer.p, 3))
    get(page, 'svg[aria-label*="(zero)"]').wait_for()  # a job of its own, after the answer
    low = control(page, 'at layers').locator('.noUi-handle-lower')
    low.focus()
    for _ in range(6):
        page.keyboard.press('ArrowRight')
    until(page, "a => Object.values(a).some(v => v.includes('(zero, layers 6 to 7'))")
    want = explore.mask_cells(seen, STAR, [6, 7], 'zero')
    assert rows(page)['4 tokens masked'][:2] == (want.answer.text, round(want.answer.p, 3))
    for _ in range(6):
        page.keyboard.press('ArrowLeft')
    control(page, 'Mask by').locator('select').select_option('knockout')
    until(page, "a => Object.values(a).some(v => v.includes('(knockout, layers 0 to 7'))")


# what a shortcut of the notebook would change
STATE = "() => { const n = jupyterapp.shell.currentWidget.content; return { cell: n.activeCellIndex, mode: n.mode, cells: n.widgets.map(w => [w.model.id, w.model.type, w.isHidden]) } }"


def test_keys_stay_in_the_canvas(page, seen):
    get(page, '.fx-main').focus()
    before = page.evaluate(STATE)
    page.keyboard.press('Escape')
    until(page, "a => !Object.keys(a).some(l => l.includes('masked'))")
    press(page, 0)
    for key in ('ArrowRight', 'ArrowDown', ' ', 'Shift+ArrowRight', 'PageDown'):
        page.keyboard.press(key)
    until(page, "a => Object.keys(a).some(l => l.startsWith('3 tokens'))")
    want = explore.mask_cells(seen, [0, 9, 10])
    assert rows(page)['3 tokens masked'][:2] == (
        want.answer.text,
        round(want.answer.p, 3),
    ) and 'row 1, column 2' in caption(page)
    get(page, 'button:text-is("Unmask all")').click()
    until(page, "a => !Object.keys(a).some(l => l.includes('masked'))")
    assert page.evaluate(STATE) == before


def test_keys_stay_in_the_controls(page, seen):
    "Arrows are the slider's and the list's, and letters nobody's: in the notebook they fold sections, move on, add and delete cells"
    slider, choice = get(page, '.fx-layer'), get(page, 'select[aria-label=Map]')
    slider.focus()
    before = page.evaluate(STATE)
    for key in ('Home', *['ArrowRight'] * 3, 'ArrowUp', 'ArrowDown', 'ArrowLeft', *'abddmyx'):
        page.keyboard.press(key)
    assert caption(page).startswith('Layer 2') and page.evaluate(STATE) == before
    choice.focus()
    page.keyboard.press('ArrowDown')
    assert (
        choice.input_value() == 'contrast'
        and caption(page).startswith(f'Layer {seen.contrast.pre} (')
        and 'Contrast' in caption(page)
    )
    page.keyboard.press('Home')
    assert choice.input_value() == 'attention' and ': Attention, mean over heads' in caption(page)
    button(page, 'Refine').focus()
    for key in ('ArrowDown', 'ArrowLeft', 'b'):
        page.keyboard.press(key)
    assert page.evaluate(STATE) == before


def test_refine(page, seen):
    orange = lambda: int(((pixels(page) - (255, 61, 0)).__abs__().max(-1) < 40).sum())
    line, box = explore.refined(seen)
    assert rows(page)['refined by crop'] == (line['text'], round(line['p'], 3), line['note']) and orange() > 100
    control(page, 'Refine by').locator('select').select_option('mask')
    button(page, 'Refine').click()
    until(page, "a => 'refined by mask' in a")
    line, box = explore.refined(seen, 'mask')
    assert (
        rows(page)['refined by mask'] == (line['text'], round(line['p'], 3), line['note'])
        and 'refined by crop' not in rows(page)
        and orange() < 20
    )
    control(page, 'Refine by').locator('select').select_option('crop')
    button(page, 'Refine').click()
    until(page, "a => 'refined by crop' in a")
    assert orange() > 100


def test_another_question_and_another_picture(page, mllm):
    field = control(page, 'Question').locator('input')
    field.fill('What color is the star?')
    field.press('Enter')
    want = mllm.answer(ROOT / 'data/example.png', 'What color is the star?')
    until(page, f"a => a.plain?.startsWith({json.dumps(want.text)}) && 'refined by crop' in a")
    assert rows(page)['plain'][:2] == (want.text, round(want.p, 3))
    s = next(s for s in demo.samples(8) if s.kind == 'colour')
    s.image.save(data := io.BytesIO(), 'PNG')
    before = pixels(page)
    field.fill(s.question)
    field.press('Enter')
    get(page, 'input[type=file]').set_input_files(dict(name='scene.png', mimeType='image/png', buffer=data.getvalue()))
    want = mllm.answer(s.image, s.question)
    until(
        page, f"a => a.plain?.startsWith({json.dumps(f'{want.text} {want.p:.3f}')}) && 'refined by crop' in a"
    )  # the answer about the picture before may have the same words
    assert (
        rows(page)['plain'][:2] == (want.text, round(want.p, 3)) and np.median(abs(pixels(page) - before).max(-1)) > 3
    )
    get(page, 'input[type=file]').set_input_files(dict(name='<b>none.png', mimeType='image/png', buffer=b'no picture'))
    page.wait_for_function(
        f"() => document.querySelector('{WIDGET} p[role=status]').textContent.includes('<b>none.png is not a picture')"
    )
    assert get(page, 'b').count() == 0


def test_dark(page):
    def theme(name, light):
        page.evaluate(
            "theme => { jupyterapp.commands.execute('apputils:change-theme', { theme }) }", f'JupyterLab {name}'
        )
        page.wait_for_function(f"() => document.body.dataset.jpThemeLight == '{light}'")

    theme('Light', 'true')
    page.screenshot(path=SHOTS / f'explorer-{page.front}-light.png')
    theme('Dark', 'false')
    ink, ground = (
        page.evaluate(f"""() => {{ const d = document.createElement('canvas').getContext('2d'), c = v => {{ d.fillStyle = v; d.fillRect(0, 0, 1, 1); return [...d.getImageData(0, 0, 1, 1).data].slice(0, 3) }}
        return [c(getComputedStyle(document.querySelector('{WIDGET} p')).color), c(getComputedStyle(document.body).getPropertyValue('--jp-layout-color0'))] }}""")
    )
    light = lambda c: sum(
        w * (v / 255 / 12.92 if v / 255 <= 0.03928 else ((v / 255 + 0.055) / 1.055) ** 2.4)
        for w, v in zip((0.2126, 0.7152, 0.0722), c)
    )
    a, b = sorted((light(ink), light(ground)))
    assert a < 0.1 and (b + 0.05) / (a + 0.05) > 4.5
    page.screenshot(path=SHOTS / f'explorer-{page.front}-dark.png')
    theme('Light', 'true')


@pytest.mark.parametrize('front', FRONTS)
def test_the_recorded_page_draws_as_well(browser, server, front):
    with opened(browser, server, front, '14_explore/04_recorded.ipynb') as page:
        finished(page)
        still = page.locator('.jp-RenderedHTML .fx').last
        bring(page, 'HTML(page)')
        still.locator('.fx-main[data-draws]').wait_for()
        still.locator('.fx-layer').focus()
        page.keyboard.press('Home')
        assert still.locator('p[aria-live]').inner_text().startswith('Layer 0')
