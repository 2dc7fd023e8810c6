"""The command `fusion` on an analysis that needs neither torch nor a model, and that breaks when asked to (environment variables FAKE_*).
Run as a script, so that the workers it starts, which import it, have the same analysis. Used by test_faults.py."""

import errno, os, signal, sys, time, types, zlib
import numpy as np, pandas as pd
from fusion_notebooks import study

get = lambda name, default=0.0: float(os.environ.get(f'FAKE_{name}', default))


def hit(name, samples):
    return any(s.id in os.environ.get(f'FAKE_{name}', '').split() for s in samples)


class Model:
    gate, thinks = None, False

    def provenance(self):
        return dict(dtype='float32', attention='none', pixels='', device='cpu', commit='')


def draw(benchmark, split, limit, seed=0, *_):
    return tuple(
        types.SimpleNamespace(
            id=f'{split}-{i}', kind='fine', question=f'question {i}', answers=('a',), box=None, image=f'{i}.png'
        )
        for i in range(limit)
    )


def load(model, s=None):
    open(os.environ['FAKE_LOG'] + '.loads', 'a').close()
    time.sleep(get('LOAD'))
    return Model()


def rows(mllm, samples, seed, **_):
    with open(os.environ['FAKE_LOG'], 'a') as f:
        f.write(f'{samples[0].id} {os.getpid()}\n')
    time.sleep(get('SECONDS', 0.05))
    if hit('ABORT', samples):
        os.abort()
    if hit('KILL', samples):
        os.kill(os.getpid(), signal.SIGKILL)
    if hit('KILL_ONCE', samples):
        try:
            os.close(os.open(os.environ['FAKE_LOG'] + '.once', os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), signal.SIGKILL)
        except FileExistsError:
            pass
    if hit('MEMORY', samples):
        np.ones(10**14)
    out = []
    for s in samples:
        rng = np.random.default_rng([seed, zlib.crc32(s.id.encode())])
        out += [
            dict(
                sample=s.id,
                layer=l,
                score=float(rng.random()),
                logp=float('nan') if hit('NAN', [s]) else float(rng.normal()),
                map=rng.random(4).tolist(),
            )
            for l in range(4)
        ]
    return pd.DataFrame(out)


def put(name, value):
    "Put something else in place of a name in every room of the study that uses it"
    rooms = [room for key, room in sys.modules.items() if key.startswith(study.__name__) and name in vars(room)]
    assert rooms, name
    for room in rooms:
        setattr(room, name, value)


put('draw', draw)
put('load', load)
put('ANALYSES', dict(early_exit=study.Analysis(rows, lambda *_: {}, 'results', lambda L: L)))

if name := os.environ.get('FAKE_DIE'):
    put(name, lambda *a, **kw: os.kill(os.getpid(), signal.SIGKILL))
if get('FULL'):  # one file in so many finds the disk full
    real, rng = os.fsync, np.random.default_rng(os.getpid())

    def fsync(f):
        if rng.random() < 1 / get('FULL'):
            raise OSError(errno.ENOSPC, 'No space left on device')
        return real(f)

    os.fsync = fsync
if get('CLOCK'):  # every look at the clock shows an earlier time
    now = [time.time()]

    def back():
        now[0] -= 1000
        return now[0]

    time.time = back
if get('USER'):  # from here on somebody who may not do much
    import encodings.utf_8_sig, fcntl, fusion_notebooks.cli  # Python's own folder may be closed to that user
    from typer.main import get_command

    get_command(fusion_notebooks.cli.app).commands['study'].make_context('study', ['--limit', '1'])
    study.work_units.version('torch')
    study.settings.resource('nbs/analyses')
    os.setuid(int(get('USER')))
if get('FSIZE'):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (int(get('FSIZE')), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def cluster(settings):
    "The study on a Dask cluster of two processes, one of which is killed"
    import threading
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, host='127.0.0.1', dashboard_address=None) as c:
        victim = next(iter(c.workers.values())).process.process.pid

        def strike():
            while (
                not os.path.exists(os.environ['FAKE_LOG']) or f' {victim}\n' not in open(os.environ['FAKE_LOG']).read()
            ):
                time.sleep(0.05)
            os.kill(victim, signal.SIGKILL)  # it has begun a unit

        threading.Thread(target=strike, daemon=True).start()
        return study.run(study.choose(settings), scheduler=c.scheduler_address, figures=False).code


if __name__ == '__main__':
    if sys.argv[1] == 'table':
        study.require('early_exit', sys.argv[3], settings=sys.argv[2]).to_pickle(sys.argv[4])
    elif sys.argv[1] == 'cluster':
        sys.exit(cluster(sys.argv[2]))
    else:
        from fusion_notebooks.cli import main

        sys.exit(main())
