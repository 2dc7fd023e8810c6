"The house: one truth in settings.ini and pyproject.toml, exact versions, notebooks that papermill and nbdev can both work with"

import ast, configparser, json, re, shutil, subprocess, tomllib
from pathlib import Path
import pytest
from packaging.version import Version
import fusion_notebooks

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'nbs').rglob('*.ipynb'))
pyproject = lambda folder=ROOT: tomllib.loads((folder / 'pyproject.toml').read_text())


@pytest.fixture
def migrated(tmp_path):
    "pyproject.toml as nbdev makes it of settings.ini, on a copy"
    from nbdev.migrate import nbdev_migrate_config

    shutil.copy(ROOT / 'settings.ini', tmp_path)
    (tmp_path / 'fusion_notebooks').mkdir()
    nbdev_migrate_config(str(tmp_path))
    return pyproject(tmp_path), (tmp_path / 'fusion_notebooks/__init__.py').read_text()


def test_pyproject_says_what_settings_say(migrated):
    want, init = migrated
    got = pyproject()
    tags = got['tool']['nbdev'].pop('allowed_cell_metadata_keys')
    assert tags == ['tags'] and got['tool']['nbdev'] == want['tool']['nbdev']
    want, got = want['project'], got['project']
    assert [*got['entry-points'].pop('lmms_eval.models')] == ['fusion']
    extras = got['optional-dependencies']  # nbdev's keys know no second one
    dev = {*extras['dev']}
    for name in ('benchmarks', 'easy-vqa', 'explore', 'cluster'):  # what the examples of the notebooks need
        assert {*extras.pop(name)} <= dev, name
    assert {*extras.pop('browser')} >= {'playwright>=1.50', 'notebook>=7.2'}
    assert extras.pop('docs') == [
        'sphinx>=9.0',
        'myst-nb>=1.4',
        'furo>=2025.12',
        'sphinx-mathjax-offline>=0.0.2',
    ]
    assert got.pop('version') == fusion_notebooks.__version__ and f'"{fusion_notebooks.__version__}"' in init
    assert want.pop('dynamic') == ['version']
    want['authors'] = [{k: v for k, v in a.items() if v} for a in want['authors']]
    want['urls'] = {k: v for k, v in want['urls'].items() if v}
    for p in (want, got):
        p['classifiers'] = sorted(p['classifiers'])
    assert {k: v for k, v in want.items() if v} == got


def test_constraints_are_exact_and_cover_the_requirements():
    lines = [l for l in (ROOT / 'constraints.txt').read_text().splitlines() if not l.startswith('#')]
    assert all(re.fullmatch(r'[A-Za-z0-9._-]+==[A-Za-z0-9.]+', l) for l in lines)
    names = {re.split('==', l)[0].lower().replace('_', '-') for l in lines}
    project = pyproject()['project']
    asked = {
        re.split('[<>=]', r)[0].lower().replace('_', '-')
        for r in [*project['dependencies'], *sum(project['optional-dependencies'].values(), [])]
    }
    assert asked <= names and 'fusion-notebooks' not in names


def test_the_floors_that_ran_are_those_of_today():
    "What .ci/floors wrote when its tests had passed, and the page versions shows"
    ran, project = json.loads((ROOT / 'benchmarks/results/floors.json').read_text()), pyproject()['project']
    tools = [r for r in project['optional-dependencies']['dev'] if r.startswith(('peft', 'pytest', 'hypothesis'))]
    floors = dict(re.match(r'([\w-]+)>=([\d.]+)', r).groups() for r in project['dependencies'] + tools)
    assert ran['floors'] == floors
    installed = {name: Version(Version(v).public) for name, v in ran['installed'].items()}  # 2.6.0+cpu is 2.6.0
    assert installed == {name: Version(v) for name, v in floors.items()}
    assert ran['python'].startswith(project['requires-python'].removeprefix('>=') + '.')
    assert ran['passed'] > 500 and ran['ran'] == ['tests/families', 'tests/test_ladder.py', 'tests/test_demo.py']
    assert '- run: .ci/floors' in (ROOT / '.github/workflows/ci.yml').read_text()


def test_citation_and_licence():
    text = (ROOT / 'CITATION.cff').read_text()
    assert f'version: {fusion_notebooks.__version__}' in text and '2601.08151' in text
    assert (
        'Apache License' in (ROOT / 'LICENSE').read_text()
        and 'END OF TERMS AND CONDITIONS' in (ROOT / 'LICENSE').read_text()
    )


PACKAGE = ROOT / 'fusion_notebooks'
NUMBERS = {p.stem[3:]: int(p.stem[:2]) for p in (ROOT / 'nbs').iterdir() if p.stem[:2].isdigit()}


