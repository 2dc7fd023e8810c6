"""Hostile input is refused with one sentence, or does nothing. Here: checkpoints, pictures, what is shown as HTML, the notebook server. Elsewhere: annotation paths
and links out of their folder (test_vqa), mutated pictures, rows and settings (test_faults), LaTeX in figures (test_plots), parameters of notebooks (test_study)."""

import json, os, pickle, re, shutil, subprocess, sys, time, urllib.error, urllib.request
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
from fusion_notebooks.cli import main
from fusion_notebooks.mllm import MLLM, open_image
from test_study import model_folder

ROOT = Path(__file__).parents[1]


class Evil:
    "Leaves a trace where it is unpickled"

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.fixture
def evil(tmp_path, model_folder):
    "A copy of the model to be tampered with, and the trace that its code would leave"
    folder, trace = tmp_path / 'evil', tmp_path / 'trace'
    shutil.copytree(model_folder, folder)
    yield folder
    assert not trace.exists()


def pickled(folder, name='pytorch_model.bin'):
    (folder / name).write_bytes(pickle.dumps(Evil(folder.parent / 'trace')))


def renew(path, **kw):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | kw))


def code(folder):
    (folder / 'evil.py').write_text(
        f'from pathlib import Path\nPath({str(folder.parent / "trace")!r}).touch()\nfrom transformers import PretrainedConfig, LlavaForConditionalGeneration as M\nclass C(PretrainedConfig): model_type = "evil"\nclass P: pass\n'
    )
    return folder


def test_the_trace_can_be_left(tmp_path):
    (tmp_path / 'a').mkdir()
    pickled(tmp_path / 'a')
    pickle.loads((tmp_path / 'a/pytorch_model.bin').read_bytes())
    assert (tmp_path / 'trace').exists()


def refused(folder, said, capsys):
    Image.new('RGB', (40, 40)).save(folder.parent / 'picture.png')
    assert (
        main(
            [
                'ask',
                str(folder),
                str(folder.parent / 'picture.png'),
                'What color is it?',
                '--out',
                str(folder.parent / 'out.png'),
            ]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert err.startswith('fusion: ') and err.count('\n') == 1 and said in err and len(err) < 600, err


def test_pickles_are_never_read(evil, capsys):
    pickled(evil)
    MLLM.load(str(evil))  # safetensors stand beside it
    (evil / 'model.safetensors').unlink()
    refused(evil, 'holds no .safetensors file: other weight formats are not read', capsys)


def test_a_pickle_under_another_name(evil, capsys):
    pickled(evil, 'model.safetensors')
    refused(evil, 'could not be loaded (SafetensorError', capsys)


def test_remote_code_is_refused(evil, capsys):
    renew(
        code(evil) / 'config.json',
        model_type='evil',
        auto_map=dict(AutoConfig='evil.C', AutoModelForImageTextToText='evil.M'),
    )
    refused(evil, 'contains custom code which must be executed', capsys)


@pytest.mark.parametrize(
    'file, entries',
    [
        ('config.json', dict(auto_map=dict(AutoConfig='evil.C', AutoModelForImageTextToText='evil.M'))),
        ('processor_config.json', dict(auto_map=dict(AutoProcessor='evil.P'), processor_class='Nosuch')),
        ('preprocessor_config.json', dict(auto_map=dict(AutoImageProcessor='evil.P'), image_processor_type='Nosuch')),
        ('tokenizer_config.json', dict(auto_map=dict(AutoTokenizer=['evil.P', None]), tokenizer_class='Nosuch')),
    ],
)
def test_code_beside_a_known_model_is_left_alone(evil, file, entries):
    renew(code(evil) / file, **entries)
    assert MLLM.load(str(evil)).n_layers == 4


BROKEN = dict(
    truncated=('model.safetensors', lambda b: b[:5000], 'could not be loaded (SafetensorError'),
    config=('config.json', lambda b: b'{', 'is not JSON'),
    wrong_type=('config.json', lambda b: b.replace(b'"vocab_size"', b'"vocab_size": "x", "y"'), 'could not be loaded'),
    shapes=('config.json', lambda b: re.sub(rb'"vocab_size": \d+', b'"vocab_size": 3', b), 'could not be loaded'),
    tokenizer=('tokenizer.json', lambda b: b[:100], 'could not be loaded (JSONDecodeError'),
    template=(
        'chat_template.jinja',
        lambda b: b'{% if %}',
        'chat template of evil cannot be filled in (TemplateSyntaxError',
    ),
    reaching=(
        'chat_template.jinja',
        lambda b: b"{{ ''.__class__.__mro__[1].__subclasses__() }}",
        'chat template of evil cannot be filled in (SecurityError',
    ),
    endless=(
        'chat_template.jinja',
        lambda b: b'{% for i in range(10**12) %}x{% endfor %}',
        'chat template of evil cannot be filled in (OverflowError',
    ),
)


@pytest.mark.parametrize('what', BROKEN)
def test_broken_checkpoints(evil, what, capsys):
    file, harm, said = BROKEN[what]
    before = (evil / file).read_bytes()
    (evil / file).write_bytes(harm(before))
    assert (evil / file).read_bytes() != before
    refused(evil, said, capsys)


# pictures


def test_absurd_dimensions(tmp_path):
    for size in ((1, 1), (2, 401), (60_000, 20)):
        Image.new('RGB', size).save(tmp_path / 'thin.png')
        with pytest.raises(ValueError, match=f'thin.png has {size[0]} × {size[1]} pixels'):
            open_image(tmp_path / 'thin.png')
    Image.new('RGB', (2, 400)).save(tmp_path / 'thin.png')
    assert open_image(tmp_path / 'thin.png').size == (2, 400)


def test_bombs_are_refused_before_they_are_unpacked(tmp_path):
    "Small files that say they are huge: refused by their first bytes, in little memory"
    from test_cli import gigapixel

    gigapixel(tmp_path / 'bomb.png')
    Image.new('1', (40_000, 30_000)).save(tmp_path / 'bomb.gif')
    files = sorted(map(str, tmp_path.iterdir()))
    assert all(os.path.getsize(f) < 4e6 for f in files)
    limited = 'import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (1500 << 20,)*2)\nfrom fusion_notebooks.mllm import open_image\nfor f in sys.argv[1:]:\n    try: open_image(f)\n    except ValueError as e: print(e)'
    p = subprocess.run(
        [sys.executable, '-c', limited, *files],
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'),
    )
    said = p.stdout.splitlines()
    assert (
        p.returncode == 0 and len(said) == 2 and all('pixels' in line and f in line for line, f in zip(said, files))
    ), p.stdout + p.stderr


# what is shown

BAD = '<script>alert(1)</script><img src=x onerror=alert(1)>'


def test_questions_are_text_in_tables_and_exported_notebooks():
    "As the notebooks show rows: a table at the end of a cell, exported to HTML"
    import nbformat
    from IPython.core.formatters import DisplayFormatter
    from nbconvert import HTMLExporter

    data, _ = DisplayFormatter().format(
        pd.DataFrame(dict(sample=[BAD], question=[BAD], prediction=[BAD], kind=[BAD])),
        include=['text/html', 'text/plain'],
    )
    out = nbformat.v4.new_output('display_data', data), nbformat.v4.new_output('stream', text=BAD)
    html = HTMLExporter().from_notebook_node(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('rows', outputs=list(out))])
    )[0]
    assert html.count('&lt;script&gt;alert(1)') >= 4 and '<script>alert' not in html and '<img src=x' not in html


