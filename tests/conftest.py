import shutil, statistics
from collections import Counter, defaultdict
from pathlib import Path
from urllib.parse import urlsplit
import numpy as np, pytest, torch
from PIL import Image
from fusion_notebooks import demo
from fusion_notebooks.mllm import MLLM, Sample


def randomise(model, seed=0):
    "Weights large enough that the image, every layer and every norm matter"
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(
                    1 + 0.3 * torch.randn(p.shape, generator=g)
                    if 'norm' in name and 'bias' not in name
                    else 0.1 * torch.randn(p.shape, generator=g)
                )
            else:
                p.copy_(torch.randn(p.shape, generator=g) * 1.5 / p[0].numel() ** 0.5)
    return model


def noise_image(seed, size=(384, 384)):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype='uint8')
    ).resize(size)


def replaced(monkeypatch, package, name, value, **kw):
    "Put something else in place of a name in every room of a package that uses it"
    import sys

    rooms = [
        room
        for key, room in list(sys.modules.items())
        if key == package.__name__ or key.startswith(package.__name__ + '.')
    ]
    users = [room for room in rooms if name in vars(room)]
    assert users, f'{package.__name__} has no {name}'
    for room in users:
        monkeypatch.setattr(room, name, value, **kw)


@pytest.fixture(scope='session')
def tiny():
    model, processor = demo.make_model()
    return MLLM(randomise(model), processor, 'tiny')


@pytest.fixture(scope='session')
def samples():
    asks = (
        'What color is the circle?',
        'Which digit is on the red object?',
        'Name the shape of the object at the top left.',
    )
    return [Sample(noise_image(k), q, ('red',), (0, 0, 96, 96), 'fine', f's{k}') for k, q in enumerate(asks)]


# Chromium: one for all browser tests; what was touched, opened and timed is counted and said at the end

SHOTS = Path(__file__).parent / 'browser/shots'
ACTS = dict(
    Page='click fill select_option set_input_files',
    Locator='click dblclick fill press select_option set_input_files hover focus',
    Mouse='click up wheel',
    Keyboard='press type',
)
touched, opened, seconds = Counter(), set(), defaultdict(list)


@pytest.fixture(scope='session')
def browser():
    "The system's Chromium, else playwright's own; every act of a test on a page is counted"
    sync = pytest.importorskip('playwright.sync_api')

    def counted(f, name):
        return lambda self, *a, **kw: (touched.update([name]), f(self, *a, **kw))[1]

    def noted(f):
        return lambda self, url, **kw: (
            opened.add(urlsplit(url)._replace(query='', fragment='').geturl()),
            f(self, url, **kw),
        )[1]

    with sync.sync_playwright() as p, pytest.MonkeyPatch.context() as patch:
        try:
            b = p.chromium.launch(
                executable_path=shutil.which('chromium') or shutil.which('google-chrome'), args=['--no-sandbox']
            )
        except sync.Error as e:
            pytest.skip(f'no Chromium: {str(e).splitlines()[0]}')
        for cls, names in ACTS.items():
            for name in names.split():
                patch.setattr(getattr(sync, cls), name, counted(getattr(getattr(sync, cls), name), name))
        patch.setattr(sync.Page, 'goto', noted(sync.Page.goto))
        SHOTS.mkdir(exist_ok=True)
        yield b
        b.close()


@pytest.fixture(scope='session')
def barriers():
    "page, selector → what axe-core finds there that keeps people out: (rule, how bad, where)"
    axe = pytest.importorskip('axe_playwright_python.sync_playwright').Axe()

    def find(page, within='html'):
        found = axe.run(page, context=within).response['violations']
        return [
            (v['id'], v['impact'], v['nodes'][0]['target'], v['nodes'][0]['failureSummary'])
            for v in found
            if v['impact'] in ('serious', 'critical')
        ]

    return find


@pytest.fixture(scope='session')
def times():
    "name → seconds, shown at the end with their limit"
    return seconds


LIMITS = {'slider redraw': 0.05, 'drawing alone': 0.05, 'answer with patches masked': 1}


def show_figures(terminalreporter):
    "What the fault suite counted; as a property of a test it also comes from the processes of xdist"
    for report in terminalreporter.getreports('passed') + terminalreporter.getreports('failed'):
        for name, figures in report.user_properties:
            if name == 'figures':
                for what, number in figures.items():
                    terminalreporter.write_line(
                        f'{what}: {number:,.2f}' if isinstance(number, float) else f'{what}: {number:,}'
                    )


def pytest_terminal_summary(terminalreporter):
    show_figures(terminalreporter)
    if not opened:
        return
    terminalreporter.write_line(
        f'{sum(touched.values())} interactions ({", ".join(f"{n} {k}" for k, n in touched.most_common())}) on {len(opened)} pages'
    )
    for name, s in seconds.items():
        terminalreporter.write_line(
            f'{name}: median {1000 * statistics.median(s):.1f} ms, largest {1000 * max(s):.1f} ms (n = {len(s)}'
            + (f'; limit {1000 * LIMITS[name]:.0f} ms)' if name in LIMITS else ')')
        )
