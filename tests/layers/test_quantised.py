"""Linear layers in few bits: what they keep, what they multiply, and what is saved of them."""

from __future__ import annotations

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from fastweights.layers import quantised
from fastweights.layers.quantised import FEW, GROUP, LINEAR, BFloat16Linear, Int4Linear, Int8Linear, kept_as
from fastweights.ops import few_bits
from tests import tolerances
from tests.ops.problems import error

ROUNDED = {BFloat16Linear: 0.003, Int8Linear: 0.01, Int4Linear: 0.1}
"""Of a matrix of normal numbers, its relative distance from what is kept (measured: 0.0017, 0.0045, 0.061)."""
KINDS = [*LINEAR.values()]


def make(kind, n: int = 64, m: int = 80, *, bias: bool = True, transposed: bool = False):
    torch.manual_seed(0)
    layer = Conv1D(m, n) if transposed else nn.Linear(n, m, bias=bias)
    with torch.no_grad():
        layer.weight.normal_()
        if layer.bias is not None:
            layer.bias.normal_()
    return layer, kind.of(layer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), [(64, 80), (96, 192), (32, 16)])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_kept_is_near(kind, n, m, transposed):
    layer, kept = make(kind, n, m, transposed=transposed)
    weight = layer.weight.T if transposed else layer.weight
    distance = (kept.matrix().float() - weight).norm() / weight.norm()
    assert 0 < distance < ROUNDED[kind]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, FEW, FEW + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_those_of_what_is_kept(kind, rows, dtype, transposed):
    _, kept = make(kind, transposed=transposed)
    x = torch.randn(2 if rows % 2 == 0 else 1, rows // 2 if rows % 2 == 0 else rows, 64).to(dtype)
    truth = nn.functional.linear(x.to(torch.bfloat16).double(), kept.matrix().double(), kept.bias.double())
    found = kept(x)
    assert found.dtype == dtype
    assert error(found, truth) <= 2 * tolerances.BFLOAT16


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [16, 80, 24])
@pytest.mark.parametrize("bf16", [False, True])
def test_many_tokens_on_cpus_with_products_of_bf16_and_without(kind, m, bf16, monkeypatch):
    monkeypatch.setattr(quantised, "has_bf16_products", lambda: bf16)
    _, kept = make(kind, m=m)
    x = torch.randn(7, 31, 64)
    rounded = kept.matrix(torch.bfloat16 if bf16 or kind is BFloat16Linear else torch.float32).double()
    truth = nn.functional.linear((x.bfloat16() if bf16 else x).double(), rounded, kept.bias.double())
    exact = tolerances.EIGHT_BITS if kind is Int4Linear else tolerances.FIFTEEN_BITS
    assert error(kept(x), truth) <= (2 * tolerances.BFLOAT16 if bf16 else exact)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_is_the_same_packed_or_not(kind, monkeypatch):
    _, kept = make(kind, m=192)
    found = {dtype: kept.matrix(dtype) for dtype in (torch.float32, torch.bfloat16)}
    monkeypatch.setattr(few_bits, "lanes", lambda: 0)
    for dtype, matrix in found.items():
        assert matrix.dtype == dtype
        assert kept.matrix(dtype).equal(matrix)


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 3, 12, 33, 100])
@pytest.mark.parametrize("rows", [1, 5])
def test_odd_sizes_of_eight_bits(n, rows):
    """For which torch's kernel reads beyond the end of a row."""
    for m in (1, 7, 64):
        _, kept = make(Int8Linear, n, m)
        x = torch.randn(rows, n)
        truth = nn.functional.linear(x.bfloat16().double(), kept.matrix().double(), kept.bias.double())
        assert error(kept(x), truth) <= 2 * tolerances.BFLOAT16


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_casts_leave_what_is_kept(kind, dtype):
    _, kept = make(kind)
    x = torch.randn(3, 64)
    before, state = kept(x), kept.state_dict()
    assert kept.to(dtype)(x).equal(before)
    for name, tensor in kept.state_dict().items():
        assert tensor.dtype == state[name].dtype


@torch.no_grad()
def test_a_matrix_on_the_grid_of_four_bits_is_kept_exactly():
    """As those of a Q4_1 file are, up to the scales' own rounding."""
    layer = nn.Linear(64, 16, bias=False)
    codes = torch.randint(16, (16, 2, GROUP))
    codes[..., 0], codes[..., 1] = 0, 15  # each group uses all of it
    layer.weight.copy_((0.25 * (codes - 8) + 0.5).flatten(1))
    assert Int4Linear.of(layer).matrix().float().equal(layer.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_a_constant(kind):
    layer = nn.Linear(32, 16)
    nn.init.zeros_(layer.weight)
    assert kind.of(layer).matrix().abs().max() < 1e-10
    nn.init.constant_(layer.weight, 3.0)
    assert error(kind.of(layer).matrix().float(), layer.weight.detach()) < 0.01


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [16, 80, 192])
def test_saved_and_loaded(kind, m):
    layer, kept = make(kind, m=m)
    state, x = kept.state_dict(), torch.randn(3, 64)
    fresh = kind(64, m, bias=True)
    fresh.load_state_dict(state)
    again = kind.of(layer)
    again.load_state_dict(state)  # into one that is packed already
    for other in (fresh, again, copy.deepcopy(kept)):
        assert other(x).equal(kept(x))
        for name, tensor in other.state_dict().items():
            assert tensor.equal(state[name]), name


