"Accelerators of every kind, none of which is here: their modules are stood in for by ones that say the same"

from types import SimpleNamespace

import psutil
import pytest
import torch

from fusion_notebooks.mllm import MLLM, accelerator, device_label, device_named, dtype_of, empty_cache, free_memory
from fusion_notebooks.mllm.batching import in_batches

GB = 10**9


def module_of(monkeypatch, **what):
    "torch.get_device_module gives a module of these functions"
    module = SimpleNamespace(**what)
    monkeypatch.setattr(torch, 'get_device_module', lambda device=None: module)
    return module


def unable(device):
    raise RuntimeError("The device doesn't support querying the available free memory")


def found(monkeypatch, kind):
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda check_available=False: torch.device(kind))


@pytest.mark.parametrize('kind', ['cuda', 'xpu', 'mps'])
def test_the_accelerator_that_torch_names_is_the_default(monkeypatch, kind):
    assert accelerator().type == 'cpu' or torch.accelerator.is_available()
    found(monkeypatch, kind)
    assert accelerator() == device_named(None) == torch.device(kind)


@pytest.mark.parametrize('kind', ['cuda', 'xpu'])
def test_free_is_what_the_driver_has_and_what_torch_holds_unused(monkeypatch, kind):
    held = dict(memory_reserved=lambda d: 7 * GB, memory_allocated=lambda d: 4 * GB)
    module_of(monkeypatch, mem_get_info=lambda d: (20 * GB, 48 * GB), **held)
    assert free_memory(torch.device(kind)) == 23 * GB
    total = SimpleNamespace(total_memory=48 * GB)
    module_of(monkeypatch, mem_get_info=unable, get_device_properties=lambda d: total, **held)
    assert free_memory(torch.device(kind)) == (48 - 4) * GB  # a driver that does not say


@pytest.mark.parametrize('available, free', [(64, 24 - 10 + 10 - 6), (5, 5 + 10 - 6), (0, 10 - 6)])
def test_an_apple_machine_has_one_memory(monkeypatch, available, free):
    module_of(
        monkeypatch,
        recommended_max_memory=lambda: 24 * GB,
        driver_allocated_memory=lambda: 10 * GB,
        current_allocated_memory=lambda: 6 * GB,
    )
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: SimpleNamespace(available=available * GB))
    assert free_memory(torch.device('mps')) == free * GB


def test_what_a_device_cannot_multiply_in_is_not_its_default(monkeypatch):
    "Of the old Metal, which has no bfloat16"

    def refused(self):
        raise TypeError('BFloat16 is not supported on MPS')

    assert dtype_of(torch.device('cpu')) == torch.float32
    real = torch.ones
    monkeypatch.setattr(torch, 'ones', lambda *a, device=None, **kw: real(*a, **kw))
    assert dtype_of(torch.device('mps')) == torch.bfloat16
    monkeypatch.setattr(torch.Tensor, 'bfloat16', refused)
    assert dtype_of(torch.device('mps')) == torch.float32


def test_memory_is_given_back_by_whatever_accelerator_ran_out(monkeypatch):
    calls = []
    found(monkeypatch, 'mps')
    module = module_of(monkeypatch, empty_cache=lambda: calls.append('given back'))

    def work(some):
        if len(some) > 2:
            raise RuntimeError('MPS backend out of memory (MPS allocated: 17 GB)')
        return [2 * x for x in some]

    assert in_batches(work, list(range(5)), 4) == [0, 2, 4, 6, 8] and calls == ['given back']
    empty_cache(torch.device('xpu'))
    assert len(calls) == 2
    empty_cache(torch.device('cpu'))
    assert len(calls) == 2
    assert device_label(torch.device('mps')) == 'mps'  # tells no name
    module.get_device_name = lambda device: 'Accelerator 3000'
    assert device_label(torch.device('xpu')) == 'Accelerator 3000'


def test_a_model_goes_where_the_accelerator_is(monkeypatch):
    "Where it cannot go, torch's own reason is said; nothing falls back to the CPU without a word"
    found(monkeypatch, 'xpu')
    if not torch.xpu.is_available():
        with pytest.raises((OSError, RuntimeError, AssertionError), match='(?i)xpu'):
            MLLM.load('glyph-llava', dtype=torch.float32)
    assert MLLM.load('glyph-llava', device='cpu').device.type == 'cpu'


def test_the_kinds_of_accelerators_are_told_apart_in_one_room():
    from pathlib import Path

    import fusion_notebooks

    folder = Path(fusion_notebooks.__file__).parent
    kinds = ('torch.cuda', 'torch.mps', 'torch.xpu', "'cuda'", "'mps'", "'xpu'")
    naming = {p.stem for p in folder.rglob('*.py') if any(kind in p.read_text() for kind in kinds)}
    assert naming == {'devices'}


@pytest.mark.parametrize('free, at_once', [(10**12, 64), (0, 1)])
def test_an_accelerator_gets_as_many_samples_as_its_memory_holds(monkeypatch, free, at_once):
    from conftest import replaced

    from fusion_notebooks import engine

    mllm = MLLM.load('glyph-llava', device='cpu')
    assert engine.samples_at_once(mllm, 100) == 16
    monkeypatch.setattr(MLLM, 'device', property(lambda self: torch.device('xpu')))
    replaced(monkeypatch, engine, 'free_memory', lambda device: free)
    assert engine.samples_at_once(mllm, 100) == at_once
    one = 100 * mllm.n_layers * 2 * 6 * 32 * 4  # bytes of the keys and values of 100 rows
    replaced(monkeypatch, engine, 'free_memory', lambda device: 4 * 10 * one)
    assert engine.samples_at_once(mllm, 100) == 10
    assert engine.fitting(mllm, 1000, 40) == engine.fitting(mllm, 10, 40)  # no row copies a prefix
