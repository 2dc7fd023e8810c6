"The gallery of models opens from disk in Chromium: it sorts, filters and chooses a method, asks nothing of anybody, and a hostile card does nothing"

import json
import pandas as pd, pytest
from fusion_notebooks import publish

pytestmark = pytest.mark.browser
CARD = '<h1>card of m</h1><script>parent.document.title = "taken"; fetch("http://127.0.0.1:9/x")</script><img src="http://127.0.0.1:9/y.png" onerror="x()">'


def published(folder, model, right, gain):
    "A published folder with a card that means harm"
    (folder / 'data/findings').mkdir(parents=True)
    line = dict(model=model, dataset='glyph', low=right - 0.1, high=right + 0.1, p=0.01, n=20, layers=None)
    rows = [
        dict(analysis='masking', finding='base', kind='all', value=right) | line,
        dict(analysis='masking', finding='fusion layers', kind='zero', value=None) | line | dict(layers='2'),
        dict(analysis='refine', finding='crop − base', kind='all', value=gain) | line,
        dict(analysis='refine', finding='crop-focus − base', kind='all', value=-gain) | line,
    ]
    pd.DataFrame(rows).to_parquet(folder / 'data/findings/evaluation.parquet')
    (folder / 'provenance.json').write_text(json.dumps(dict(models=[dict(model=model, dataset='glyph', layers=8)])))
    (folder / 'figures' / model).mkdir(parents=True)
    (folder / 'figures' / model / 'card.html').write_text(CARD)
    return folder


@pytest.fixture(scope='module')
def address(tmp_path_factory):
    root = tmp_path_factory.mktemp('gallery')
    folders = [published(root / name, name, right, gain) for name, right, gain in (('m', 0.3, 0.05), ('k', 0.9, 0.01))]
    return publish.gallery(folders, root / 'out', reference=True).as_uri()


@pytest.fixture
def page(browser, address):
    page = browser.new_context(viewport=dict(width=1500, height=900)).new_page()
    said, asked = [], []
    page.on('pageerror', lambda e: said.append(str(e)))
    page.on('request', lambda r: asked.append(r.url))
    page.goto(address)
    yield page
    page.context.close()
    assert not said and all(u.startswith(('file:', 'data:', 'about:')) for u in asked), asked


def shown(page):
    "Models of the rows that are not hidden, in order"
    return [text.split('\n')[0] for text in page.locator('tbody tr:visible td:first-child').all_inner_texts()]


def test_sorts_and_keeps_empty_cells_last(page):
    head = page.locator('th button', has_text='right, %')
    head.click()
    first = shown(page)
    head.click()
    assert page.get_attribute('th:has(button:text("right, %"))', 'aria-sort') == 'descending'
    assert shown(page)[0] == 'k' and shown(page) == first[::-1]
    page.locator('th button', has_text='crop-focus: gain').click()
    assert shown(page)[:2] == ['m', 'k']  # real models have no gain: they come last, up or down
    page.locator('th button', has_text='crop-focus: gain').click()
    assert shown(page)[:2] == ['k', 'm']


def test_filters_and_chooses_a_method(page):
    whole = len(shown(page))
    page.fill('#words', 'qwen gqa')
    assert {*shown(page)} == {'Qwen2-VL-7B'} and page.inner_text('#count') == f'1 of {whole}'
    page.fill('#words', '')
    page.select_option('#source', 'rows')
    assert shown(page) == ['m', 'k']
    cells = page.locator('tbody tr:visible td[data-method]:visible')
    assert cells.first.inner_text().startswith('-5.0')
    page.select_option('#method', 'crop')
    assert cells.first.inner_text().startswith('+5.0') and cells.count() == 4


def test_a_card_opens_and_does_nothing(page):
    page.click('tbody a:text-is("m")')
    frame = page.frame_locator('iframe')
    assert frame.locator('h1').inner_text() == 'card of m' and page.title() == 'Fusion card: m'
    page.click('a:text("All models")')
    assert len(shown(page)) > 10


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_fits_a_phone_and_can_be_read_in_the_dark(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size(dict(width=390, height=844))
    assert page.evaluate('() => document.documentElement.scrollWidth - innerWidth') <= 0
    assert page.evaluate('() => getComputedStyle(document.body).color') == (
        'rgb(255, 255, 255)' if scheme == 'dark' else 'rgb(0, 0, 0)'
    )


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_nobody_is_kept_out(page, barriers, scheme):
    page.emulate_media(color_scheme=scheme)
    assert barriers(page) == []
