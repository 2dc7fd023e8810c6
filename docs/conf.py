"Sphinx, on what stage.py put together: sphinx-build -W -c docs docs/_staged docs/_build/html"

import tomllib
from pathlib import Path

about = tomllib.loads((Path(__file__).parents[1] / 'pyproject.toml').read_text())['project']
project, release, author = about['name'], about['version'], about['authors'][0]['name']
copyright = f'{author}, {about["license"]}'
extensions = ['myst_nb', 'sphinx-mathjax-offline']
suppress_warnings = ['myst.header']  # a function stands at the third level even where no second was needed

nb_execution_mode = 'off'  # stage.py did
nb_render_markdown_format = 'myst'
nb_ipywidgets_js = {}  # nothing is fetched when a page is looked at
nb_code_prompt_show, nb_code_prompt_hide = 'Source', 'Source'
myst_enable_extensions = ['colon_fence', 'dollarmath']
myst_disable_syntax = ['html_block', 'html_inline']  # what a model or a dataset says is text, never HTML
myst_heading_anchors = 3

html_theme, html_title, html_favicon = 'furo', project, '_static/icon.svg'
html_static_path, html_css_files, html_js_files = ['_static'], ['site.css'], ['sort.js', 'reach.js']
pygments_dark_style = 'github-dark'
html_show_sphinx, html_copy_source = False, False

exclude_patterns = ['_files']


def setup(app):
    app.config.html_extra_path = [
        str(app.srcdir / '_files')
    ]  # what pages link to and Sphinx does not know: PDFs and stamps
