"What is published: the same tables after loading, nothing of this machine, pages on which others' words stay words, submissions of anybody scored or refused in a sentence"

import base64, http.server, json, re, subprocess, sys, threading
import huggingface_hub, numpy as np, pandas as pd, pyarrow as pa, pyarrow.parquet as pq, pytest, torch, yaml
from PIL import Image
from fusion_notebooks import publish
from fusion_notebooks.cli import main
from fusion_notebooks.core.errors import BadInput
from fusion_notebooks.mllm import MLLM
from fusion_notebooks.results import Store
from fusion_notebooks.study import read_settings
from fusion_notebooks.study.work_units import jobs, units

HOWS = ('zero', 'knockout')


def masking(ids, rng):
    rows = [dict(sample=i, layer=-1, how='none', scope='none', prediction='a', logp=0.0, score=1.0) for i in ids]
    for how in HOWS:
        for layer in range(4):
            right = 0.2 if layer < 2 else 0.95
            for i in ids:
                score = float(rng.random() < right)
                rows.append(
                    dict(sample=i, layer=layer, how=how, scope='single', prediction='a', logp=-1.0, score=score)
                )
    return pd.DataFrame(rows).assign(path='plain')


def attention(ids, rng):
    "What crop-calibrated and mask-calibrated are measured by"
    return pd.DataFrame(
        [
            dict(sample=i, layer=k, map=[0.25] * 4, held=[0.2] * (k + 1), depends=0.1 * k, mass=0.5, chance=0.06)
            for i in ids
            for k in range(4)
        ]
    )


def early_exit(ids, rng):
    return pd.DataFrame(
        [dict(sample=i, layer=k, prediction='a', logp=0.0, score=float(k > 1)) for i in ids for k in range(4)]
    )


def refine(ids, rng):
    cost = dict(lenient=1.0, forwards=2, flops=6e8, seconds=0.1, hit=np.nan, why='')
    rows = [
        dict(sample=i, method=m, prediction='a', score=float(rng.random() < 0.8)) | cost
        for i in ids
        for m in ('base', 'crop')
    ]
    rows[0]['why'] = 'No picture at /home/ann/pictures 2/x.png on node7, asked by ann.'
    return pd.DataFrame(rows)


ROWS = dict(masking=masking, attention=attention, early_exit=early_exit, refine=refine)


def computed(s):
    "A study whose rows are invented"
    rng = np.random.default_rng(0)
    for job in jobs(s):
        for key in units(job, s):
            rows = ROWS[job.analysis](key['samples'], rng).assign(
                kind='fine', dtype='float32', attention='sdpa', device='cpu', commit=''
            )
            Store(s.results).add(rows, key)
    for name in ('masking', 'refine-examples'):
        (s.figures / 'glyph-llava/mine').mkdir(parents=True, exist_ok=True)
        for place in ('glyph-llava', 'glyph-llava/mine'):
            Image.new('RGB', (20, 20), 'red').save(s.figures / place / f'{name}.png')
    (s.figures / 'glyph-llava/card.html').write_text('<p>card of glyph-llava</p>')
    (s.figures / 'glyph-llava/masking.json').write_text('{"made": "/home/ann/run"}')
    return s


INI = """[study]
models = glyph-llava
benchmarks = glyph mine
analyses = masking early_exit refine
unit = 4
[limits]
calibration = 1
evaluation = 3
[benchmark mine]
file = mine.csv
share = 0.5
"""


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp('study')
    (root / 'settings.ini').write_text(INI)
    lines = ['image,question,answer']
    for k in range(4):
        Image.new('RGB', (60, 60), (k, 2 * k, 90)).save(root / f'{k}.png')
        lines.append(f'{k}.png,What number is it?,{k}')
    (root / 'mine.csv').write_text('\n'.join(lines) + '\n')
    return computed(read_settings(root / 'settings.ini'))


@pytest.fixture(autouse=True)
def somebody(monkeypatch):
    monkeypatch.setattr('getpass.getuser', lambda: 'ann')
    monkeypatch.setattr('socket.gethostname', lambda: 'node7')


