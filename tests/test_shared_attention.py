"""Attention over shared prefixes equals attention over everything in one piece, by every kernel, and copies no prefix.

The kernels of accelerators cannot run here. Their stand-ins compute what torch's definition says, refuse what the real ones refuse (masks, lines of a bias that
begin at odd places), and give the log-sum-exp in the shape in which these give it.
"""

import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import noise_image, replaced
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_masking import same
from torch.utils._python_dispatch import TorchDispatchMode
from twins import family as twin

from fusion_notebooks import engine
from fusion_notebooks.engine import kernels, prefixes
from fusion_notebooks.engine.kernels import _aligned, _efficient, _flash, _for_cpu, _kernel_of, _written_out
from fusion_notebooks.engine.shared_attention import Shared, _over_shared
from fusion_notebooks.masking import sweep
from fusion_notebooks.mllm import Sample

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))
import bench  # noqa: E402

LOW = torch.finfo(torch.float32).min


# kernels


def flash_like(query, key, value, mask, causal, scaling):
    "Takes no mask"
    assert mask is None
    return _written_out(query, key, value, None, causal, scaling)


def efficient_like(query, key, value, mask, causal, scaling):
    "Takes a bias of full shape with aligned lines; gives the log-sum-exp with numbers that mean nothing behind it"
    bias = None if mask is None else _aligned(mask, query, key)
    if bias is not None:
        assert bias.shape == (*query.shape[:3], key.shape[2]) and bias.stride(-1) == 1
        assert all(step % 16 == 0 for step in bias.stride()[:3])
    out, weight = _written_out(query, key, value, bias, causal, scaling)
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[-1] % 32), value=torch.nan)
    return out, padded[..., : query.shape[2]]


def chosen_like_an_accelerator(query, key, value, mask, causal):
    return flash_like if mask is None else efficient_like


KERNELS = dict(cpu=lambda *a: _for_cpu, written=lambda *a: _written_out, accelerator=chosen_like_an_accelerator)


@pytest.mark.parametrize('kernel', [_flash, _efficient])
@pytest.mark.parametrize('queries', [1, 31, 32, 33])
def test_the_kernels_of_accelerators_give_what_is_taken_of_them(kernel, queries):
    "Of torch's own description of them: arguments are in their places, and a row of queries has one number"
    q, k = (torch.empty(2, 3, n, 16, device='meta', dtype=torch.bfloat16) for n in (queries, 45))
    mask = None if kernel is _flash else torch.empty(2, 1, queries, 45, device='meta')
    out, weight = kernel(q, k, k, mask, False, 0.25)
    assert out.shape == q.shape and weight.shape == (2, 3, queries) and weight.dtype == torch.float32


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('flash, efficient', [(True, True), (False, True), (False, False)])
def test_torch_is_asked_which_kernel_takes_the_tensors(monkeypatch, flash, efficient, masked):
    "On a device that is not the CPU"
    for name, can in dict(flash=flash, efficient=efficient).items():
        monkeypatch.setattr(torch.backends.cuda, f'can_use_{name}_attention', lambda params, can=can: can)
    q = torch.empty(2, 3, 4, 16, device='meta')
    mask = torch.empty(2, 1, 4, 4, device='meta') if masked else None
    want = _flash if flash and not masked else _efficient if efficient else _written_out
    assert _kernel_of(q, q, q, mask, False) is want
    odd = torch.empty(2, 3, 4, 12, device='meta')
    assert _kernel_of(odd, odd, odd, mask, False) is _written_out  # of 12 numbers, neither can be read


# merged attention against attention in one piece


def numbers(seed):
    g = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=g)


@st.composite
def problems(draw):
    "Rows that read prefixes, in any order, with biases of the picture, padding on either side and windows"
    ints = lambda a, b: draw(st.integers(a, b))
    plain, readers, key_heads, groups, T, n = ints(1, 3), ints(1, 3), ints(1, 2), ints(1, 3), ints(1, 5), ints(2, 9)
    reads = draw(st.permutations([p for p in range(plain) for _ in range(readers)]))
    if draw(st.booleans()):
        reads = sorted(reads)[: -1 if len(reads) > plain else None]  # unequally many readers
    first = ints(0, n - 1)
    heads = key_heads * groups
    bias = draw(st.sampled_from(['none', 'rows', 'heads']))
    values = st.sampled_from([0.0, -math.inf, -2.3, 1.5])
    wide = dict(none=0, rows=1, heads=heads)[bias]
    return dict(
        reads=list(reads),
        key_heads=key_heads,
        groups=groups,
        T=T,
        past=ints(0, 2),  # own keys from before
        n=n,
        picture=(first, ints(first + 1, n)),
        bias=[[draw(values) for _ in range(wide)] for _ in reads] if wide else None,
        blank=[
            ints(0, 1) * draw(st.booleans()) for _ in range(plain)
        ],  # keys at the beginning of a prefix that nothing sees
        padded=[draw(st.booleans()) * ints(0, T - 1) for _ in reads],  # first of the T rows that are padding
        window=draw(st.sampled_from([None, 3])),
        side_by_side=draw(st.booleans()),
        width=draw(st.sampled_from([8, 16])),
        seed=ints(0, 9),
    )


