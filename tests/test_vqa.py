"Benchmarks: official files of our own making travel the whole path, from disk and from a Hub that is counted; whatever is wrong is said with file and row"

import json, random, shutil, subprocess, sys, types
from dataclasses import replace
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from fusion_notebooks import core, metrics, vqa

ROOT = Path(__file__).parent / 'fixtures/vqa'
NAMES = list(vqa.BENCHMARKS)
SIZES = dict(gqa=12, vqav2=12, okvqa=12, vizwiz=6, textvqa=12, docvqa=12, mmbench=14, pope=36)


@pytest.fixture
def root(tmp_path):
    "A copy of the fixtures to damage"
    shutil.copytree(ROOT, tmp_path / 'vqa')
    return tmp_path / 'vqa'


def ids(samples):
    return [s.id for s in samples]


def test_no_torch():
    assert (
        subprocess.run(
            [sys.executable, '-c', 'import sys, fusion_notebooks.vqa; sys.exit("torch" in sys.modules)']
        ).returncode
        == 0
    )


def test_the_eight():
    assert NAMES == ['gqa', 'vqav2', 'okvqa', 'vizwiz', 'textvqa', 'docvqa', 'mmbench', 'pope']
    for b in vqa.BENCHMARKS.values():
        assert b.metric in metrics.METRICS and len(b.revision) == 40 and b.hub and b.files and b.splits
        assert (
            b.suffix.startswith('\nAnswer with the option')
            if b.circular
            else b.suffix.endswith('single word or phrase.')
        )


@pytest.mark.parametrize('name', NAMES)
def test_whole_path(name):
    from fusion_notebooks.mllm import open_image

    b, parts = (
        vqa.BENCHMARKS[name],
        {split: vqa.load(name, split, root=ROOT) for split in ('calibration', 'evaluation')},
    )
    samples = [s for part in parts.values() for s in part]
    assert len(samples) == len(set(ids(samples))) == SIZES[name] and sorted(ids(samples)) == sorted(
        ids(vqa.load(name, 'all', root=ROOT))
    )
    assert not {s.picture for s in parts['calibration']} & {s.picture for s in parts['evaluation']}
    for s in samples:
        assert (
            min(open_image(s.image).size) >= 20
            and s.question.endswith(b.suffix)
            and s.prompt.endswith(b.suffix)
            and s.source.split(',')[0] in str([*(ROOT / name).iterdir()])
        )
    answers = [s.answers for s in samples]
    right = metrics.score(b.metric, [a[0] for a in answers], answers)
    wrong = metrics.score(b.metric, [{'yes': 'no', 'no': 'yes'}.get(a[0], 'xyzzy') for a in answers], answers)
    assert right.tolist() == [1] * len(samples) and wrong.tolist() == [0] * len(samples)


def test_ids_stay_what_they_are():
    "What a store holds is found by these ids: change them knowingly"
    first = {name: vqa.load(name, root=ROOT, limit=1)[0].id for name in NAMES}
    assert first == dict(
        gqa='gqa-200001',
        vqav2='vqav2-1000000',
        okvqa='okvqa-10000',
        vizwiz='vizwiz-VizWiz_val_00000000',
        textvqa='textvqa-34604',
        docvqa='docvqa-49000',
        mmbench='mmbench-241.0',
        pope='pope-random-1',
    )
    assert vqa.part('n100') == 'evaluation' and np.mean(
        [vqa.part(str(i)) == 'calibration' for i in range(5000)]
    ) == pytest.approx(0.2, abs=0.02)
    assert (
        {vqa.part(str(i), share) for i in range(99) for share in (0, 1)} == {'evaluation', 'calibration'}
        and vqa.part('x', 1) == 'calibration'
        and vqa.part('x', 0) == 'evaluation'
    )


