"What a release rests on: versions that agree, workflows whose actions cannot move, forms that ask for what is needed"

import importlib.util, re, shutil, subprocess, sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
import pytest, yaml
import fusion_notebooks

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / '.github/workflows').glob('*.yml'))


@pytest.fixture
def release():
    loader = SourceFileLoader('release', str(ROOT / '.ci/release'))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader('release', loader))
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    loader.exec_module(module)
    sys.dont_write_bytecode = written
    return module


@pytest.fixture
def tree(tmp_path):
    "The files that say the version"
    for name in ('pyproject.toml', 'settings.ini', 'fusion_notebooks/__init__.py', 'CITATION.cff', 'CHANGELOG.md'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def dated(tree, date):
    text, version = (tree / 'CHANGELOG.md').read_text(), fusion_notebooks.__version__
    (tree / 'CHANGELOG.md').write_text(
        re.sub(rf'^## {re.escape(version)}.*$', f'## {version} ({date})', text, flags=re.M)
    )


def test_versions_agree(release, tree):
    assert release.wrong(ROOT) == [] and {*release.versions(ROOT).values()} == {fusion_notebooks.__version__}
    dated(tree, '2020-01-01')
    assert release.wrong(tree, f'v{fusion_notebooks.__version__}') == []


@pytest.mark.parametrize(
    'file, old, new, said',
    [
        ('CITATION.cff', 'version: 0', 'version: 9', 'CITATION.cff says 9'),
        ('settings.ini', '\nversion = 0', '\nversion = 9', 'settings.ini says 9'),
        ('CHANGELOG.md', f'## {fusion_notebooks.__version__}', '## 9.9.9', 'no section'),
    ],
)
def test_a_version_that_differs_is_said(release, tree, file, old, new, said):
    text = (tree / file).read_text()
    assert old in text
    (tree / file).write_text(text.replace(old, new))
    assert said in ' '.join(release.wrong(tree))


def test_a_tag_or_a_date_that_does_not_fit_is_said(release, tree):
    assert 'has to be' in ' '.join(release.wrong(tree, 'v9.9.9'))
    for date in ('not yet released', '2999-01-01'):
        dated(tree, date)
        assert 'no date that has come' in ' '.join(release.wrong(tree, f'v{fusion_notebooks.__version__}'))


@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda p: p.stem)
def test_actions_are_pinned_by_hash(path):
    used = re.findall(r'uses: (.+)', path.read_text())
    assert used and all(re.fullmatch(r'[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*', u) for u in used), used


def test_what_is_published_is_what_passed():
    flow = yaml.safe_load((ROOT / '.github/workflows/release.yml').read_text())
    build, publish = flow['jobs']['build'], flow['jobs']['publish']
    runs = [s['run'] for s in build['steps'] if 'run' in s]
    assert runs == ['.ci/release "$GITHUB_REF_NAME"', '.ci/wheel'] and flow['permissions'] == dict(contents='read')
    assert [s.get('env') for s in build['steps'] if s.get('run') == '.ci/wheel'] == [dict(DIST='dist')]
    assert publish['needs'] == 'build' and publish['permissions'] == {'id-token': 'write'}
    assert '"$DIST"' in (ROOT / '.ci/wheel').read_text() and '\n.ci/wheel' in (ROOT / '.ci/run').read_text()


def test_forms_ask_for_what_is_needed():
    forms = {p.stem: yaml.safe_load(p.read_text()) for p in (ROOT / '.github/ISSUE_TEMPLATE').glob('*.yml')}
    needed = {
        name: {f['id'] for f in form['body'] if f.get('validations', {}).get('required')}
        for name, form in forms.items()
        if name != 'config'
    }
    assert needed == dict(
        model={'model', 'report', 'versions'}, wrong={'done', 'came', 'versions'}, entry={'where', 'what'}
    )
    assert 'fusion doctor' in str(forms['model'])


def tool(name):
    "A command beside this Python, or on the path"
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


CHECKS = [
    ('vendor.github-workflows', WORKFLOWS),
    ('vendor.dependabot', [ROOT / '.github/dependabot.yml']),
    ('vendor.github-issue-forms', [p for p in (ROOT / '.github/ISSUE_TEMPLATE').glob('*.yml') if p.stem != 'config']),
]


@pytest.mark.parametrize('schema, files', CHECKS, ids=[c[0] for c in CHECKS])
def test_schemas(schema, files):
    command = tool('check-jsonschema')
    if not command:
        pytest.skip('check-jsonschema is not installed')
    done = subprocess.run([command, '--builtin-schema', schema, *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_zizmor_finds_nothing():
    command = tool('zizmor')
    if not command:
        pytest.skip('zizmor is not installed')
    done = subprocess.run([command, '--offline', str(ROOT / '.github')], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_paper_cites_what_its_bibliography_holds():
    text, bib = (ROOT / 'paper.md').read_text(), (ROOT / 'paper.bib').read_text()
    cited = {*re.findall(r'@(\w+\d{4}\w+)', text)}
    assert cited == {*re.findall(r'^@\w+\{(\w+),', bib, re.M)}
    for part in ('# Summary', '# Statement of need', '# State of the field', '# References', 'bibliography: paper.bib'):
        assert part in text
