"The page of a challenge, made from the shell, opens from disk in Chromium: it sorts and filters, asks nothing of anybody, and a hostile name of a submission stays text"

import pytest
from fusion_notebooks import publish
from fusion_notebooks.cli import main

pytestmark = pytest.mark.browser
HEAD = 'model,what,layer,head,question,map\n'
NAMES = [
    '<img src=x onerror="document.title=1">',
    '<script>document.title=2<',
    "\" onmouseover='document.title=3",
    '{{4}}&lt;b&gt;',
]


@pytest.fixture(scope='module')
def address(tmp_path_factory):
    root = tmp_path_factory.mktemp('challenge')
    for k, name in enumerate(NAMES):
        (root / f'{name}.csv').write_text(
            f'{HEAD}planted-3,layer,{k},,,\nplanted-3,head,3,{k},,\n'
        )  # one of them is right
    sinks = ' '.join('1' if i in (58, 59) else '0' for i in range(64))
    (root / 'sinks.csv').write_text(f'{HEAD}planted-noise,sinks,,,,{sinks}\n')
    files = [str(root / f'{name}.csv') for name in [*NAMES, 'sinks']]
    assert main(['challenge', 'score', *files, '--page', str(root / 'table.html')]) == 0
    return (root / 'table.html').as_uri()


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


def column(page, number):
    "Texts of a column in the rows that are not hidden, in order"
    return page.locator(f'tbody tr:visible td:nth-child({number})').all_inner_texts()


def test_names_of_submissions_stay_text(page):
    title = page.title()
    shown = column(page, 1)
    first = publish.known_entries()
    assert {*NAMES} <= {*shown} and {*first[first.what != 'maps'].method} <= {*shown}
    for k in range(len(shown)):
        page.locator('tbody tr').nth(k).hover()
    assert page.title() == title == 'Known answers: what methods name in planted models'
    assert page.locator('tbody img, tbody script, tbody [onmouseover]').count() == 0


def test_sorts_and_keeps_empty_cells_last(page):
    page.select_option('#what', 'layers')
    page.select_option('#model', 'planted-3')
    page.locator('th button', has_text='precision, %').click()
    page.locator('th button', has_text='precision, %').click()
    assert page.get_attribute('th:has(button:text("precision, %"))', 'aria-sort') == 'descending'
    values = column(page, 6)
    numbers = [float(v) for v in values if v]
    assert numbers == sorted(numbers, reverse=True) and numbers[0] == 100 and values[-1] == ''
    right = [name for name, value in zip(column(page, 1), values) if value == '100.0']
    assert NAMES[3] in right and not {*NAMES[:3]} & {*right}


def test_filters(page):
    whole = len(column(page, 1))
    page.fill('#words', 'causal noise')
    assert column(page, 1) == ['causal effect, largest tenth'] and page.inner_text('#count') == f'1 of {whole}'
    page.fill('#words', '')
    page.select_option('#source', 'submitted')
    assert {*column(page, 1)} == {*NAMES, 'sinks'}
    page.select_option('#what', 'sinks')
    assert column(page, 1) == ['sinks'] and column(page, 9) == ['100.0']
    page.select_option('#source', 'first entries')
    assert {*column(page, 2)} == {'planted-noise'}


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