def test_a_coco_picture_is_on_one_side_in_every_benchmark():
    sides = [
        {s.picture for n in ('vqav2', 'okvqa', 'pope') for s in vqa.load(n, split, root=ROOT)}
        for split in ('calibration', 'evaluation')
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_order_and_limit():
    load = lambda **kw: ids(vqa.load('pope', root=ROOT, **kw))
    first, drawn = load(), load(order='random')
    assert (
        load(limit=5) == first[:5] and load(limit=5, order='random') == drawn[:5] and len(load(limit=99)) == len(first)
    )
    assert (
        first != drawn != load(order='random', seed=1)
        and sorted(first) == sorted(drawn)
        and drawn == load(order='random')
    )
    assert len({i.split('-')[1] for i in drawn[:12]}) == 3  # not one file after the other


def test_mmbench_keeps_rotations_together(root):
    samples = vqa.load('mmbench', 'all', limit=2, root=ROOT)
    assert ids(samples) == [
        'mmbench-241.0',
        'mmbench-241.1',
        'mmbench-241.2',
        'mmbench-242.0',
        'mmbench-242.1',
        'mmbench-242.2',
        'mmbench-242.3',
    ]
    assert len({s.picture for s in samples}) == 2 and len({(s.answers[0], s.question) for s in samples[3:]}) == 4
    assert samples[3].question.startswith('A plain card.\nIt has one color.\nWhat color is this?\nA. ') and samples[
        0
    ].question.startswith('What color is this?\nA. red\nB. green\nC. blue\nAnswer with')
    said = [s.answers[0] if s.group == 'mmbench-241' else 'A' for s in samples]
    assert metrics.circular(
        metrics.score('mmbench', said, [s.answers for s in samples]), [s.group for s in samples]
    ).to_dict() == {'mmbench-241': 1, 'mmbench-242': 0}
    drawn = vqa.load('mmbench', 'all', order='random', root=ROOT)
    assert [g for i, g in enumerate(s.group for s in drawn) if not i or drawn[i - 1].group != g] == list(
        dict.fromkeys(s.group for s in drawn)
    )


def test_prompts_of_families():
    ask = lambda name, family: vqa.load(name, 'all', limit=2, root=ROOT, family=family)[-1]
    assert (
        ask('gqa', 'qwen2_5_vl').question
        == 'Is the wall red?\nPlease try to answer the question with short words or phrases if possible.'
    )
    assert ask('pope', 'qwen2_vl').question == 'Is there a snowboard in the image? Please answer yes or no.'
    assert (
        ask('okvqa', 'instructblip').question == 'Question: Is this red? Short Answer:'
        and ask('okvqa', 'instructblip').prompt == 'Question: {question} Short Answer:'
    )
    assert ask('mmbench', 'qwen2_vl').question.startswith(
        'Hint: A plain card.\nIt has one color.\nQuestion: What color is this?\nOptions:\nA. '
    )
    assert vqa.load('mmbench', 'all', limit=1, root=ROOT, family='qwen2_vl')[0].question.startswith(
        'Question: What color'
    )
    assert ask('textvqa', 'llava').question.startswith('What is the word on the sign?\n') and ask(
        'textvqa', 'llava'
    ) == ask('textvqa', '')


# --- the Hub


def hub_rows(name, part, root=ROOT):
    "The fixtures as the Hub copies have them: lists of answers, pictures as bytes, GQA's apart"
    b, data = vqa.BENCHMARKS[name], lambda path: {'bytes': path.read_bytes(), 'path': path.name}
    if part.endswith('_images'):
        return [dict(id=p.stem, image=data(p)) for p in sorted((root / 'gqa/images').iterdir(), reverse=True)]
    rows = []
    for _, stem, r, folder in vqa.files._file_rows(b, root / name, None):
        if name == 'pope' and part not in stem:
            continue
        if name == 'gqa':
            rows.append({k: v for k, v in r.items() if k != 'annotations'})  # an empty struct is no Parquet column
        elif name in ('vqav2', 'okvqa'):
            image = data(folder / f"COCO_val2014_{r['image_id']:012d}.jpg")
            rows.append(
                dict(
                    question_id=str(r['question_id']),
                    image=image,
                    question=r['question'],
                    question_type=r['question_type'],
                    answer_type=r['answer_type'],
                    **(
                        dict(answers=[a['answer'] for a in r['answers']])
                        if name == 'okvqa'
                        else dict(answers=r['answers'], image_id=r['image_id'])
                    ),
                )
            )
        elif name == 'vizwiz':
            rows.append(
                dict(
                    question_id=r['image'][:-4],
                    image=data(folder / r['image']),
                    question=r['question'],
                    answers=[a['answer'] for a in r['answers']],
                    category=r['answer_type'],
                )
            )
        elif name == 'textvqa':
            rows.append(r | dict(image=data(folder / f"{r['image_id']}.jpg")))
        elif name == 'docvqa':
            rows.append(r | dict(image=data(folder / r['image'])))
        elif name == 'mmbench':
            rows.append(
                r
                | dict(
                    index=int(r['index']),
                    hint=r['hint'] or 'nan',
                    D=r['D'] or 'nan',
                    image=dict(bytes=r['image'], path=None),
                )
            )
        elif name == 'pope':
            rows.append(
                dict(
                    id='0',
                    question_id=str(r['question_id']),
                    question=r['text'],
                    answer=r['label'],
                    image_source=r['image'][:-4],
                    image=data(folder / r['image']),
                    category=part,
                )
            )
    return rows


class Hub:
    "A `datasets` whose rows are counted"

    def __init__(self):
        self.asked, self.read, self.tables, self.broken = [], 0, {}, None

    class Image:
        def __init__(self, decode=True):
            self.decode = decode

    def load_dataset(self, hub, config=None, **kw):
        if self.broken:
            raise self.broken
        self.asked.append((hub, config, kw))
        hub_ = self

        class Stream:
            def __init__(self, rows, plain=False):
                self.rows, self.plain, self.features = (
                    rows,
                    plain,
                    {k: Hub.Image() if k == 'image' else None for k in rows[0]},
                )

            def cast_column(self, k, to):
                assert k == 'image' and not to.decode
                return Stream(self.rows, True)

            def skip(self, n):
                return Stream(self.rows[n:] or [{}], self.plain) if n < len(self.rows) else iter(())

            def __iter__(self):
                for r in self.rows:
                    assert self.plain or 'image' not in r
                    hub_.read += 1
                    yield dict(r)

        return Stream(self.tables[hub, config, kw['split']])


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=hub.load_dataset, Image=Hub.Image))
    for name, b in vqa.BENCHMARKS.items():
        for split in b.splits:
            hub.tables[b.hub, b.config, split] = hub_rows(name, split)
        if b.pictures:
            hub.tables[b.hub, b.pictures, b.splits[0]] = hub_rows(name, b.pictures)
    return hub


