"The store: whole units or nothing, each unit once, readers undisturbed"

import multiprocessing, re, signal, subprocess, sys
import numpy as np, pandas as pd, pytest
from pathlib import Path
from conftest import replaced
from fusion_notebooks import results
from fusion_notebooks.results import Store, canonical, claims, digest
from fusion_notebooks.results.claims import _is_given_up


def key(i, **kw):
    return dict(model='m', analysis='a', samples=[f's{i}']) | kw


def rows(i, n=3):
    return pd.DataFrame(dict(sample=f's{i}', layer=range(n), score=1.0, map=[[0.5, 0.5]] * n))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / 'results')


def test_written_twice_is_there_once(store):
    for _ in range(2):
        store.add(rows(0), key(0))
    assert len(store.read()) == 3 and len(list(store.folder.iterdir())) == 1
    assert len(store.read([key(0), key(0)])) == 3


def test_key_entries_become_columns_and_lists_survive(store):
    store.add(rows(0), key(0, seed=3))
    got = store.read(model='m')
    assert (
        set(got.model) == {'m'} and set(got.seed) == {3} and 'samples' not in got and list(got['map'][0]) == [0.5, 0.5]
    )


def test_missing_asks_for_every_entry_of_the_key(store):
    store.add(rows(0), key(0))
    other = [key(0, code='x'), key(1), key(0, samples=['s0', 's1'])]
    assert store.missing([key(0), *other]) == other
    assert digest(dict(a=1, b=2)) == digest(dict(b=2, a=1))


def test_read_by_key_and_by_column(store):
    store.add(rows(0).assign(how='zero'), key(0))
    store.add(rows(1), key(1, analysis='b'))
    assert (
        len(store.read(analysis='b')) == 3
        and len(store.read(layer=[0, 1])) == 4
        and len(store.read([key(0)], layer=2)) == 1
    )
    assert store.read(analysis='c').empty and Store(store.folder / 'nowhere').read().empty


def test_unequal_columns_join(store):
    store.add(rows(0), key(0))
    store.add(rows(1).assign(box=[[0.0, 1.0], None, [2.0, 3.0]]), key(1))
    assert len(store.read()) == 6 and store.read().box.notna().sum() == 2