def test_no_notebook_writes_html_of_its_own():
    "Rows reach the page through tables and figures; whoever writes HTML or Markdown with what a data set says must escape it"
    for path in [*ROOT.glob('nbs/**/*.ipynb'), *ROOT.glob('fusion_notebooks/*.py')]:
        if '.ipynb_checkpoints' in path.parts:
            continue
        sources = (
            [path.read_text()]
            if path.suffix == '.py'
            else [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']
        )
        for text in sources:
            for call in re.findall(r'\b(?:HTML|Markdown|Javascript|Latex)\((.*)', text):
                assert not re.search(r'question|prediction|answer|\.image', call) or 'escape' in call, (
                    f'{path.name}: {call}'
                )


# the server


def test_make_lab_keeps_the_token(tmp_path):
    "The line of `make lab`, run: without the token nothing is told, and it listens on this machine alone"
    line = re.search(r'^lab:.*\n\t\$\(BIN\)/(.+)$', (ROOT / 'Makefile').read_text(), re.M)[1].split()
    assert line[:2] == ['jupyter', 'lab']
    env = os.environ | {f'JUPYTER_{k}_DIR': str(tmp_path / k.lower()) for k in ('CONFIG', 'DATA', 'RUNTIME')}
    env.pop('JUPYTER_TOKEN', None)
    p = subprocess.Popen(
        [sys.executable, '-m', *line, '--no-browser', '--allow-root', '--port=0', '--port-retries=0'],
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 200
        while not (found := list((tmp_path / 'runtime').glob('jpserver-*.json'))) and time.monotonic() < end:
            time.sleep(0.2)
        while not (server := (lambda t: json.loads(t) if t else {})(found[0].read_text())):
            time.sleep(0.1)
        assert (
            len(server['token']) >= 40 and not server['password'] and server['hostname'] in ('localhost', '127.0.0.1')
        )

        def status(path, **headers):
            for _ in range(300):
                try:
                    return urllib.request.urlopen(
                        urllib.request.Request(server['url'] + path, headers=headers), timeout=60
                    ).status
                except urllib.error.HTTPError as e:
                    return e.code
                except OSError:
                    time.sleep(0.2)

        assert (
            status('api/contents')
            == status('api/kernels')
            == status('api/contents', Authorization='token guessed')
            == 403
        )
        assert status('api/contents', Authorization=f'token {server["token"]}') == 200
    finally:
        os.killpg(p.pid, 15)
        p.wait()