@pytest.mark.parametrize('name', NAMES)
def test_hub_gives_what_the_files_give(name, hub, tmp_path):
    disk, here = vqa.load(name, 'all', root=ROOT), vqa.load(name, 'all', cache=tmp_path)
    for a, b in zip(disk, here, strict=True):
        assert (a.id, a.question, a.answers, a.picture, a.group) == (b.id, b.question, b.answers, b.picture, b.group)
        assert np.array_equal(np.asarray(core.open_image(a.image)), np.asarray(core.open_image(b.image)))
    assert all(kw['streaming'] and kw['revision'] == vqa.BENCHMARKS[name].revision for _, _, kw in hub.asked)
    read, asked = hub.read, len(hub.asked)
    assert vqa.load(name, 'all', cache=tmp_path) == here and ids(vqa.load(name, cache=tmp_path, order='random')) == ids(
        vqa.load(name, root=ROOT, order='random')
    )
    assert (hub.read, len(hub.asked)) == (read, asked)  # nothing twice


def test_hub_stops_at_the_limit_and_goes_on_there(hub, tmp_path):
    few = vqa.load('vqav2', 'all', limit=3, cache=tmp_path)
    assert hub.read == 3 and few[0].source == 'lmms-lab/VQAv2@32665d3 validation, row 0'
    assert vqa.load('vqav2', 'all', limit=2, cache=tmp_path) == few[:2] and hub.read == 3
    more = vqa.load('vqav2', 'all', limit=5, cache=tmp_path)
    assert more[:3] == few and hub.read == 5 and len(vqa.load('vqav2', 'all', cache=tmp_path)) == 12 and hub.read == 12


def test_another_revision_is_another_cache(hub, tmp_path, monkeypatch):
    vqa.load('vqav2', 'all', limit=3, cache=tmp_path)
    monkeypatch.setitem(vqa.BENCHMARKS, 'vqav2', replace(vqa.BENCHMARKS['vqav2'], revision='f' * 40))
    assert (
        vqa.load('vqav2', 'all', limit=3, cache=tmp_path)[0].source == 'lmms-lab/VQAv2@fffffff validation, row 0'
        and hub.read == 6
    )
    assert [kw['revision'][0] for _, _, kw in hub.asked] == ['3', 'f']