def posed(q):
    "(query, key, value, prefixes per row, mask in one piece of which `None` is the causal one)"
    randn, rows = numbers(q['seed']), len(q['reads'])
    plain, own = max(q['reads']) + 1, q['past'] + q['T']
    query = randn(rows, q['key_heads'] * q['groups'], q['T'], q['width'])
    key, value = randn(rows, q['key_heads'], own, q['width']), randn(rows, q['key_heads'], own, q['width'])
    keys, values = (randn(plain, q['key_heads'], q['n'], q['width']) for _ in range(2))
    if q['side_by_side']:
        read = [(keys[p], values[p]) for p in q['reads']]
    else:
        apart = [(k.clone(), v.clone()) for k, v in zip(keys, values)]
        read = [apart[p] for p in q['reads']]
    n = q['n']
    mask = torch.zeros(rows, 1, q['T'], n + own)
    mask.masked_fill_(~torch.ones(q['T'], n + own, dtype=torch.bool).tril(n + q['past']), LOW)
    for b, p in enumerate(q['reads']):
        mask[b, :, :, : q['blank'][p]] = LOW
        mask[b, :, :, n + q['past'] : n + q['past'] + q['padded'][b]] = LOW
    if q['window']:
        mask.masked_fill_(torch.ones(q['T'], n + own, dtype=torch.bool).tril(n + q['past'] - q['window']), LOW)
    return query, key, value, read, mask


def in_one_piece(query, key, value, read, mask, bias, picture):
    "The definition, in double precision"
    keys = torch.cat([torch.stack([k for k, _ in read]), key], 2).double()
    values = torch.cat([torch.stack([v for _, v in read]), value], 2).double()
    groups = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
    logits = query.double() @ keys.transpose(2, 3) * query.shape[-1] ** -0.5 + mask
    if bias is not None:
        logits[..., slice(*picture)] += bias.double()[:, :, None, None]
    return logits.softmax(-1) @ values


@pytest.mark.parametrize('kernel', KERNELS)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(q=problems())
def test_merged_equals_one_piece(monkeypatch, kernel, q):
    "Shapes × grouped heads × biases × padding × windows"
    monkeypatch.setattr(kernels, '_kernel_of', KERNELS[kernel])
    query, key, value, read, mask = posed(q)
    bias = None if q['bias'] is None else torch.tensor(q['bias'])
    key.shared = Shared(read, bias, q['picture'])
    want = in_one_piece(query, key, value, read, mask, bias, q['picture'])
    got, _ = _over_shared(None, query, key, value, mask.clone())
    real = torch.arange(q['T']) >= torch.tensor(q['padded'])[:, None]  # rows of padding mean nothing, but are numbers
    assert got.isfinite().all()
    assert (got.transpose(1, 2) - want).abs().amax((1, 3))[real].max() < 1e-5


@pytest.mark.parametrize('kernel', KERNELS)
def test_a_bias_apart_equals_a_bias_in_a_mask(monkeypatch, kernel):
    "What is left of masks where the picture is in one piece: nothing"
    monkeypatch.setattr(kernels, '_kernel_of', KERNELS[kernel])
    randn = numbers(0)
    query, key, value = randn(3, 4, 5, 8), randn(3, 2, 5, 8), randn(3, 2, 5, 8)
    prefix = randn(2, 9, 8), randn(2, 9, 8)
    bias = torch.tensor([[0.0] * 4, [-math.inf] * 4, [0.5, -1.0, -math.inf, 0.0]])
    mask = torch.zeros(3, 4, 5, 14).masked_fill(~torch.ones(5, 14, dtype=torch.bool).tril(9), LOW)
    lowered = mask.clone()
    lowered[..., 2:9] += bias[:, :, None, None].clamp(min=LOW / 2)
    key.shared = Shared([prefix] * 3, bias, (2, 9))
    apart, _ = _over_shared(None, query, key, value, mask)
    key.shared = Shared([prefix] * 3)
    within, _ = _over_shared(None, query, key, value, lowered)
    assert (apart - within).abs().max() < 1e-5