def imported(path):
    "Packages of ours that a module imports, anywhere in it: absolute, relative and inside functions"
    here = ('fusion_notebooks', *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split('.')
                if parts[0] == 'fusion_notebooks' and len(parts) > 1:
                    yield parts[1]
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            parts = [*base, *(node.module or '').split('.')] if node.module else [*base]
            if parts[:1] == ['fusion_notebooks']:
                yield from parts[1:2] or [alias.name for alias in node.names]


def test_the_import_check_sees_every_form(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), 'PACKAGE', tmp_path)
    (tmp_path / 'hooks').mkdir()
    room = tmp_path / 'hooks/edits.py'
    for line, want in (
        ('from ..study.runs import run', ['study']),
        ('from .. import cli, plots', ['cli', 'plots']),
        ('from .recording import capture', ['hooks']),
        ('def f():\n    from fusion_notebooks.demo import fit', ['demo']),
        ('import fusion_notebooks.vqa.files', ['vqa']),
        ('import numpy', []),
    ):
        room.write_text(line)
        assert list(imported(room)) == want


def test_no_package_imports_a_higher_number():
    modules = [p for p in sorted(PACKAGE.rglob('[a-z]*.py'))]
    assert len(modules) > 45 and {p.relative_to(PACKAGE).with_suffix('').parts[0] for p in modules} == {*NUMBERS}
    for path in modules:
        own = NUMBERS[path.relative_to(PACKAGE).with_suffix('').parts[0]]
        for used in imported(path):
            assert NUMBERS.get(used, 0) <= own, f'{path.relative_to(PACKAGE)} imports {used}'


def test_rooms_of_a_package_form_no_circle():
    "Within a package every room imports earlier ones only, in the order in which the package loads them"
    for init in sorted(PACKAGE.glob('*/__init__.py')):
        loaded = re.findall(r'^from \.(\w+) import', init.read_text(), re.M)
        assert sorted(loaded) == sorted(p.stem for p in init.parent.glob('[a-z]*.py')), init.parent.name
        for k, room in enumerate(loaded):
            code = (init.parent / f'{room}.py').read_text()
            for used in re.findall(r'^from \.(\w+) import', code, re.M):
                assert used in loaded[:k], f'{init.parent.name}.{room} imports {used}'


@pytest.mark.parametrize('name', ['core', 'fusion', 'vqa', 'metrics', 'results', 'plots', 'study', 'publish'])
def test_rooms_without_torch(name):
    import sys

    code = f'import sys, fusion_notebooks.{name}; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_command_line_answers_without_torch():
    import sys

    code = 'import sys\nfrom fusion_notebooks.cli import main\ntry: main(["--help"])\nexcept SystemExit: sys.exit("torch" in sys.modules or "pandas" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.parent.name == 'analyses'], ids=lambda p: p.stem)
def test_parameters_tag_survives_cleaning(path, tmp_path, monkeypatch):
    import papermill as pm
    from nbdev.clean import nbdev_clean

    shutil.copy(ROOT / 'pyproject.toml', tmp_path)
    shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert {'settings', 'quick'} <= (known := set(pm.inspect_notebook(path.name))) and {'model', 'models'} & known
        nbdev_clean(path.name)


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.stem != 'index'], ids=lambda p: p.stem)
def test_imports_stand_alone(path):
    "An import shares its cell with nothing else; the README's lines are pasted as one"
    for cell in json.loads(path.read_text())['cells']:
        if cell['cell_type'] != 'code' or ''.join(cell['source']).startswith('%%'):
            continue
        text = re.sub(r'^(\s*)[!%].*', r'\1pass', ''.join(cell['source']), flags=re.M)  # commands of Jupyter
        body = [node for node in ast.parse(text).body if not isinstance(node, ast.Pass)]
        imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not imports or len(imports) == len(body), f'{path.name}: {text[:80]}'


def test_settings_hold_the_study():
    ini = configparser.ConfigParser(default_section='', interpolation=None)
    ini.read(ROOT / 'settings.ini')
    assert set(ini.sections()) == {'DEFAULT', 'study', 'limits', 'quick'}


def test_workflows_run_what_the_readme_says():
    "The systems and versions that are promised, with commands that the Makefile has"
    import yaml

    makefile, readme = (ROOT / 'Makefile').read_text(), (ROOT / 'README.md').read_text()
    ci, docs = (yaml.safe_load((ROOT / f'.github/workflows/{name}.yml').read_text()) for name in ('ci', 'docs'))
    assert ci['jobs']['test']['strategy']['matrix'] == dict(
        os=['ubuntu-latest', 'macos-latest'], python=['3.11', '3.12', '3.13']
    )
    runs = {
        name: [s['run'] for job in w['jobs'].values() for s in job['steps'] if 'run' in s]
        for name, w in dict(ci=ci, docs=docs).items()
    }
    assert (
        any(r.startswith('make test ') for r in runs['ci'])
        and 'make test ' in readme
        and any(r.startswith('make docs ') for r in runs['docs'])
    )
    for target in {t for r in sum(runs.values(), []) for t in re.findall(r'make ([\w./-]+)', r)}:
        assert re.search(rf'^{re.escape(target)}:', makefile, re.M), target
    publish = docs['jobs']['publish']
    assert (
        publish['needs'] == 'build'
        and 'refs/heads/main' in publish['if']
        and docs['permissions'] == ci['permissions'] == dict(contents='read')
    )
    text = (ROOT / 'CHANGELOG.md').read_text()
    assert f'## {fusion_notebooks.__version__}' in text and (ROOT / '.binder/postBuild').stat().st_mode & 0o100