def test_hub_after_a_kill(hub, tmp_path):
    few = vqa.load('vqav2', 'all', limit=3, cache=tmp_path)
    (known,) = tmp_path.rglob('rows.jsonl')
    known.write_bytes(known.read_bytes()[:-20])  # the third row is torn
    assert vqa.load('vqav2', 'all', limit=4, cache=tmp_path)[:3] == few and hub.read == 5
    assert ids(vqa.load('vqav2', 'all', cache=tmp_path)) == ids(vqa.load('vqav2', 'all', root=ROOT))


def test_hub_says_what_is_missing(hub, tmp_path, monkeypatch):
    hub.broken = RuntimeError('Could not reach\nthe server')
    with pytest.raises(
        OSError, match='lmms-lab/GQA could not be read from the Hub .Could not reach the server.: check the connection'
    ):
        vqa.load('gqa', cache=tmp_path)
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(
        ValueError, match=r"lmms-lab/textvqa .*pip install 'fusion_notebooks\[benchmarks\]', or give .*root="
    ):
        vqa.load('textvqa', cache=tmp_path)
    monkeypatch.undo()


def test_real_datasets_streams_a_local_copy(tmp_path, monkeypatch):
    "The package itself, on Parquet files laid out as the Hub has them"
    datasets = pytest.importorskip('datasets')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
    for name in ('gqa', 'pope', 'vqav2'):
        b, repo, configs = vqa.BENCHMARKS[name], tmp_path / 'hub' / name, {}
        for config, split in [(c, s) for c in (b.config, b.pictures) if c or not b.config for s in b.splits if c != '']:
            rows = datasets.Dataset.from_list(hub_rows(name, config if config == b.pictures and b.pictures else split))
            if 'image' in rows.column_names:
                rows = rows.cast_column('image', datasets.Image())
            path = f'{config or "data"}/{split}-00000-of-00001.parquet'
            (repo / path).parent.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(repo / path)
            configs.setdefault(config or 'default', []).append(dict(split=split, path=path))
        import yaml

        (repo / 'README.md').write_text(
            '---\n' + yaml.dump(dict(configs=[dict(config_name=c, data_files=f) for c, f in configs.items()])) + '---\n'
        )
        monkeypatch.setitem(vqa.BENCHMARKS, name, replace(b, hub=str(repo)))
        few = vqa.load(name, 'all', limit=3, cache=tmp_path / 'cache')  # and go on from there
        assert len(next((tmp_path / 'cache').rglob(f'*-{b.splits[0]}/rows.jsonl')).read_text().splitlines()) >= 3
        here, disk = vqa.load(name, 'all', cache=tmp_path / 'cache'), vqa.load(name, 'all', root=ROOT)
        assert here[:3] == few
        assert [(s.id, s.question, s.answers, s.picture) for s in here] == [
            (s.id, s.question, s.answers, s.picture) for s in disk
        ]
        assert Image.open(here[0].image).size == (48, 36)


# --- a table of one's own

OWN = [
    dict(
        image=f'{i % 20}.png',
        question=f'What is number {i}?',
        answers=['red', 'dark red'],
        box=[0, 1, 20, 24.5],
        kind='ab'[i % 2],
        id=f'q{i}',
    )
    for i in range(40)
]


@pytest.fixture
def own(tmp_path):
    for i in range(20):
        Image.new('RGB', (32, 25), (12 * i, 0, 99)).save(tmp_path / f'{i}.png')
    return tmp_path


def write(path, rows):
    if path.suffix == '.json':
        path.write_text(json.dumps(rows))
    elif path.suffix == '.jsonl':
        path.write_text('\n'.join(map(json.dumps, rows)))
    elif path.suffix == '.parquet':
        pd.DataFrame(rows).to_parquet(path)
    else:
        flat = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in r.items()} for r in rows]
        pd.DataFrame(flat).to_csv(path, index=False, sep='\t' if path.suffix == '.tsv' else ',')
    return path


@pytest.mark.parametrize('suffix', vqa.TABLES)
def test_own_table_in_every_format(own, suffix):
    samples = vqa.load(str(write(own / f'mine{suffix}', OWN)), 'all')
    assert [(s.image.name, s.question, s.answers, s.box, s.kind, s.id) for s in samples] == [
        (r['image'], r['question'], ('red', 'dark red'), (0, 1, 20, 24.5), r['kind'], f"mine-{r['id']}") for r in OWN
    ]
    b = vqa.benchmark('mine' + suffix)
    assert (
        b.metric == 'gqa'
        and vqa.benchmark('mine.csv', 'anls').metric == 'anls'
        and metrics.score(b.metric, ['Dark red.'] * 40, [s.answers for s in samples]).all()
    )