# whole ladders


SAMPLES = [
    Sample(noise_image(k, (96, 48)), q, id=f's{k}')
    for k, q in enumerate(
        ('What color is the circle?', 'Which digit?', 'Name the shape of the object at the top left.')
    )
]


@pytest.mark.parametrize('family', ['llava', 'qwen2_vl', 'gemma3', 'llava_next'])
@pytest.mark.parametrize('kernel', ['written', 'accelerator'])
def test_sweeps_are_the_same_by_every_kernel(monkeypatch, family, kernel):
    mllm = twin(family)
    kw = dict(how=('zero', 'swap', 'knockout', 'soft'), limit=3)
    want = sweep(mllm, SAMPLES, **kw)
    monkeypatch.setattr(kernels, '_kernel_of', KERNELS[kernel])
    same(sweep(mllm, SAMPLES, **kw), want)


@pytest.mark.parametrize('family', ['llava', 'qwen2_vl'])
def test_sweeps_of_heads_need_no_masks(monkeypatch, family):
    mllm = twin(family)
    kw = dict(how=('knockout', 'soft'), heads='each', layers=[1, 3], limit=3)
    monkeypatch.setattr(engine.BranchedBatch, 'biased', None)  # who asks for a mask fails
    fast = sweep(mllm, SAMPLES, **kw)
    monkeypatch.undo()
    naive = sweep(mllm, SAMPLES, exact='naive', **kw)
    assert set(fast.path) == {'plain', 'branches'}
    same(*(t.assign(layer=100 * t['layer'] + t['head']) for t in (fast, naive)))


class Made(TorchDispatchMode):
    "The sizes of the tensors that are made, by what; views make none, and what is multiplied with weights is no copy"

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, f, types, args=(), kw=None):
        out = f(*args, **(kw or {}))
        given = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x)}
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in given:
                self.sizes.setdefault(f.overloadpacket.__name__, []).append(x.numel())
        return out


def ladder_of(mllm, layers, tail):
    "(first forward of a ladder over one long prefix, its numbers): a knockout that enters at each layer"
    p = mllm.prompt(noise_image(0, (384, 384)), 'what ' * tail)
    n = int(p.visual[-1]) + 1
    shared = prefixes(mllm, [p], n)
    rows = [engine.Branch(0)] + [engine.Branch(0, i, bias={i: -math.inf}) for i in range(layers)]

    def work():
        branched = engine.BranchedBatch(mllm, rows, shared, [p.visual])
        return branched.forward(p.inputs['input_ids'][:, n:])

    return work, shared[0], p


def test_no_prefix_is_copied(monkeypatch):
    "Of a ladder over 1,600 visual tokens: nothing that is made is as large as the keys of one layer's prefix"
    work, prefix, _ = ladder_of(bench.build(6, 40), 6, 2)
    largest = prefix.keys[0].numel()
    with Made() as made:
        work()
    copying = {
        'cat',
        'stack',
        'clone',
        '_to_copy',
        'copy_',
        'index',
        'index_select',
        'repeat_interleave',
        'constant_pad_nd',
    }
    assert made.sizes and max(max(v) for k, v in made.sizes.items() if k in copying) < largest / 4
    assert sum(sum(v) for k, v in made.sizes.items() if k in copying) < 6 * largest
    replaced(monkeypatch, engine, '_can_be_apart', lambda m: False)  # and where it is copied, this is seen
    with Made() as made:
        work()
    assert max(map(max, made.sizes.values())) >= 2 * largest


@pytest.mark.parametrize('kernel', ['cpu', 'written'])
@pytest.mark.parametrize('kv', [4, 2])
def test_the_flops_of_a_ladder_are_its_bound(monkeypatch, kernel, kv):
    "Of each row the layers from which it enters on, whichever kernel attends; a bias of the picture costs nothing"
    monkeypatch.setattr(kernels, '_kernel_of', KERNELS[kernel])
    mllm = bench.build(6, 20, kv=kv)
    work, _, p = ladder_of(mllm, 6, 8)
    tail = p.length - int(p.visual[-1]) - 1
    whole = bench.flops(lambda: mllm.model(**p.inputs, use_cache=True, logits_to_keep=1))
    assert bench.flops(work) / whole == pytest.approx(tail / p.length * 4.5, rel=0.1)  # rows at its six layers: 2 to 7
