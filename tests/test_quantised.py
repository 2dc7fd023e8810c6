"Models of 8-bit weights, by whichever library is installed: what is kept, the ladder and the doctor work as on any other"

import pytest
import torch
from test_masking import same

from fusion_notebooks import demo, masking
from fusion_notebooks.doctor import doctor
from fusion_notebooks.mllm import MLLM, Sample


def torchao(decoder):
    library = pytest.importorskip('torchao.quantization')
    library.quantize_(decoder, library.Int8WeightOnlyConfig())


def quanto(decoder):
    library = pytest.importorskip('optimum.quanto')
    library.quantize(decoder, weights=library.qint8)
    library.freeze(decoder)


@pytest.fixture(scope='module', params=[torchao, quanto])
def quantised(request):
    mllm = MLLM.load('glyph-llava', 'cpu', torch.float32)
    request.param(mllm.model.get_decoder())
    assert type(mllm.layers[0].self_attn.q_proj.weight) not in (torch.nn.Parameter, torch.Tensor)
    return mllm


def test_sweeps_equal_naive_ones(quantised):
    some = [Sample(s.image, s.question, id=f'{k}') for k, s in enumerate(demo.samples(2))]
    kw = dict(how=('zero', 'knockout', 'swap'), layers=[1, 4], limit=2)
    fast = masking.sweep(quantised, some, **kw)
    assert set(fast.path) == {'plain', 'bank', 'branches'}
    same(fast, masking.sweep(quantised, some, exact='naive', **kw))


def test_the_state_knows_the_numbers_of_its_weights(quantised):
    "Nothing is kept across a change of what a quantised weight holds"
    from fusion_notebooks.mllm.state import _parts

    before, inner = quantised.state(), _parts(quantised.layers[0].self_attn.q_proj.weight)
    assert before is not None and before == quantised.state() and len(inner) > 1
    inner[0].data.view(torch.int8)[0, 0] += 1
    assert quantised.state() != before
    inner[0].data.view(torch.int8)[0, 0] -= 1
    assert quantised.state() == before


def test_the_doctor_finds_nothing(quantised):
    assert [(c.name, c.reason) for c in doctor(quantised).checks if not c.ok] == []