@pytest.fixture(scope='module')
def published(study, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr('getpass.getuser', lambda: 'ann')
    patch.setattr('socket.gethostname', lambda: 'node7')
    made = publish.publish(tmp_path_factory.mktemp('out') / 'repository', study)
    patch.undo()
    return made


def test_the_rows_are_those_of_the_store(study, published):
    store = Store(study.results)
    for analysis in ROWS:
        for f in [f for f in published.files if f.config == analysis]:
            got = pq.read_table(published.folder / f.name).to_pandas()
            want = store.read(analysis=analysis, split=f.split, dataset='glyph')
            by = [c for c in ('sample', 'how', 'layer', 'method') if c in got]
            got, want = (
                t.sort_values(by).reset_index(drop=True).drop(columns='why', errors='ignore') for t in (got, want)
            )
            pd.testing.assert_frame_equal(got[want.columns], want, check_dtype=False)
            assert len(got) == f.rows > 0
    assert {f.config for f in published.files} == {*ROWS, 'findings', 'methods'}


def test_nothing_tells_of_the_machine(study, published):
    assert 'node7, asked by ann' in ' '.join(Store(study.results).read(analysis='refine').why)
    for file in published.folder.rglob('*'):
        if file.is_file() and file.suffix != '.parquet':
            text = file.read_bytes()
            for word in (b'/home/', b'node7', str(study.root).encode()):
                assert word not in text, (file.name, word)
    for f in published.files:
        text = pq.read_table(published.folder / f.name).to_pandas().astype(str).to_string()
        assert not re.search('/home/|node7|\\bann\\b', text)
    why = pq.read_table(published.folder / 'data/refine/evaluation.parquet')['why'].to_pylist()
    assert 'No picture at [path] on [host], asked by [user].' in why
    said = ' '.join(published.left_out)
    for part in (
        '3 × path, 3 × host, 3 × user in the column why of refine',
        '1 × path in',
        'mine, a table of your own',
    ):
        assert part in said, part


def test_own_tables_and_pictures_stay_at_home(study, published, tmp_path):
    assert not (published.folder / 'figures/glyph-llava/mine/refine-examples.png').exists()
    assert (published.folder / 'figures/glyph-llava/mine/masking.png').exists()
    assert (published.folder / 'figures/glyph-llava/refine-examples.png').exists()  # drawn from a seed
    rows = pq.read_table(published.folder / 'data/refine/evaluation.parquet').to_pandas()
    assert {*rows.dataset} == {'glyph'}
    found = pq.read_table(published.folder / 'data/findings/evaluation.parquet').to_pandas()
    assert {*found.dataset} == {'glyph', 'mine'}
    with_own = publish.publish(tmp_path / 'own', study, own_rows=True)
    rows = pq.read_table(with_own.folder / 'data/refine/evaluation.parquet').to_pandas()
    assert {*rows.dataset} == {'glyph', 'mine'}


def test_a_host_called_like_a_model_changes_no_rows(study, published, tmp_path, monkeypatch):
    monkeypatch.setattr('socket.gethostname', lambda: 'glyph-llava')
    other = publish.publish(tmp_path / 'out', study)
    name = 'data/masking/evaluation.parquet'
    assert pq.read_table(other.folder / name).equals(pq.read_table(published.folder / name))


def test_published_again_or_not_at_all(study, published, tmp_path, monkeypatch):
    folder = tmp_path / 'out'
    first = publish.publish(folder, study)
    assert publish.changed_files(folder) == [] and first.files == publish.publish(folder, study).files
    (folder / 'notes.txt').write_text('mine')
    with pytest.raises(BadInput, match='did not write'):
        publish.publish(folder, study)
    monkeypatch.setattr(publish.repositories, 'card_text', lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        publish.publish(tmp_path / 'new', study)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out']


def test_loads_with_datasets(published, tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets', reason='datasets is not installed: make .venv/installed')
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
    folder = str(published.folder)
    assert {*datasets.get_dataset_config_names(folder)} == {f.config for f in published.files}
    assert len(datasets.load_dataset(folder, split='evaluation', cache_dir=str(tmp_path))) > 0  # findings
    for f in published.files:
        got = datasets.load_dataset(folder, f.config, split=f.split, cache_dir=str(tmp_path)).to_pandas()
        want = pq.read_table(published.folder / f.name).to_pandas()
        pd.testing.assert_frame_equal(got, want, check_dtype=False)


def test_croissant_is_valid_and_finds_the_rows(published):
    croissant = pytest.importorskip('mlcroissant', reason='mlcroissant is not installed: make .venv/installed')
    made = croissant.Dataset(jsonld=str(published.folder / 'croissant.json'))
    assert not made.metadata.issues.errors
    for f in published.files:
        name = f'{f.config}-{f.split}'
        rows = [r for r in made.records(name)]
        want = pq.read_table(published.folder / f.name).to_pandas()
        column = 'n' if f.config in ('findings', 'methods') else 'seed'
        assert [r[f'{name}/{column}'] for r in rows] == want[column].tolist()


class Hub(http.server.BaseHTTPRequestHandler):
    "As much of the Hub as an upload needs"

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        self.server.asked.append((self.path, self.headers['Authorization']))
        if self.path == '/api/repos/create':
            self.server.created.append(json.loads(body))
            self.answer(dict(url=f'{self.server.address}/datasets/org/name'))
        elif '/preupload/' in self.path:
            files = json.loads(body)['files']
            self.answer(dict(files=[dict(path=f['path'], uploadMode='regular', shouldIgnore=False) for f in files]))
        elif '/commit/' in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                if line['key'] == 'file':
                    self.server.files[line['value']['path']] = base64.b64decode(line['value']['content'])
            self.answer(
                dict(commitUrl=f'{self.server.address}/datasets/org/name/commit/1', commitOid='1', success=True)
            )
        else:
            self.answer(dict())

    def do_GET(self):
        self.server.asked.append((self.path, self.headers['Authorization']))
        self.answer(dict(id='org/name', sha='0', siblings=[], gitalyUid='0', private=True))

    def log_message(self, *a):
        pass


@pytest.fixture
def hub():
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub) as server:
        server.files, server.created, server.asked = {}, [], []
        server.address = f'http://127.0.0.1:{server.server_port}'
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_upload_brings_every_file(published, hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    token = 'hf_' + 20 * 'x'
    assert publish.upload(published.folder, 'org/name', endpoint=hub.address, token=token).endswith(
        '/datasets/org/name'
    )
    want = {
        f.relative_to(published.folder).as_posix(): f.read_bytes() for f in published.folder.rglob('*') if f.is_file()
    }
    assert hub.files == want and 'private' in json.dumps(hub.created[0]) and hub.created[0]['type'] == 'dataset'
    assert all(said == f'Bearer {token}' for _, said in hub.asked)


def test_nothing_is_uploaded_that_changed_or_without_network(published, study, hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    folder = publish.publish(tmp_path / 'out', study).folder
    (folder / 'README.md').write_text('now it says /home/ann')
    with pytest.raises(BadInput, match='README.md is not as it was published'):
        publish.upload(folder, 'org/name', endpoint=hub.address, token='x')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(BadInput, match='HF_HUB_OFFLINE'):
        publish.upload(published.folder, 'org/name', endpoint=hub.address, token='x')
    assert not hub.asked


def test_an_analysis_of_ones_own_is_described():
    file = publish.descriptions.TableFile(
        'mine', 'evaluation', 'data/mine/evaluation.parquet', pa.schema([('n', pa.int64())]), 2, ''
    )
    other = file._replace(config='masking')
    card = publish.descriptions.card_text([file, other], 't', 'other', [], '', ['nothing'])
    assert card.index('`masking`') < card.index('`mine`') and 'analysis of our own' in card
    assert 'analysis of our own' in json.dumps(publish.descriptions.croissant([file], 't', 'other', '2026-01-01', '1'))


def test_community_evaluations_are_written_when_they_are_asked_for(study, published, tmp_path, capsys):
    "As docs/hub/eval-results.md of huggingface/hub-docs says; a table of one's own is no task, a demo model has no repository"
    assert not (published.folder / 'eval.yaml').exists()
    args = ['publish', str(tmp_path / 'out'), '--settings', str(study.file)]
    assert main([*args, '--evaluations', 'org/name']) == 0
    assert 'results of glyph-llava for its repository on the Hub' in capsys.readouterr().out
    said = yaml.safe_load((tmp_path / 'out/eval.yaml').read_text())
    assert {*said} == {'name', 'description', 'evaluation_framework', 'tasks'}
    assert said['tasks'] == [dict(id='glyph', config='findings', split='evaluation')]
    assert (tmp_path / 'out/data/findings/evaluation.parquet').is_file()
    assert publish.changed_files(tmp_path / 'out') == []
    (tmp_path / 'out/eval.yaml').write_text('name: another')
    assert publish.changed_files(tmp_path / 'out') == ['eval.yaml']
    assert main([*args, '--evaluations', 'name']) == 2 and 'give ORG/NAME' in capsys.readouterr().err
    assert main([*args, '--evaluations', 'org/a', '--upload', 'org/b']) == 2
    assert 'they are the same dataset' in capsys.readouterr().err


def test_the_results_of_a_model_of_the_hub_are_those_of_its_rows(study, tmp_path):
    "What the file for its repository says, read by the Hub's own library, against the rows"
    found = publish.repositories._found_out(study)[0].replace(dict(model={'glyph-llava': 'llava-hf/llava'}))
    answers = publish.plain_answers(found, ['mine'])
    assert publish.write_evaluations(tmp_path, answers, 'org/name', 'A study', '2026-12-01') == []
    text = (tmp_path / 'evaluations/llava-hf/llava/.eval_results/org--name.yaml').read_text()
    (entry,) = huggingface_hub.parse_eval_result_entries(yaml.safe_load(text))
    rows = Store(study.results).read(analysis='masking', split='evaluation', dataset='glyph')
    plain = rows[rows.how == 'none']
    assert entry.value == round(100 * plain.score.mean(), 2) and entry.notes.startswith(f'{len(plain)} questions')
    assert (entry.dataset_id, entry.task_id) == ('org/name', 'glyph')


def test_publish_from_the_shell(study, tmp_path, capsys):
    assert main(['publish', str(tmp_path / 'out'), '--settings', str(study.file), '--license', 'apache-2.0']) == 0
    said = capsys.readouterr().out
    assert 'left out' in said and 'hf upload ORG/NAME' in said
    assert 'license: apache-2.0' in (tmp_path / 'out/README.md').read_text()
    assert main(['gallery', str(tmp_path / 'out'), '--out', str(tmp_path / 'page'), '--reference']) == 0
    page = (tmp_path / 'page/index.html').read_text()
    assert 'glyph-llava' in page and 'LLaVA-1.5-7B' in page and '<polyline' in page
    assert main(['publish', str(tmp_path), '--settings', str(study.file)]) == 2


# The gallery

HOSTILE = '"><img src=x onerror=alert(1)><script>alert(1)</script>'


def hostile_folder(folder):
    "A published folder of somebody who means harm"
    (folder / 'data/findings').mkdir(parents=True)
    line = dict(value=0.5, low=0.4, high=0.6, p=0.01, n=20, model=HOSTILE, dataset=HOSTILE)
    found = [
        dict(analysis='masking', finding='base', kind='all', layers=None) | line,
        dict(analysis='masking', finding='fusion layers', kind=HOSTILE, layers='2') | line,
        dict(analysis='refine', finding=f'{HOSTILE} − base', kind='all', layers=None) | line,
    ]
    pd.DataFrame(found).to_parquet(folder / 'data/findings/evaluation.parquet')
    (folder / 'provenance.json').write_text(json.dumps(dict(models=[dict(model=HOSTILE, dataset=HOSTILE, layers=4)])))
    return folder


def test_words_of_others_stay_words(tmp_path):
    page = publish.gallery([hostile_folder(tmp_path / 'theirs')], tmp_path / 'out').read_text()
    assert '<img' not in page and page.count('<script') == 1 and '&lt;script&gt;' in page


@pytest.mark.parametrize(
    'name, text, said',
    [
        ('provenance.json', '[]', 'no JSON object|names no models'),
        ('provenance.json', '{"models": [{"model": "m"}]}', 'names no models'),
        ('provenance.json', '{', 'is not JSON'),
        ('data/findings/evaluation.parquet', 'PAR1', 'cannot be read as Parquet'),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, name, text, said):
    (hostile_folder(tmp_path / 'theirs') / name).write_text(text)
    with pytest.raises(BadInput, match=said):
        publish.gallery([tmp_path / 'theirs'], tmp_path / 'out')


@pytest.mark.parametrize(
    'about, finding, said',
    [
        (dict(model='m', layers=4), dict(finding='most attention on the evidence', layers='none'), 'names no layer'),
        (dict(model='m', layers=4), dict(finding='base', layers='none', n=float('inf')), 'no number of questions'),
        (dict(model=5000 * 'x', layers=4), dict(finding='base', layers='none'), 'is no name'),
        (dict(model='m', layers=10**400), dict(finding='base', layers='none'), ''),
    ],
)
def test_odd_findings_are_refused_or_left_out(tmp_path, about, finding, said):
    (tmp_path / 'theirs/data/findings').mkdir(parents=True)
    about = about | dict(dataset='d')
    line = dict(analysis='attention', kind='all', value=0.5, low=0.4, high=0.6, p=0.01, n=20.0)
    line |= dict(model=about['model'], dataset='d') | finding
    pd.DataFrame([line]).to_parquet(tmp_path / 'theirs/data/findings/evaluation.parquet')
    (tmp_path / 'theirs/provenance.json').write_text(json.dumps(dict(models=[about])))
    if not said:
        assert publish.published_entries(tmp_path / 'theirs')[0].layers is None
        return
    with pytest.raises(BadInput, match=said):
        publish.published_entries(tmp_path / 'theirs')


def test_a_card_outside_the_folder_is_not_read(tmp_path):
    folder = hostile_folder(tmp_path / 'theirs')
    (tmp_path / 'card.html').write_text('secret')
    (folder / 'figures').mkdir()
    (folder / 'provenance.json').write_text('{"models": [{"model": "../..", "dataset": "glyph"}]}')
    assert publish.published_entries(folder)[0].card == ''
    (folder / 'figures/m').symlink_to(tmp_path)
    (folder / 'provenance.json').write_text('{"models": [{"model": "m", "dataset": "glyph"}]}')
    assert publish.published_entries(folder)[0].card == ''


# The challenge


@pytest.fixture(scope='module')
def challenge(tmp_path_factory):
    return publish.make_challenge(tmp_path_factory.mktemp('challenge') / 'it', 5, ['planted-2-6'], 40)


def test_a_challenge_holds_no_answers(challenge):
    asked = publish.questions_of(5, 40)
    table = pd.read_csv(challenge / 'questions.csv')
    assert [*table.columns] == ['model', 'question', 'image', 'prompt'] and len(table) == 40
    for k, s in asked.items():
        prompt = table.set_index('question').prompt[k]
        assert s.question in prompt and prompt.endswith('ASSISTANT:')
        assert not {*Image.open(challenge / f'images/{k}.png').info} - {'srgb', 'gamma', 'dpi'}
    text = ' '.join(f.read_text() for f in challenge.glob('*.*'))
    assert 'evaluation-' not in text and 'seed = 5' not in text
    others = publish.questions_of(6, 40)
    assert [s.question for s in others.values()] != [s.question for s in asked.values()]


def test_the_loader_gives_the_same_model(challenge):
    "What runs a planted model in plain transformers, against this package's own way"
    code = '''import csv, sys, torch
from PIL import Image
from planted import load
model, processor = load('models/planted-2-6')
q = next(csv.DictReader(open('questions.csv')))
x = processor(images=Image.open(q['image']), text=q['prompt'], return_tensors='pt')
with torch.inference_mode():
    torch.save(model(**x).logits, 'logits.pt')
assert not any(name.startswith('fusion_notebooks') for name in sys.modules)
'''
    subprocess.run([sys.executable, '-c', code], cwd=challenge, check=True, capture_output=True)
    mllm, s = MLLM.load('planted-2-6'), publish.questions_of(5, 1)['q000']
    with torch.inference_mode():
        want = mllm.model(**mllm.prompt(s.image, s.question).inputs).logits
    assert (torch.load(challenge / 'logits.pt') - want).abs().max() < 1e-5


def test_the_loader_knows_planted_noise(challenge):
    "Also models with sinks run in plain transformers, and answer as they do here"
    home = publish.challenges._planted_home('planted-noise')
    code = f'''import csv, torch
from PIL import Image
from planted import load
model, processor = load({str(home)!r})
assert model.gate.sinks
q = next(csv.DictReader(open('questions.csv')))
x = processor(images=Image.open(q['image']), text=q['prompt'], return_tensors='pt')
with torch.inference_mode():
    torch.save(model(**x).logits, 'noisy.pt')
'''
    subprocess.run([sys.executable, '-c', code], cwd=challenge, check=True, capture_output=True)
    mllm, s = MLLM.load('planted-noise'), publish.questions_of(5, 1)['q000']
    with torch.inference_mode():
        want = mllm.model(**mllm.prompt(s.image, s.question).inputs).logits
    assert (torch.load(challenge / 'noisy.pt') - want).abs().max() < 1e-5


def test_heads_that_read_are_those_of_the_gate():
    for name in publish.MODELS:
        gate = MLLM.load(name).gate
        want = [{h for h, kind in enumerate(gate.heads_at(i)) if kind == 'open'} for i in range(gate.n)]
        assert publish.planted_heads(publish.challenges._planted_home(name)) == want


def test_a_naive_loop_scores_what_it_should(challenge, tmp_path, capsys):
    "The example, which knows nothing of this package, on planted-2-6"
    subprocess.run([sys.executable, 'example.py'], cwd=challenge, check=True, capture_output=True)
    file = challenge / 'submission.csv'
    assert file.read_text().splitlines()[1:] == ['planted-2-6,layer,2,,,', 'planted-2-6,layer,6,,,']
    assert main(['challenge', 'score', str(file), '--seed', '5', '--out', str(tmp_path / 'table.csv')]) == 0
    table = pd.read_csv(tmp_path / 'table.csv').set_index('model')
    assert table.loc['planted-2-6', ['n', 'precision', 'recall', 'exact']].tolist() == [2, 1, 1, 1]
    assert table.loc['planted-3', 'recall'] == 0 and 'planted-2-6' in capsys.readouterr().out


HEAD = 'model,what,layer,head,question,map\n'


def test_a_submission_of_everything_on_heads_and_noise(tmp_path, capsys):
    "What is planted, named: the heads of planted-heads, the sinks of planted-noise"
    right = ['planted-heads,layer,3,,,', *(f'planted-heads,head,3,{h},,' for h in (0, 3))]
    right += [f'planted-noise,layer,{i},,,' for i in (2, 4, 6)]
    sinks = ' '.join('1' if k in (58, 59, 60) else '0' for k in range(64))
    (tmp_path / 'right.csv').write_text(HEAD + '\n'.join([*right, f'planted-noise,sinks,,,,{sinks}']) + '\n')
    wrong = [
        'planted-heads,head,3,1,,',
        'planted-heads,head,3,2,,',
        'planted-heads,head,5,0,,',
    ]  # decoys and a closed one
    flipped = sinks.translate(str.maketrans('01', '10'))
    (tmp_path / 'wrong.csv').write_text(HEAD + '\n'.join([*wrong, f'planted-noise,sinks,,,,{flipped}']) + '\n')
    files = [str(tmp_path / f'{name}.csv') for name in ('right', 'wrong')]
    models = ['planted-heads', 'planted-noise']
    assert (
        main(['challenge', 'score', *files, '--models', *models, '--seed', '3', '--out', str(tmp_path / 't.csv')]) == 0
    )
    table = pd.read_csv(tmp_path / 't.csv').set_index(['method', 'what', 'model'])
    for model in models:
        assert table.loc[('right', 'layers', model), ['precision', 'recall', 'exact']].tolist() == [1, 1, 1]
    assert table.loc[('right', 'heads', 'planted-heads'), ['n', 'precision', 'recall']].tolist() == [2, 1, 1]
    assert table.loc[('wrong', 'heads', 'planted-heads'), ['n', 'precision', 'recall']].tolist() == [3, 0, 0]
    found = table.xs('planted-noise', level='model')
    assert found.loc[('right', 'sinks'), ['pointing', 'auroc', 'mass']].tolist() == [1, 1, 1]
    assert found.loc[('wrong', 'sinks'), ['pointing', 'auroc', 'mass']].tolist() == [0, 0, 0]
    assert 'planted-3' not in capsys.readouterr().out


def test_sinks_are_those_of_the_gate():
    for name in publish.MODELS:
        sinks = MLLM.load(name).gate.sinks
        assert publish.planted_sinks(publish.challenges._planted_home(name)) == (sinks.cells if sinks else ())


def test_a_page_of_submissions_shows_their_names_as_text(tmp_path, capsys):
    name = '<img src=x onerror=alert(1)>'
    for place in ('a', 'b'):
        (tmp_path / place).mkdir()
        (tmp_path / place / f'{name}.csv').write_text(HEAD + 'planted-3,layer,3,,,\n')
    (tmp_path / 'plain.csv').write_text(HEAD + 'planted-2-6,layer,2,,,\n')
    files = [str(tmp_path / f) for f in (f'a/{name}.csv', f'b/{name}.csv', 'plain.csv')]
    assert main(['challenge', 'score', *files, '--page', str(tmp_path / 'new/table.html')]) == 0
    page = (tmp_path / 'new/table.html').read_text()
    assert '<img' not in page and page.count('<script') == 1 and '&lt;img src=x onerror=alert(1)&gt;' in page
    first = publish.known_entries()
    assert page.count('<tr data-words') == 3 * len(publish.MODELS) + (first.what == 'layers').sum()
    assert str(tmp_path / 'new/table.html') in capsys.readouterr().out


@pytest.mark.parametrize(
    'args, said',
    [
        (['right.csv', '--page', 'right.csv'], 'does not end in .html'),
        (['right.csv', 'right.csv'], 'given twice'),
        (['right.csv', 'wrong.csv'], 'wrong.csv: Line 2'),
        (['right.csv', '--models', 'glyph-llava'], "'glyph-llava' is no planted model"),
        (['sinks.csv', '--models', 'planted-3'], 'names nothing that is scored'),
    ],
)
def test_scoring_refuses_in_a_sentence(tmp_path, monkeypatch, args, said, capsys):
    monkeypatch.chdir(tmp_path)
    for name, line in dict(
        right='planted-3,layer,3,,,', wrong='planted-3,layer,8,,,', sinks='planted-3,sinks,,,,1 0 0 0'
    ).items():
        (tmp_path / f'{name}.csv').write_text(f'{HEAD}{line}\n')
    assert main(['challenge', 'score', *args, '--seed', '1']) == 2
    err = capsys.readouterr().err
    assert said in err and err.count('\n') == 1
    assert (tmp_path / 'right.csv').read_text() == f'{HEAD}planted-3,layer,3,,,\n'


@pytest.mark.parametrize(
    'text, said',
    [
        ('', 'its columns must be'),
        ('a;b;c\n', 'its columns must be'),
        (HEAD, 'names nothing'),
        (HEAD + 'planted-3,layer,8,,,\n', 'from 0 to 7'),
        (HEAD + 'planted-3,layer,-1,,,\n', 'is no layer'),
        (HEAD + 'planted-3,layer,٣,,,\n', 'is no layer'),
        (HEAD + 'planted-3,layer,1e0,,,\n', 'is no layer'),
        (HEAD + 'planted-3,head,1,6,,\n', 'is no head'),
        (HEAD + 'planted-3,layer,,,,\n', 'needs layer'),
        (HEAD + 'planted-3,layer,3,,q000,\n', 'has no question'),
        (HEAD + 'planted-3,neuron,3,,,\n', 'nothing that is scored'),
        (HEAD + '=cmd(),layer,3,,,\n', 'no model'),
        (HEAD + 'planted-3,layer,3,,\n', '5 cells, not 6'),
        (HEAD + 'planted-3,layer,3,,,\nplanted-3,layer,3,,,\n', 'named twice'),
        (HEAD + 'planted-noise,sinks,,,q000,1 2 3 4\n', 'has no question'),
        (HEAD + 'planted-noise,sinks,,,,1 2 3\n', 'no square'),
        (HEAD + 2 * 'planted-noise,sinks,,,,1 2 3 4\n', 'named twice'),
        (HEAD + 'planted-3,map,,,q999,1 2 3 4\n', 'no question'),
        (HEAD + 'planted-3,map,,,q000,nan 1 1 1\n', 'no number of a map'),
        (HEAD + 'planted-3,map,,,q000,1e999 1 1 1\n', 'no number of a map'),
        (HEAD + 'planted-3,map,,,q000,1 2 3\n', 'no square'),
        (HEAD + 'planted-3,map,,,q000,1 2 3 4\n', 'have no map'),
        (HEAD + 'planted-3,layer,"3,,,\n', 'no CSV file'),
        (HEAD + 'planted-3,layer,3' + 200_000 * ' ' + ',,,\n', 'Line 2|no CSV file'),
        (HEAD + 'planted-3,layer,3,,,\0\n', 'Line|no CSV file'),
        (b'\xff\xfe' + HEAD.encode('utf-16-le'), 'no CSV file'),
    ],
)
def test_a_hostile_submission_is_refused_in_a_sentence(tmp_path, text, said, capsys):
    file = tmp_path / 'submission.csv'
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(['challenge', 'score', str(file), '--seed', '1']) == 2
    err = capsys.readouterr().err
    assert re.search(said, err) and err.count('\n') == 1 and len(err) < 400


def test_maps_are_scored_where_the_evidence_is(tmp_path):
    asked = publish.questions_of(2, 8)
    there, elsewhere = {}, {}
    for k, s in asked.items():
        share = publish.challenges._cell_boxes(8, s.image.size)
        inside = (
            (share[:, 0] < s.box[2]) & (share[:, 2] > s.box[0]) & (share[:, 1] < s.box[3]) & (share[:, 3] > s.box[1])
        )
        there[k] = inside.reshape(8, 8).astype(float)
        elsewhere[k] = 1 - there[k]
    good, bad = (publish.score(publish.Submission(maps={'planted-3': m}), asked).iloc[0] for m in (there, elsewhere))
    assert good.pointing == 1 and good.auroc > 0.9 and bad.pointing == 0 and bad.auroc < 0.1
    assert bad.mass < good.chance < good.mass


def test_the_first_entries_are_there_for_every_model():
    table = publish.known_entries()
    assert {*table.model} == {*publish.MODELS} and {*table.what} == {'layers', 'heads', 'maps', 'sinks'}
    assert {*table[table.what == 'sinks'].model} == {'planted-noise'}
    layers = table[(table.what == 'layers') & (table.method == 'swap, rises and drops')]
    assert layers.exact.mean() == 1