def test_own_table_without_ids_boxes_and_kinds(own):
    rows = [dict(image=r['image'], question=r['question'], answer='red') for r in OWN]
    path = write(own / 'mine.csv', rows)
    samples = vqa.load(str(path), 'all')
    write(path, rows[::-1])
    assert (
        ids(vqa.load(str(path), 'all')) == ids(samples)[::-1]
        and samples[0].box is None
        and samples[0].answers == ('red',)
    )  # ids do not hang on the place in the file
    shutil.copy(own / '0.png', own / 'copy.png')
    write(path, rows + [dict(image='copy.png', question='And this?', answer='red')])
    assert vqa.load(str(path), 'all')[-1].picture == samples[0].picture  # a copy under another name is the same picture
    (own / 'pictures').mkdir()
    for p in own.glob('*.png'):
        p.rename(own / 'pictures' / p.name)
    assert (
        ids(vqa.load(str(path), 'all', root=own / 'pictures'))
        == ids(vqa.load(str(path), 'all', images=own / 'pictures'))
        and len(vqa.load(str(path), limit=3, root=own / 'pictures')) == 3
    )


def test_own_parquet_with_pictures_inside(own):
    rows = [r | dict(image=dict(bytes=(own / r['image']).read_bytes(), path=None)) for r in OWN]
    inside, beside = (
        vqa.load(str(write(own / 'in.parquet', rows)), 'all'),
        vqa.load(str(write(own / 'out.json', OWN)), 'all'),
    )
    assert [s.picture for s in inside] == [s.picture for s in beside] and core.open_image(inside[0].image).size == (
        32,
        25,
    )
    write(own / 'in.parquet', [rows[0] | dict(image=dict(bytes=b'no picture', path=None))])
    with pytest.raises(ValueError, match=r'in.parquet, row 0: the picture cannot be read'):
        vqa.load(str(own / 'in.parquet'), 'all')


@pytest.mark.parametrize(
    'change, says',
    [
        (dict(box=[0, 0, 33, 20]), r'the box \(0, 0, 33, 20\) does not lie in its picture of 32 × 25 pixels'),
        (dict(box=[-1, 0, 3, 3]), 'does not lie'),
        (dict(box=[5, 0, 5, 3]), 'does not lie'),
        (dict(box=[0, 0, 3]), 'four numbers'),
        (dict(box='left'), 'four numbers'),
        (dict(box=[0, 0, float('nan'), 3]), 'four numbers'),
        (dict(box=[0, 0, True, 3]), 'four numbers'),
        (dict(answers=[]), 'a list of texts is needed'),
        (dict(answers=[1, 2]), 'a list of texts is needed'),
        (dict(answers=None), 'a list of texts is needed'),
        (dict(answers={'a': 'red'}), 'a list of texts'),
        (dict(image='gone.png'), 'no file gone.png in'),
        (dict(image=''), 'is not the name of a file'),
        (dict(image=None), 'is not the name of a file'),
        (dict(image='a\0b.png'), 'is not the name of a file'),
        (dict(image='x' * 5000), 'is not the name of a file'),
        (dict(image='../secret.png'), 'leads out of'),
        (dict(image='/etc/passwd'), 'leads out of'),
        (dict(image='link.png'), 'leads out of'),
        (dict(image='loop.png'), '(leads out of|is not the name|no file)'),
        (dict(image='folder/0.png'), 'leads out of'),
        (dict(image='bad.png', id=1), 'the picture cannot be read'),
        (dict(question=''), 'it must be a text'),
        (dict(question=7), 'it must be a text'),
        (dict(id=['x']), "key .* is neither a text nor a number"),
        (dict(id='q4'), 'its id q4 is that of mine.json, row 4 too'),
    ],
)
def test_own_table_refuses(own, change, says):
    Image.new('RGB', (9, 9)).save(own.parent / 'secret.png')
    (own / 'bad.png').write_text('no picture')
    (own / 'link.png').symlink_to(own.parent / 'secret.png')
    (own / 'loop.png').symlink_to(own / 'loop.png')
    (own.parent / 'other').mkdir(exist_ok=True)
    Image.new('RGB', (9, 9)).save(own.parent / 'other/0.png')
    (own / 'folder').symlink_to(own.parent / 'other')
    rows = [dict(r) for r in OWN]
    rows[7] |= change
    with pytest.raises((ValueError, OSError), match=f'mine.json, row 7: .*{says}') as e:
        vqa.load(str(write(own / 'mine.json', rows)), 'all')
    assert len(str(e.value)) < 400 and '\n' not in str(e.value)


