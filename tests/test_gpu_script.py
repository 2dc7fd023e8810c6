"The prepared GPU run, as it is on a CPU with small models: all of it, and any part alone"

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

SCRIPT = Path(__file__).parents[1] / 'benchmarks/gpu.py'


def run(*args):
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True)


def test_all_of_it_runs_and_is_written(tmp_path):
    done = run('--tiny', '--out', tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    table = pd.read_csv(tmp_path / 'gpu.csv').set_index('what').value
    assert (table[table.index.str.contains('self-checks that fail')] == 0).all(), done.stdout
    assert (table[table.index.str.contains('in float32')] < 1e-5).all()
    for model in ('llava', 'llava_next', 'qwen'):
        for what in ('knockout', 'swap', 'zero', 'capture', 'causal map', 'refine by mask', 'refine by crop'):
            assert table.index.str.startswith(f'{model}: {what}').any(), (model, what)
    assert (table[table.index.str.contains('samples per second')] > 0).all()
    assert 'Costs on a GPU' in (tmp_path / 'gpu.md').read_text()


def test_a_part_alone_leaves_the_rest_of_the_record(tmp_path):
    assert run('--tiny', '--out', tmp_path, 'exact.llava').returncode == 0
    one = pd.read_csv(tmp_path / 'gpu.csv')
    assert set(one.what.str.split(':').str[0]) == {'llava'} and len(one) == 3
    assert run('--tiny', '--out', tmp_path, 'exact.qwen').returncode == 0
    both = pd.read_csv(tmp_path / 'gpu.csv')
    assert len(both) == 6 and both[:3][['what', 'value']].equals(one[['what', 'value']])


def test_what_does_not_begin_is_said(tmp_path):
    done = run('--tiny', '--minutes', 0, '--out', tmp_path, 'study', 'exact')
    assert done.returncode == 0 and 'study.llava study.llava_next exact.llava exact.qwen' in done.stdout
    assert not (tmp_path / 'gpu.csv').exists()


def test_a_name_that_is_none_is_refused():
    done = run('--tiny', 'llavva')
    assert done.returncode == 2 and "no part or model 'llavva'" in done.stderr


def test_without_an_accelerator_it_says_so():
    import torch

    if torch.accelerator.is_available():
        pytest.skip('there is one')
    done = run()
    assert done.returncode == 2 and 'No accelerator here' in done.stderr
