"The store: whole units or nothing, each unit once, readers undisturbed"
import multiprocessing, os, signal, subprocess, sys, time
import pandas as pd, pytest
from fusion_notebooks.results import Store, digest

def key(i, **kw): return dict(model='m', analysis='a', samples=[f's{i}']) | kw
def rows(i, n=3): return pd.DataFrame(dict(sample=f's{i}', layer=range(n), score=1., map=[[.5, .5]]*n))

@pytest.fixture
def store(tmp_path): return Store(tmp_path/'results')

def test_written_twice_is_there_once(store):
    for _ in range(2): store.add(rows(0), key(0))
    assert len(store.read()) == 3 and len(list(store.folder.iterdir())) == 1
    assert len(store.read([key(0), key(0)])) == 3

def test_key_entries_become_columns_and_lists_survive(store):
    store.add(rows(0), key(0, seed=3))
    got = store.read(model='m')
    assert set(got.model) == {'m'} and set(got.seed) == {3} and 'samples' not in got and list(got['map'][0]) == [.5, .5]

def test_missing_asks_for_every_entry_of_the_key(store):
    store.add(rows(0), key(0))
    other = [key(0, code='x'), key(1), key(0, samples=['s0', 's1'])]
    assert store.missing([key(0), *other]) == other
    assert digest(dict(a=1, b=2)) == digest(dict(b=2, a=1))

def test_read_by_key_and_by_column(store):
    store.add(rows(0).assign(how='zero'), key(0)); store.add(rows(1), key(1, analysis='b'))
    assert len(store.read(analysis='b')) == 3 and len(store.read(layer=[0, 1])) == 4 and len(store.read([key(0)], layer=2)) == 1
    assert store.read(analysis='c').empty and Store(store.folder/'nowhere').read().empty

def test_unequal_columns_join(store):
    store.add(rows(0), key(0)); store.add(rows(1).assign(box=[[0., 1.], None, [2., 3.]]), key(1))
    assert len(store.read()) == 6 and store.read().box.notna().sum() == 2

@pytest.mark.parametrize('damage', [lambda b: b[:len(b)//2], lambda b: b'', lambda b: b'not parquet', lambda b: b[:40] + bytes(200) + b[240:]])
def test_damaged_part_counts_as_missing(store, damage):
    store.add(rows(0), key(0)); store.add(rows(1), key(1))
    path = store.path(key(1))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match='cannot be read'):
        assert store.missing([key(0), key(1)]) == [key(1)]
    store.add(rows(1), key(1))
    assert len(store.read()) == 6

KILLED = '''
import os, sys
import pandas as pd, pyarrow.parquet as pq
from fusion_notebooks import results
whole = pq.write_table
def half(table, f, **kw):
    f.write(b'PAR1 half a part'); f.flush()
    print('writing', flush=True)
    import time; time.sleep(60)
pq.write_table = half
results.Store(sys.argv[1]).add(pd.DataFrame(dict(sample=['s'])), dict(model='m'))
'''

def test_killed_while_writing_leaves_no_part(store):
    child = subprocess.Popen([sys.executable, '-c', KILLED, str(store.folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == 'writing\n'
    child.send_signal(signal.SIGKILL); child.wait()
    assert not store.has(dict(model='m')) and store.read().empty and store.keys() == []
    store.add(rows(0), dict(model='m'))
    assert len(store.read()) == 3

def test_failure_while_writing_leaves_nothing(store, monkeypatch):
    monkeypatch.setattr('fusion_notebooks.results.pq.write_table', lambda *a, **kw: 1/0)
    with pytest.raises(ZeroDivisionError): store.add(rows(0), key(0))
    assert list(store.folder.iterdir()) == []

def _write(folder, which):
    for i in which: Store(folder).add(rows(i), key(i))

def test_reading_while_others_write(store):
    spawn = multiprocessing.get_context('spawn')
    writers = [spawn.Process(target=_write, args=(store.folder, range(k, 60 + k))) for k in (0, 20)]    # 40 units are written by both
    for w in writers: w.start()
    while any(w.is_alive() for w in writers):
        got = store.read()
        assert got.empty or (got.groupby('sample').size() == 3).all()
    assert [w.exitcode for w in writers] == [0, 0]
    assert len(store.read()) == 80*3 and not list(store.folder.glob('*.tmp'))