def test_own_table_may_name_files_by_whole_path_and_through_links_inside(own):
    (own / 'alias.png').symlink_to(own / '3.png')
    samples = vqa.load(
        str(write(own / 'mine.json', [OWN[0] | dict(image=str(own / '2.png')), OWN[1] | dict(image='alias.png')])),
        'all',
    )
    assert [s.image.resolve().name for s in samples] == ['2.png', '3.png']


def test_unusual_pictures_are_converted(own):
    from fusion_notebooks.mllm import open_image

    rgb = Image.open(own / '5.png')
    rgb.convert('P').save(own / 'p.png')
    rgb.convert('CMYK').save(own / 'c.jpg')
    rgb.convert('L').save(own / 'l.png')
    p, c, l = vqa.load(
        str(write(own / 'mine.json', [OWN[0] | dict(image=n, id=n) for n in ('p.png', 'c.jpg', 'l.png')])), 'all'
    )
    assert [s.image for s in (p, c, l)] == [own / n for n in ('p.png', 'c.jpg', 'l.png')]  # nothing decoded is kept
    assert all(open_image(s.image).size == (32, 25) and open_image(s.image).mode == 'RGB' for s in (p, c, l))
    (own / 'cut.png').write_bytes((own / 'p.png').read_bytes()[:-40])
    (cut,) = vqa.load(str(write(own / 'mine.json', [OWN[0] | dict(image='cut.png')])), 'all')
    with pytest.raises(ValueError, match='cut.png is damaged'):
        open_image(cut.image)


def test_odd_but_good_tables(own):
    row = OWN[0] | dict(question='What is\u2028this?', kind=3, id=0)
    (own / 'a.JSONL').write_text('\ufeff' + json.dumps(row, ensure_ascii=False) + '\n\n' + json.dumps(OWN[1]) + '\n')
    (own / 'far').mkdir()
    shutil.move(own / 'a.JSONL', own / 'far/a.JSONL')
    (own / 'a.JSONL').symlink_to(own / 'far/a.JSONL')  # the table is named by the user: a link is well
    a, b = vqa.load(str(own / 'a.JSONL'), 'all')
    assert (a.question, a.kind, a.id, b.id) == ('What is\u2028this?', '3', 'a-0', 'a-q1')


def test_unreadable_tables(own):
    for name, text, says in [
        ('a.json', '{"x": ', 'a.json is not JSON'),
        ('b.jsonl', '{"image": "0.png", "question": "What?", "answer": "red"}\n{', 'b.jsonl, row 1: not JSON'),
        ('c.json', '3', 'c.json holds no list'),
        ('d.json', '[1, 2]', "d.json, row 0: '1' is not a row"),
        ('e.json', '{"image": "0.png", "question": "What?", "answer": "red"}\n{"b"', 'e.json, row 1: not JSON'),
        ('f.parquet', 'PAR1', 'f.parquet cannot be read as'),
        ('g.csv', 'image,question\n0.png,What?\n', "g.csv, row 0: column 'answer' is missing; it has image, question"),
        ('h.json', '[' * 100000, 'h.json is not JSON'),
        ('i.json', '[]', 'no question in the all split; it has 0'),
    ]:
        (own / name).write_text(text)
        with pytest.raises(ValueError, match=says):
            vqa.load(str(own / name), 'all')
    (own / 'j.csv').write_bytes(b'image,question\n\xff\xfe,1')
    with pytest.raises(ValueError, match='j.csv cannot be read as csv'):
        vqa.load(str(own / 'j.csv'), 'all')
    with pytest.raises(FileNotFoundError, match='no file k.json'):
        vqa.load(str(own / 'k.json'), 'all')


# --- hostile official files