@torch.no_grad()
def test_four_bits_are_saved_in_one_order_whatever_the_machine():
    """Two numbers of a row in a byte, the first in the lower bits, whatever order the kernel wants them in."""
    _, kept = make(Int4Linear, m=192)
    scale, offset = kept.scales.float().permute(2, 1, 0)[..., None]
    numbers = ((kept.matrix().float().unflatten(1, (-1, GROUP)) - offset) / scale + 8).round().flatten(1).byte()
    assert kept.state_dict()["weight"].equal(numbers[:, ::2] + 16 * numbers[:, 1::2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [2, 2 * FEW])
def test_gradients_reach_the_input(kind, rows):
    _, kept = make(kind)
    x = torch.randn(rows, 64, requires_grad=True)
    kept(x).sum().backward()
    assert error(x.grad, kept.matrix().float().sum(0).expand(rows, -1)) <= 4 * tolerances.BFLOAT16


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_forward_derivatives(kind):
    _, kept = make(kind)
    x, tangent = torch.randn(2, 2, 64)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(kept(forward_ad.make_dual(x, tangent))).tangent
    assert error(found, tangent @ kept.matrix().float().T) <= 2 * tolerances.BFLOAT16


def test_which_matrix_is_kept_how():
    assert kept_as("int4", 64, 32, eight=False) is Int4Linear
    assert kept_as("int4", 64, 32, eight=True) is Int8Linear
    assert kept_as("int4", 40, 32, eight=False) is Int8Linear
    assert kept_as("int4", 64, 30, eight=False) is Int8Linear
    assert kept_as("bf16", 40, 30, eight=True) is BFloat16Linear


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_joined_layers_make_what_each_does(kind, monkeypatch):
    layers = []
    for seed, m in enumerate((64, 192)):
        torch.manual_seed(seed)
        layers.append(kind.of(nn.Linear(64, m, bias=False)))
    x = torch.randn(1, 64)
    before, states = [layer.few(x) for layer in layers], [layer.state_dict() for layer in layers]
    blocks, seen, find = [layer._block for layer in layers], [], quantised._where_they_are

    def watched(parts, axis):
        seen.append([layer._block for layer in layers])  # what another thread would see
        return find(parts, axis)

    monkeypatch.setattr(quantised, "_where_they_are", watched)
    joined = kind.join(layers)
    assert joined is not None
    assert all(each == blocks for each in seen)
    assert seen
    assert joined.few(x).equal(torch.cat(before, 1))
    for layer, made, state in zip(layers, before, states, strict=True):
        assert layer.few(x).equal(made)
        assert layer.weight.untyped_storage().data_ptr() == joined.weight.untyped_storage().data_ptr()
        for name, tensor in layer.state_dict().items():
            assert tensor.equal(state[name])
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, "a file would hold the others, too"


def test_what_cannot_be_joined():
    make_one = lambda kind, m, bias: kind.of(nn.Linear(64, m, bias=bias))  # noqa: E731
    assert Int8Linear.join([make_one(Int8Linear, 16, True), make_one(Int8Linear, 16, False)]) is None
    assert Int8Linear.join([make_one(Int8Linear, 16, False), make_one(Int4Linear, 16, False)]) is None
    four = [make_one(Int4Linear, 16, False), make_one(Int4Linear, 64, False)]
    assert (Int4Linear.join(four) is None) == (four[0]._block not in few_bits.LANES)
    four[0]._block = 0  # as where one was packed and another not
    assert Int4Linear.join(four) is None
    other = make_one(Int8Linear, 64, False)
    other._block = -1
    assert Int8Linear.join([make_one(Int8Linear, 64, False), other]) is None


@torch.no_grad()
@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_what_another_machine_packed_is_multiplied_all_the_same(kind, monkeypatch):
    """As in a module that was pickled there; and where there is no kernel at all."""
    _, kept = make(kind, m=192)
    x, state = torch.randn(3, 64), kept.state_dict()
    expected = nn.functional.linear(x.double(), kept.matrix().double(), kept.bias.double())
    with monkeypatch.context() as patch:
        patch.setattr(few_bits, "lanes", lambda: 8 if kept._block == 16 else 16)
        there = copy.deepcopy(kept)
        there.load_state_dict(state)  # packs anew
    patch = monkeypatch
    for lanes in (0, kept._block):
        patch.setattr(few_bits, "lanes", lambda lanes=lanes: lanes)
        for layer in (there, kept):
            assert error(layer(x), expected) <= 2 * tolerances.BFLOAT16
            for name, tensor in layer.state_dict().items():
                assert tensor.equal(state[name]), name


@pytest.mark.parametrize("weights", LINEAR)
@torch.no_grad()
def test_called_with_the_same_numbers_in_other_tensors(weights):
    """Detached they know nothing of their order; a copy of what is saved is in that of files."""
    layer, x = LINEAR[weights].of(nn.Linear(64, 64)), torch.randn(3, 64)
    detached = {name: buffer.detach() for name, buffer in layer.named_buffers()}
    assert torch.func.functional_call(layer, detached, (x,)).equal(layer(x))
    assert error(torch.func.functional_call(layer, layer.state_dict(), (x,)), layer(x)) <= 2 * tolerances.BFLOAT16
    assert copy.deepcopy(layer)(x).equal(layer(x))
    sent = pickle.loads(ForkingPickler.dumps(layer))  # as torch.multiprocessing sends it
    assert sent(x).equal(layer(x))
    sent.load_state_dict(layer.state_dict())
    assert sent(x).equal(layer(x))