@pytest.mark.parametrize(
    'damage',
    [lambda b: b[: len(b) // 2], lambda b: b'', lambda b: b'not parquet', lambda b: b[:40] + bytes(200) + b[240:]],
)
def test_damaged_part_counts_as_missing(store, damage):
    store.add(rows(0), key(0))
    store.add(rows(1), key(1))
    path = store.path(key(1))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match='cannot be read'):
        assert len(store.read([key(0), key(1)])) == 3
    assert store.missing([key(0), key(1)]) == [key(1)] and len(store.read()) == 3
    store.add(rows(1), key(1))
    assert len(store.read()) == 6


def older(store, i):
    "A part as the first version of the store wrote it"
    import pyarrow as pa, pyarrow.parquet as pq

    part = pa.Table.from_pandas(rows(i), preserve_index=False)
    store.folder.mkdir(exist_ok=True)
    pq.write_table(
        part.replace_schema_metadata({**part.schema.metadata, b'key': canonical(key(i)).encode()}), store.path(key(i))
    )


def test_an_older_versions_parts_are_left_alone(store):
    older(store, 0)
    store.add(rows(1), key(1))
    before, said = (
        store.path(key(0)).read_bytes(),
        'results holds rows that an older version wrote: they are left alone; choose another results folder',
    )
    for look, want in (
        (lambda: len(store.read()), 3),
        (store.keys, [key(1)]),
        (lambda: store.summary(['layer']).n.sum(), 3),
        (store.compact, 1),
        (lambda: len(store.read()), 3),
        (store.compact, 0),
    ):
        with pytest.warns(UserWarning, match=said) as warned:
            assert look() == want
        assert len({str(w.message) for w in warned}) == 1
    with pytest.raises(ValueError, match=said):
        store.read([key(0), key(1)])  # nothing is mixed, nothing is computed over it
    assert (
        store.missing([key(0)]) == []
        and store.path(key(0)).read_bytes() == before
        and not list(store.folder.glob('*.damaged'))
    )


KILLED = '''
import sys, time
import pandas as pd
from pathlib import Path
from fusion_notebooks import results
def half(f):
    f.write(b'PAR1 half a part'); f.flush()
    print('writing', flush=True)
    time.sleep(60)
results.store._parquet = lambda *a: half
results.Store(sys.argv[1]).add(pd.DataFrame(dict(sample=['s'])), dict(model='m'))
'''


def test_killed_while_writing_leaves_no_part(store):
    child = subprocess.Popen([sys.executable, '-c', KILLED, str(store.folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == 'writing\n'
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not store.has(dict(model='m')) and store.read().empty and store.keys() == []
    assert len(list(store.folder.iterdir())) == 1
    store.add(rows(0), dict(model='m'))
    store.tidy()
    assert len(store.read()) == 3 and len(list(store.folder.iterdir())) == 1


def test_tidy_leaves_what_is_in_use(store, tmp_path):
    child = subprocess.Popen([sys.executable, '-c', KILLED, str(store.folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == 'writing\n'
    with store.claim(key(0)):
        store.tidy()
        assert sorted(p.suffix for p in store.folder.iterdir()) == ['.lock', '.tmp']
    child.kill()
    child.wait()
    store.tidy()
    assert list(store.folder.iterdir()) == []


def test_failure_while_writing_leaves_nothing(store, monkeypatch):
    replaced(monkeypatch, results, '_parquet', lambda *a: lambda f: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.add(rows(0), key(0))
    assert list(store.folder.iterdir()) == []


def _write(folder, which):
    for i in which:
        Store(folder).add(rows(i), key(i))


def test_reading_while_others_write(store):
    spawn = multiprocessing.get_context('spawn')
    writers = [
        spawn.Process(target=_write, args=(store.folder, range(k, 60 + k))) for k in (0, 20)
    ]  # 40 units are written by both
    for w in writers:
        w.start()
    while any(w.is_alive() for w in writers):
        got = store.read()
        assert got.empty or (got.groupby('sample').size() == 3).all()
    assert [w.exitcode for w in writers] == [0, 0]
    assert len(store.read()) == 80 * 3 and not list(store.folder.glob('*.tmp'))


# claims, failures, notes


def test_a_process_that_was_asked_to_stop_has_not_died_over_its_unit(tmp_path):
    "A preempted job gets a signal first and is killed when its time is up"
    code = """
import sys
from fusion_notebooks.results import Store
from fusion_notebooks.results.claims import mark_stopped
with Store(sys.argv[1]).claim(dict(a=1)) as deaths:
    if sys.argv[2] == 'asked':
        mark_stopped()
    print(len(deaths), flush=True)
    sys.stdin.read()
"""
    for how, before in (('asked', 0), ('asked', 0), ('killed', 0), ('asked', 1), ('killed', 1)):
        child = subprocess.Popen(
            [sys.executable, '-c', code, tmp_path, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout.readline() == f'{before}\n'
        child.kill()
        child.wait()
    with Store(tmp_path).claim(dict(a=1)) as deaths:
        assert deaths == ['killed', 'killed']


def test_what_is_known_of_deaths_over_a_unit(tmp_path):
    "Three kills from outside do not give a unit up; crashes do, and kills while memory was short"
    store, key = Store(tmp_path), dict(a=1)
    code = "import os, sys\nfrom fusion_notebooks.results import Store\nwith Store(sys.argv[1]).claim(dict(a=1)): os.abort()"

    def die():
        child = subprocess.Popen([sys.executable, '-c', code, tmp_path], stderr=subprocess.DEVNULL)
        child.wait()
        return child.pid

    for _ in range(3):
        die()
    store.record_crash(die())
    with store.claim(key) as deaths:
        assert deaths == ['killed', 'killed', 'killed', 'crash'] and not _is_given_up(deaths)
        assert _is_given_up(deaths + ['memory', 'crash'])


def test_memory_was_short_between_two_owners_of_a_unit(tmp_path, monkeypatch):
    "A kill for want of memory explains the death before the next owner began, not those long before; a reboot none"
    store, key, kills = Store(tmp_path), dict(a=1), [5, 5, 6, 0, 0]
    lines = []
    for process, number in enumerate(kills):
        monkeypatch.setattr(claims, '_memory_kills', lambda number=number: number)
        lines.append(claims._line('began', process))
    store.path(key).with_suffix('.lock').write_text(''.join(lines))
    with store.claim(key) as deaths:
        assert deaths == ['killed', 'memory', 'killed', 'killed', 'killed']


def test_a_claim_is_exclusive_and_goes_with_its_owner(store):
    code = "import sys\nfrom fusion_notebooks.results import Store\nwith Store(sys.argv[1]).claim(dict(a=1)) as deaths: print(len(deaths), flush=True); sys.stdin.read()"
    for before in (0, 1, 2):
        child = subprocess.Popen(
            [sys.executable, '-c', code, str(store.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout.readline() == f'{before}\n'  # how many died before it
        with store.claim(dict(a=1)) as mine:
            assert mine is None
        assert store.running() == {digest(dict(a=1))}
        child.kill()
        child.wait()
    assert not store.running()
    with store.claim(dict(a=1)) as mine:
        assert mine == ['killed'] * 3
    with store.claim(dict(a=1)) as mine:
        assert mine == []  # who ends well leaves nothing behind


def test_failures_are_kept_until_there_are_rows(store):
    store.fail(key(0), 'out of memory')
    store.fail(key(0), 'again')
    assert (
        [f['cause'] for f in store.failures().values()] == ['again']
        and store.failure(key(0))['key'] == key(0)
        and store.failure(key(1)) == {}
    )
    assert store.missing([key(0)]) == [key(0)] and store.read().empty
    store.add(rows(0), key(0))
    assert store.failures() == {}


def test_no_rows_are_no_unit(store):
    with pytest.raises(ValueError, match='without rows'):
        store.add(rows(0, 0), key(0))


def test_notes(store):
    assert (
        store.memo(dict(n=1), lambda: (1, 'é')) == [1, 'é'] == store.memo(dict(n=1), lambda: pytest.fail('made twice'))
    )
    store.path(dict(n=1)).with_suffix('.json').write_text('[1, ')
    assert store.memo(dict(n=1), lambda: 2) == 2 == store.memo(dict(n=1), lambda: 3)


# compaction


def many(store, n=30):
    for i in range(n):
        store.add(rows(i) if i % 3 else rows(i).assign(box=[[0.0, 1.0], None, [2.0, 3.0]]), key(i, seed=i % 2))


def test_a_pack_reads_like_its_parts(store):
    many(store)
    keys, whole, means = store.keys(), store.read(), store.summary(['seed', 'layer'])
    assert store.compact() == 30 and not store.parts() and len(store.packs()) == 2 and store.compact() == 0
    assert store.missing(keys) == [] and {canonical(k) for k in store.keys()} == {canonical(k) for k in keys}
    pd.testing.assert_frame_equal(store.read(keys), whole)
    pd.testing.assert_frame_equal(
        store.read(keys[7:3:-1]),
        pd.concat([whole[whole['sample'] == k['samples'][0]] for k in keys[7:3:-1]], ignore_index=True)[
            store.read(keys[7:3:-1]).columns
        ],
    )
    pd.testing.assert_frame_equal(store.summary(['seed', 'layer']), means)
    store.add(rows(0), key(0, seed=0))
    store.add(rows(99), key(99, seed=0))
    assert len(store.read()) == 93 and store.summary(['seed']).n.sum() == 93


def test_a_compaction_that_dies_doubles_nothing(store, monkeypatch):
    many(store)
    keys, whole = store.keys(), store.read()
    monkeypatch.setattr(results.store.Path, 'unlink', lambda self, **kw: 1 / 0)  # dies before the first part is removed
    with pytest.raises(ZeroDivisionError):
        store.compact()
    monkeypatch.undo()
    assert store.packs() and store.parts()
    pd.testing.assert_frame_equal(store.read(keys), whole)
    assert len(store.read()) == len(whole) and store.summary(['layer']).n.sum() == len(whole)
    store.compact()
    store.compact()
    pd.testing.assert_frame_equal(store.read(keys), whole)


def test_a_damaged_pack_counts_as_missing(store):
    many(store)
    keys = store.keys()
    store.compact()
    pack = next(p for p, texts in store.packs().items() if len(texts) == 20)
    data = bytearray(pack.read_bytes())
    data[len(data) // 3] ^= 255
    pack.write_bytes(data)
    with pytest.warns(UserWarning, match='cannot be read'):
        got = store.read(keys)
    assert len(got) == 30 and len(store.missing(keys)) == 20


def test_reading_while_another_compacts(store):
    many(store, 60)
    keys = store.keys()
    spawn = multiprocessing.get_context('spawn')
    other = spawn.Process(target=_compact, args=(store.folder,))
    other.start()
    while other.is_alive():
        assert len(store.read(keys)) == 180
    assert other.exitcode == 0 and not store.parts()


def _compact(folder):
    Store(folder).compact()


# damage, byte by byte


def test_no_flipped_bit_goes_unnoticed(store):
    import random, warnings

    path, rnd = store.add(rows(0, 40).assign(text='red', score=[0.1 * i for i in range(40)]), key(0)), random.Random(0)
    good, want = path.read_bytes(), store.read([key(0)])
    caught = 0
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for _ in range(300):
            bad = bytearray(good)
            bad[rnd.randrange(len(bad))] ^= 1 << rnd.randrange(8)
            path.write_bytes(bad)
            got = store.read([key(0)])
            caught += got.empty
            assert got.empty or got.equals(want)
    assert caught > 100


# tables


def refine_rows(model='llava-1.5-7b-hf', dataset='gqa', right=None, n=100, per=1):
    right = right or dict(base=50, crop=70, cd=52)
    return pd.DataFrame(
        [
            dict(
                model=model,
                dataset=dataset,
                sample=f'{dataset}{i}',
                image=f'p{i // per}',
                kind='ab'[i % 2],
                method=m,
                score=float((i * 37) % n < k),
                lenient=1.0,
                forwards=2,
                flops=2e9,
                seconds=0.1,
            )
            for m, k in right.items()
            for i in range(n)
        ]
    )


def test_method_table_by_hand():
    from fusion_notebooks import metrics

    rows = pd.concat([refine_rows(), refine_rows(dataset='textvqa', right=dict(base=50, crop=55, cd=30))])
    t = results.method_table(rows).set_index(['dataset', 'kind', 'method'])
    ps = {}
    for d, g in rows.groupby('dataset'):
        wide = g.pivot(index='sample', columns='method', values='score')
        for m in ('crop', 'cd'):
            ps[d, m] = metrics.paired(wide[m], wide.base, wide.index)
    adjusted = dict(zip(ps, metrics.holm([p[-1] for p in ps.values()])))  # four comparisons, one family
    for (d, m), (diff, low, high, _) in ps.items():
        assert (
            tuple(t.loc[(d, 'all', m), ['difference', 'dlow', 'dhigh']]) == (diff, low, high)
            and t.p[d, 'all', m] == adjusted[d, m]
        )
    assert (
        t.accuracy['gqa', 'all', 'crop'] == 0.7
        and t.n['gqa', 'a', 'crop'] == 50
        and np.isnan(t.p['gqa', 'all', 'base'])
        and t.gflops['gqa', 'all', 'cd'] == 2
    )


def test_intervals_are_clustered_by_picture():
    one, four = (
        results.method_table(refine_rows(per=k)).set_index(['kind', 'method']).loc[('all', 'crop')] for k in (1, 50)
    )
    assert one.difference == four.difference and one.dlow > four.dlow


def test_published_numbers_stand_beside_ours():
    published = pd.read_csv(Path(__file__).parents[1] / 'data/reference/paper_tables.csv')
    t = results.method_table(
        pd.concat(
            [
                refine_rows(),
                refine_rows('glyph-llava', 'glyph'),
                refine_rows('glm', 'pope'),
                refine_rows(dataset='docvqa'),
            ]
        )
    )
    got = results.beside_published(t, published).set_index(['model', 'dataset', 'method'])
    assert (
        tuple(got.loc[('llava-1.5-7b-hf', 'gqa', 'crop'), ['accuracy', 'published']]) == (70, 69.4)
        and got.published['llava-1.5-7b-hf', 'gqa', 'base'] == 66.03
    )
    assert (
        got.difference['llava-1.5-7b-hf', 'gqa', 'crop'] == pytest.approx(0.6)
        and '100 questions here' in got.remark['llava-1.5-7b-hf', 'gqa', 'crop']
    )
    assert (
        got.loc['glyph-llava'].published.isna().all()
        and 'demo model' in got.remark['glyph-llava', 'glyph', 'base']
        and 'not a model of the paper' in got.remark['glm', 'pope', 'base']
        and 'within the average' in got.remark['llava-1.5-7b-hf', 'docvqa', 'base']
    )
    seven = results.method_table(pd.concat([refine_rows(dataset=d) for d in results.SEVEN]))
    mean = results.beside_published(seven, published).set_index(['dataset', 'method']).loc[('average of 7', 'crop')]
    assert (mean.accuracy, mean.published, mean.n) == (pytest.approx(70), 59.16, 700)


def test_tables_are_written_three_times(tmp_path):
    t = pd.DataFrame({'method': ['a_b', 'c|d'], 'p %': [0.5, float('nan')]})
    md = results.write_table(t, tmp_path / 'x', 'main', 'ρ & λ').read_text()
    assert md.splitlines() == ['ρ & λ', '', '| method | p % |', '|---|---|', '| a_b | 0.5 |', r'| c\|d |  |']
    tex = (tmp_path / 'x/main.tex').read_text()
    assert (
        r'a\_b & 0.5 \\' in tex
        and r'p \%' in tex
        and r'$\rho$ \& $\lambda$' in tex
        and pd.read_csv(tmp_path / 'x/main.csv').equals(t)
    )


def test_what_stands_in_a_table_is_text(tmp_path):
    "Whatever a data set calls its kinds: no HTML in Markdown, no command in LaTeX, one line per row"
    bad = '<script>alert(1)</script>\n| a | b |\n\n\\input{/etc/passwd} $x$ &'
    md = results.write_table(pd.DataFrame({'kind': [bad, 'fine'], bad: [1.0, 2.0]}), tmp_path, 'main', 'c').read_text()
    lines, tex = md.splitlines(), (tmp_path / 'main.tex').read_text()
    assert (
        len(lines) == 6
        and '<' not in md
        and md.count('&lt;script&gt;') == 2
        and all(len(re.findall(r'(?<!\\)\|', l)) == 3 for l in lines[2:])
    )
    assert (
        r'\textbackslash{}input\{/etc/passwd\} \$x\$ \&' in tex and r'\input' not in tex and len(tex.splitlines()) == 11
    )


def test_choices_against_their_default():
    rows = pd.concat(
        [
            refine_rows(right={'mask': 60}).assign(choice='default', value='default'),
            refine_rows(right={'mask': 40}).assign(choice='rho', value='0.4'),
            refine_rows(right={'base': 50}).assign(choice='default', value='default'),
        ]
    )
    t = results.choice_table(rows).set_index(['method', 'value'])
    assert (
        t.difference['mask', '0.4'] == pytest.approx(-0.2)
        and t.p['mask', '0.4'] < 0.01
        and t.loc[[('mask', 'default'), ('base', 'default')], 'difference'].isna().all()
    )


def test_tables_of_a_study_from_rows_alone(tmp_path, monkeypatch):
    "Every cell of the notebook, on invented rows of two models: no model, no torch"
    import json
    from types import SimpleNamespace
    from fusion_notebooks import study

    made = {}

    def refined(model, dataset):
        t = refine_rows(
            model,
            dataset,
            dict(base=50, crop=70, cd=52, opera=40)
            | {
                'crop-late': 72,
                'crop-random': 51,
                'crop-centre': 52,
                'crop-oracle': 90,
                'crop-read': 80,
                'vicrop-rel': 60,
            },
        )
        crop = t.method.str.startswith('crop')
        return t.assign(
            why='',
            device='cpu',
            pre=np.where(crop, 2.0, np.nan),
            post=np.where(crop, 7.0, np.nan),
            distance=np.where(crop, 0.5, np.nan),
            hit=np.where(crop, 0.4, np.nan),
        )

    def require(analysis, model, benchmark='', **kw):
        made[analysis, model] = kw
        return (
            refined(model, benchmark)
            if analysis == 'refine'
            else pd.concat(
                [
                    refine_rows(model, benchmark, dict(mask=60)).assign(choice='default', value='default'),
                    refine_rows(model, benchmark, dict(mask=50)).assign(choice='rho', value='0.4'),
                ]
            )
            if model != 'glm'
            else pd.DataFrame()
        )

    replaced(monkeypatch, study, 'require', require)
    replaced(
        monkeypatch,
        study,
        'read_settings',
        lambda *_: SimpleNamespace(benchmarks=('gqa', 'pope'), figures=tmp_path, analyses=('refine',)),
    )
    cells = [
        c
        for c in json.loads((Path(__file__).parents[1] / 'nbs/analyses/tables.ipynb').read_text())['cells']
        if c['cell_type'] == 'code'
    ]
    shown = []
    space = dict(display=shown.append)
    for c in cells:
        exec(''.join(c['source']), space)
        if 'parameters' in c['metadata'].get('tags', ()):
            space['models'] = ['llava-1.5-7b-hf', 'glm']
    names = ('main', 'controls', 'published', 'lenient', 'cost', 'layers', 'choices')
    assert {p.name for p in (tmp_path / 'study').iterdir()} == {
        f'{n}.{e}' for n in names for e in ('md', 'csv', 'tex')
    } and len(shown) == len(names)
    main = (tmp_path / 'study/main.md').read_text()
    assert '| llava-1.5-7b-hf | gqa | crop | 70.0 +20.0 [' in main and '| glm | pope | opera | 40.0 -10.0 [' in main
    controls = (tmp_path / 'study/controls.md').read_text()
    for other in ('base', 'crop-random', 'crop-centre', 'crop-late', 'vicrop-rel', 'crop-oracle'):
        assert f'| crop − {other} |' in controls
    assert (
        not made['candidates', 'glm']['compute']
        and pd.read_csv(tmp_path / 'study/published.csv').published.notna().sum() == 2
    )  # base and ours on GQA


def test_tidy_leaves_a_lock_that_was_just_taken_anew(tmp_path, monkeypatch):
    "Between its look at a lock and its removal the owner may end, and another begin"
    store, key, happened = Store(tmp_path / 'r'), dict(unit=1), []
    owner, next_owner = store.claim(key), store.claim(key)
    assert owner.__enter__() == []

    def late(f):
        if not happened:
            happened.append(owner.__exit__(None, None, None))
            assert next_owner.__enter__() == []
        return lock(f)

    lock = claims._lock
    monkeypatch.setattr(claims, '_lock', late)
    store.tidy()
    assert happened and store.running() == {digest(key)}
    with store.claim(key) as deaths:
        assert deaths is None  # nobody else gets the unit
    next_owner.__exit__(None, None, None)
    assert not list(store.folder.iterdir())