def test_asking_wrongly():
    with pytest.raises(
        ValueError,
        match="No benchmark 'glyph'; known: gqa, vqav2, okvqa, vizwiz, textvqa, docvqa, mmbench, pope, or a table of your own",
    ):
        vqa.load('glyph')
    with pytest.raises(ValueError, match="No split 'test'; known: calibration, evaluation, all"):
        vqa.load('gqa', 'test')
    with pytest.raises(ValueError, match="No order 'last'"):
        vqa.load('gqa', order='last')
    for bad in (0, -1, 2.5, '3', True):
        with pytest.raises(ValueError, match='limit is .*above 0'):
            vqa.load('gqa', limit=bad, root=ROOT)
    with pytest.raises(ValueError, match='no question in the calibration split; it has 12 in all'):
        vqa.load('gqa', 'calibration', root=ROOT, share=0)


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    'name, file, change, says',
    [
        (
            'gqa',
            'testdev_balanced_questions.json',
            lambda d: d['200002'].pop('answer'),
            r"row 200002: column 'answer' is missing; it has semantic",
        ),
        (
            'gqa',
            'testdev_balanced_questions.json',
            lambda d: d['200002'].update(imageId='../../../x'),
            r'row 200002: ../../../x.jpg leads out of',
        ),
        (
            'gqa',
            'testdev_balanced_questions.json',
            lambda d: d['200002'].update(types='query'),
            'row 200002: not a row of this benchmark',
        ),
        (
            'vqav2',
            'v2_mscoco_val2014_annotations.json',
            lambda d: [a.update(answers=a['answers'][:9]) for a in d['annotations']],
            'row 0: 9 answers; every question has 10',
        ),
        (
            'vqav2',
            'v2_mscoco_val2014_annotations.json',
            lambda d: [a.update(answers='red') for a in d['annotations']],
            "row 0: the answers are .*a list of texts is needed|row 0: 3 answers",
        ),
        (
            'vqav2',
            'v2_mscoco_val2014_annotations.json',
            lambda d: d['annotations'].pop(3),
            'no annotation has its question_id',
        ),
        (
            'vqav2',
            'v2_mscoco_val2014_annotations.json',
            lambda d: d['annotations'].append(d['annotations'][0]),
            'annotations.json, row 12: question_id .* is there twice',
        ),
        (
            'vqav2',
            'v2_OpenEnded_mscoco_val2014_questions.json',
            lambda d: d['questions'].append(d['questions'][0]),
            'row 12: its id 1000000 is that of .*questions.json, row 0 too',
        ),
        (
            'okvqa',
            'mscoco_val2014_annotations.json',
            lambda d: [a.update(image_id=7) for a in d['annotations']],
            'row 0: image_id 1000, but its annotation says 7',
        ),
        ('vizwiz', 'val.json', lambda d: d[2].update(answers=[{'answer': None}] * 10), 'row 2: the answers are'),
        ('vizwiz', 'val.json', lambda d: d[2].pop('image'), "row 2: column 'image' is missing"),
        (
            'textvqa',
            'TextVQA_0.5.1_val.json',
            lambda d: d['data'][1].pop('answers'),
            "row 1: column 'answers' is missing",
        ),
        (
            'textvqa',
            'TextVQA_0.5.1_val.json',
            lambda d: d['data'].__setitem__(1, ['x']),
            'row 1: .* is not a row with named columns',
        ),
        (
            'textvqa',
            'TextVQA_0.5.1_val.json',
            lambda d: d['data'][1].update(image_id='0' * 16),
            'row 1: no file 0000000000000000.jpg in',
        ),
        ('docvqa', 'val_v1.0_withQT.json', lambda d: d['data'][4].update(answers=[]), 'row 4: the answers are'),
        (
            'docvqa',
            'val_v1.0_withQT.json',
            lambda d: d['data'][4].update(image='/etc/hostname'),
            'row 4: /etc/hostname leads out of',
        ),
    ],
)
def test_mutated_rows_are_named(root, name, file, change, says):
    edit(root / name / file, change)
    with pytest.raises((ValueError, OSError), match=says) as e:
        vqa.load(name, 'all', root=root)
    assert any(f.split('|')[0] in str(e.value) for f in vqa.BENCHMARKS[name].files) and len(str(e.value)) < 500


