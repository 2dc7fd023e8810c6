"What an installed package brings along, and work without a clone (.ci/wheel builds and installs it)"

import hashlib, json, os, subprocess, sys
from pathlib import Path
import pytest
from fusion_notebooks import cli, core, demo, study
from fusion_notebooks.core.errors import BadInput

ROOT = Path(__file__).parents[1]


@pytest.fixture
def built(tmp_path):
    "The package as setup.py builds it"
    subprocess.run([sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', str(tmp_path)], cwd=ROOT, check=True)
    return tmp_path


def test_the_built_package_works_from_an_empty_folder(built, tmp_path):
    empty = tmp_path / 'empty'
    empty.mkdir()
    code = (
        'import json\nfrom fusion_notebooks import core, study\n'
        's = study.choose(quick=True)\n'
        'print(json.dumps([str(core.resource("")), [*core.demo_folders()], [*study.notebooks(s)], str(s.results), len(study.jobs(s))]))\n'
    )
    env = os.environ | dict(PYTHONPATH=str(built), XDG_DATA_HOME=str(tmp_path / 'home'))
    said = subprocess.run([sys.executable, '-c', code], cwd=empty, env=env, capture_output=True, text=True, check=True)
    root, models, notebooks, results, n = json.loads(said.stdout)
    assert root == str(built / 'fusion_notebooks/shipped') and models == ['glyph-llava'] and n > 3
    assert {*notebooks} == {p.stem for p in (ROOT / 'nbs/analyses').glob('*.ipynb')}
    assert results == str(empty / 'data/runs/quick/results')
    assert (built / 'fusion_notebooks/explore/web/explore.js').exists()


def test_the_error_of_a_missing_demo_model_names_the_command_that_mends_it(built, tmp_path):
    "MLLM.load of a model that did not come along, also misspelt; then the command as it is said; then a challenge on it"
    (tmp_path / 'mine.csv').write_text('model,what,layer,head,question,map\nplanted-3,layer,3,,,\n')
    code = """
import re, sys
from fusion_notebooks.cli import main
from fusion_notebooks.mllm import MLLM
for name in ('plantd-3', 'planted-3'):
    try:
        MLLM.load(name)
    except FileNotFoundError as e:
        print(e)
        command = re.search('`fusion (demo get .+?) SOURCE`', str(e))[1]
assert main(['challenge', 'score', 'mine.csv']) == 2
assert main([*command.split(), sys.argv[1]]) == 0
assert MLLM.load('planted-3').gate.open == (3,)
assert main(['challenge', 'score', 'mine.csv', '--models', 'planted-3', '--seed', '1']) == 0
"""
    env = os.environ | dict(PYTHONPATH=str(built), XDG_DATA_HOME=str(tmp_path / 'home'), HF_HUB_OFFLINE='1')
    given = dict(cwd=tmp_path, env=env, capture_output=True, text=True)
    done = subprocess.run([sys.executable, '-c', code, str(ROOT)], **given)
    assert done.returncode == 0, done.stderr
    near, same, fetched, *table = done.stdout.splitlines()
    assert (
        'did you mean planted-3' in near and 'did not come along' in same and near.count('. ') == same.count('. ') == 0
    )
    assert fetched == f'planted-3: {tmp_path / "home/fusion_notebooks/models/planted-3"}' and '1.00' in table[-1]
    assert 'planted-3 is not here: fusion demo get planted-3 SOURCE fetches it.' in done.stderr


def test_checksums_are_those_of_the_models():
    sums = json.loads((ROOT / 'data/models/checksums.json').read_text())
    there = {
        m.name: {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in m.iterdir()}
        for m in (ROOT / 'data/models').iterdir()
        if m.is_dir()
    }
    assert sums == there


def test_get_from_the_hub_goes_on_and_refuses_other_bytes(tmp_path, monkeypatch):
    asked = []

    def download(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        return str(ROOT)

    monkeypatch.setattr('huggingface_hub.snapshot_download', download)
    folder = demo.get('planted-3', 'someone/models', tmp_path)
    assert asked == [('someone/models', ['planted-3/*', 'data/models/planted-3/*'])]
    there = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    (folder / 'gate.safetensors').unlink()
    demo.get('planted-3', 'someone/models', tmp_path)
    assert {f.name for f in folder.iterdir() if f.stat().st_mtime_ns == there[f.name]} == {*there} - {
        'gate.safetensors'
    }
    other = tmp_path / 'other/planted-3'
    other.mkdir(parents=True)
    for f in folder.iterdir():
        (other / f.name).write_bytes(f.read_bytes() + b' ')
    with pytest.raises(BadInput, match='another file than the one that was published'):
        demo.get('planted-3', other.parent, tmp_path / 'third')
    assert not any((tmp_path / 'third/planted-3').iterdir())


def test_get_says_that_the_hub_cannot_be_reached(tmp_path, monkeypatch):
    def unreachable(*args, **kw):
        raise ConnectionError('no route')

    monkeypatch.setattr('huggingface_hub.snapshot_download', unreachable)
    with pytest.raises(OSError, match='someone/models cannot be fetched from the Hub'):
        demo.get('planted-3', 'someone/models', tmp_path)


def test_new_project_and_its_study(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['new', 'mine']) == 0
    assert 'next: cd mine' in capsys.readouterr().out
    s = study.read_settings('mine/settings.ini', True)
    (tmp_path / 'mine/nbs/analyses/masking.ipynb').unlink()
    assert study.notebooks(s)['masking'] == core.resource('nbs/analyses/masking.ipynb')
    assert study.notebooks(s)['refine'].is_relative_to(tmp_path)
    assert cli.main(['new', 'mine']) == 2
    assert 'mine has a settings.ini already' in capsys.readouterr().err


def test_a_study_without_settings_says_where_it_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        cli.main(
            [
                'study',
                '--quick',
                '--models',
                'glyph-llava',
                '--benchmarks',
                'glyph',
                '--limit',
                '1',
                '--analyses',
                'attention',
            ]
        )
        == 0
    )
    said = capsys.readouterr()
    assert f'No settings.ini here, so the settings of the package count; everything goes to {tmp_path}.' in said.err
    assert (tmp_path / 'data/runs/quick/limit-1/glyph-llava/attention.ipynb').exists()
    assert cli.main(['study', '--settings', 'other.ini']) == 2
    assert 'No settings at other.ini' in capsys.readouterr().err
