"""Numbers in eight bits: the nearest of their format, the same however often, NaN where it was."""

import math

import pytest
import torch

from fastweights.layers.eight_bits import BLOCK, EightBits, rounded
from fastweights.ops.numba.runtime import load_kernels

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def definition(numbers):
    """Of one block: the nearest of the multiples of 2^(e - 6) up to 127, 2^e being the largest power in the block."""
    most = max(abs(x) for x in numbers)
    step = 2.0 ** ((math.frexp(most)[1] - 1 if most else 0) - 6)
    return [max(-127, min(127, round(x / step))) * step for x in numbers]


@pytest.mark.parametrize("width", [1, 5, 32, 48, 64])
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 3.7, 1e20])
def test_the_definition(width, scale):
    torch.manual_seed(width)
    x = scale * torch.randn(7, width, dtype=torch.float64) * torch.logspace(-3, 1, width, dtype=torch.float64)
    x[0] = 0.0
    found = rounded(x)
    for row, near in zip(x, found, strict=True):
        for block, of_block in zip(row.split(BLOCK), near.split(BLOCK), strict=True):
            assert of_block.tolist() == definition(block.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_rounded_stays_as_it_is(dtype):
    torch.manual_seed(0)
    x = torch.randn(1000, 48).to(dtype) * torch.logspace(-2, 2, 1000)[:, None].to(dtype)
    once = rounded(x)
    assert once.dtype == dtype
    assert torch.equal(rounded(once), once)
    wide = EightBits.of(x)
    assert torch.equal(wide.numbers(), once)
    assert torch.equal(EightBits(wide.codes, wide.exponents, torch.float64).numbers(), once.double())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_in_its_block_alone(bad):
    x = torch.ones(3, 64)
    x[1, 40] = bad
    found = rounded(x)
    assert found[1, BLOCK:].isnan().all()
    assert torch.equal(found[[0, 2]], x[[0, 2]])
    assert torch.equal(found[1, :BLOCK], x[1, :BLOCK])
    assert EightBits.of(x[:1]).is_finite()
    assert not EightBits.of(x).is_finite()


@torch.no_grad()
def test_dithered_numbers_are_the_next_ones_and_right_in_the_mean():
    torch.manual_seed(0)
    x = torch.randn(6, 40)
    x[:, 0] = 4.0
    tokens = 4096
    found = torch.stack([EightBits.of(x, token).numbers() for token in range(tokens)])
    step = torch.full_like(x, 4 / 64)
    step[:, BLOCK:] = 2.0 ** (torch.frexp(x[:, BLOCK:].abs().amax(1, keepdim=True))[1] - 7)
    assert ((found - x).abs() < step).all()
    assert ((found.mean(0) - x).abs() / step).max() <= 2 / 1000


@torch.no_grad()
def test_a_slow_decay_adds_up():
    """Which to the nearest it does not: each step would be rounded away."""
    torch.manual_seed(0)
    first, keep, tokens = torch.randn(16, 64), 0.9995, 2000
    dithered = nearest = first
    for token in range(tokens):
        dithered = EightBits.of(keep * dithered, token).numbers()
        nearest = EightBits.of(keep * nearest).numbers()
    expected = keep**tokens * first
    assert (dithered - expected).norm() <= 0.06 * expected.norm()
    assert (nearest - expected).norm() >= 0.5 * expected.norm()


@torch.no_grad()
def test_slow_growth_adds_up():
    """Also that of a block's largest number, over powers of two."""
    torch.manual_seed(0)
    aim, tokens = torch.randn(16, 64), 2000
    found = 0.1 * aim
    for token in range(tokens):
        found = EightBits.of(found + (aim - found) / 400, token).numbers()
    expected = aim + 0.9 * (1 - 1 / 400) ** tokens * -aim
    assert (found - expected).norm() <= 0.06 * expected.norm()
    largest = expected.unflatten(1, (-1, BLOCK)).abs().amax(-1)
    assert ((found.unflatten(1, (-1, BLOCK)).abs().amax(-1) - largest).abs() <= 0.12 * largest).all()


def test_gradients_pass():
    x = torch.randn(4, 40, requires_grad=True)
    y = rounded(x)
    assert torch.equal(y, rounded(x.detach()))
    weight = torch.randn(4, 40)
    (y * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    _, tangent = torch.func.jvp(rounded, (x.detach(),), (weight,))
    assert torch.equal(tangent, weight)


@pytest.mark.parametrize("width", [5, 32, 48, 64])
def test_the_kernels_numbers_are_the_same(width):
    kernels = load_kernels("decoding")
    torch.manual_seed(1)
    scales = torch.logspace(-38, 38, 300)[:, None]
    x = torch.randn(300, width) * scales
    x[3], x[4, 0], x[5, -1], x[6, 0] = 0.0, math.nan, math.inf, 1e-42
    expected = EightBits.of(x)
    codes, exponents = (torch.empty_like(part).numpy() for part in expected[:2])
    number, out = torch.empty(1).numpy(), torch.empty_like(x).numpy()
    for i, row in enumerate(x.numpy()):
        kernels._round(row, codes[i], exponents[i], number)
        kernels._numbers(codes[i], exponents[i][:, None], 0, number, out[i])
    finite = expected.exponents > -128
    assert torch.equal(torch.from_numpy(exponents), expected.exponents)
    of_number = finite.repeat_interleave(BLOCK, 1)[:, :width]
    assert torch.equal(torch.from_numpy(codes)[of_number], expected.codes[of_number])
    torch.testing.assert_close(torch.from_numpy(out), expected.numbers(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("width", [5, 32, 48, 64, 65])
@pytest.mark.parametrize("token", [0, 3, 2**31 + 7])
def test_the_kernels_states_are_the_same(width, token):
    kernels = load_kernels("decoding")
    torch.manual_seed(1)
    x = torch.randn(300, width) * torch.logspace(-38, 38, 300)[:, None]
    x[3], x[4, 0], x[5, -1], x[6, 0] = 0.0, math.nan, math.inf, 1e-42
    expected = EightBits.of(x, token)
    codes, exponents = (torch.empty_like(part).numpy() for part in expected[:2])
    number, out = torch.empty(1).numpy(), torch.empty_like(x).numpy()
    kernels._round_state(x.numpy(), token, codes, exponents, number)
    kernels._load_state(codes, exponents, number, out)
    assert torch.equal(torch.from_numpy(exponents), expected.exponents)
    of_number = (expected.exponents > -128).repeat_interleave(BLOCK, 1)[:, :width]
    assert torch.equal(torch.from_numpy(codes)[of_number], expected.codes[of_number])
    torch.testing.assert_close(torch.from_numpy(out), expected.numbers(), rtol=0, atol=0, equal_nan=True)
    whole = expected.numbers()[of_number.all(1)]
    assert torch.equal(EightBits.of(whole, token + 1).numbers(), whole)