@pytest.mark.parametrize(
    'column, value, says',
    [
        ('answer', 'E', "answer 'E' with"),
        ('answer', '', "answer '' with"),
        ('image', '%%%', 'not base64'),
        ('image', 'aGVsbG8=', 'the picture cannot be read'),
        ('image', '999', '(not base64|cannot be read)'),
        ('B', '', "answer .* with 1 options"),
        ('index', 'x1', 'not a row of this benchmark'),
        ('index', '242', 'its id 242.0 is that of'),
        ('question', '', 'the question is'),
    ],
)
def test_mutated_mmbench(root, column, value, says):
    path = root / 'mmbench/mmbench_dev_20230712.tsv'
    table = pd.read_csv(path, sep='\t', dtype=str, keep_default_na=False)
    if column == 'B':
        table.loc[0, list('ACD')] = '', '', ''
    table.loc[0 if column != 'B' else 0, column] = value if column != 'B' else 'only'
    table.to_csv(path, sep='\t', index=False)
    with pytest.raises(ValueError, match=f'mmbench_dev_20230712.tsv, row .*{says}'):
        vqa.load('mmbench', 'all', root=root)


def test_mutated_pope(root):
    path = root / 'pope/coco_pope_popular.json'
    lines = path.read_text().splitlines()
    for row, says in [
        (json.loads(lines[2]) | dict(label='maybe'), "row 2: the label is 'maybe'"),
        (json.loads(lines[2]) | dict(image='../../x.jpg'), 'row 2: .*leads out of'),
        ('{', 'row 2: not JSON'),
    ]:
        path.write_text('\n'.join([*lines[:2], row if row == '{' else json.dumps(row), *lines[3:]]))
        with pytest.raises(ValueError, match=f'coco_pope_popular.json, {says}'):
            vqa.load('pope', 'all', root=root)


def test_missing_files_folders_and_links(root, tmp_path):
    (root / 'gqa/testdev_balanced_questions.json').rename(tmp_path / 'elsewhere.json')
    with pytest.raises(FileNotFoundError, match='gqa: no file testdev_balanced_questions.json in'):
        vqa.load('gqa', root=root)
    (root / 'gqa/testdev_balanced_questions.json').symlink_to(tmp_path / 'elsewhere.json')
    with pytest.raises(ValueError, match='testdev_balanced_questions.json leads out of'):
        vqa.load('gqa', root=root)
    (root / 'vizwiz/val').rename(tmp_path / 'pictures')
    with pytest.raises(FileNotFoundError, match='No folder of pictures at .*vizwiz/val; give it as images='):
        vqa.load('vizwiz', root=root)
    (root / 'vizwiz/val').symlink_to(tmp_path / 'pictures')
    with pytest.raises(ValueError, match='vizwiz/val leads out of .*; give the folder of the pictures as images='):
        vqa.load('vizwiz', root=root)
    assert len(vqa.load('vizwiz', 'all', root=root, images=tmp_path / 'pictures')) == 6
    assert ids(vqa.load('docvqa', root=root / 'docvqa')) == ids(
        vqa.load('docvqa', root=root)
    )  # the folder itself, or the one above
    (root / 'docvqa/val_v1.0_withQT.json').rename(root / 'docvqa/val_v1.0.json')
    assert len(vqa.load('docvqa', 'all', root=root)) == 12


@pytest.mark.parametrize('name', [n for n in NAMES if n != 'mmbench'])
def test_no_mutation_escapes_the_sentence(root, name):
    "Whatever one field becomes: samples, or one sentence that names the file and the row"
    r, junk = (
        random.Random(name),
        [
            None,
            0,
            -1,
            1e308,
            float('nan'),
            True,
            '',
            'x',
            '../x',
            '/etc/passwd',
            [],
            [None],
            {},
            {'a': {}},
            [['x']] * 10,
            'é' * 300,
            '\0',
            2**70,
        ],
    )
    path = root / name / r.choice(vqa.BENCHMARKS[name].files).split('|')[0]
    text, said = path.read_text(), 0
    for _ in range(120):
        rows = list(vqa.files._objects(path)) if name == 'pope' else json.loads(text)
        table = (
            [row for _, row in rows]
            if name == 'pope'
            else list(rows.values())
            if name == 'gqa'
            else next((rows[k] for k in ('data', 'questions', 'annotations') if k in rows), None)
            if isinstance(rows, dict)
            else rows
        )
        row = r.choice(table)
        key = r.choice(list(row))
        if r.random() < 0.2:
            del row[key]
        else:
            row[key] = r.choice(junk)
        path.write_text('\n'.join(map(json.dumps, table)) if name == 'pope' else json.dumps(rows))
        try:
            vqa.load(name, 'all', root=root)
        except (ValueError, OSError) as e:
            said += 1
            assert path.name in str(e) or 'questions.json' in str(e), e
            assert ', row ' in str(e) and len(str(e)) < 500, e
        path.write_text(text)
    assert said > 10
