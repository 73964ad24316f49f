"""Products with matrices of few bits, against float64, and that they touch nothing beside them."""

from __future__ import annotations

import pytest
import torch

from fastweights.ops import few_bits
from tests import tolerances
from tests.ops.problems import error, threads_of_torch

pytestmark = pytest.mark.skipif(not few_bits.lanes(), reason="this machine has no such kernel: it needs AVX2 and Numba")
SHAPES = [(32, 16), (96, 80), (576, 192), (1536, 576)]


def matrix(bits: int, n: int, m: int):
    """(packed, scales, the matrix in float64)"""
    generator = torch.Generator().manual_seed(n + m)
    if bits == 4:
        numbers = torch.randint(0, 16, (m, n), generator=generator, dtype=torch.uint8)
        scales = torch.randn(n // 32, m, 2, generator=generator).bfloat16()
        scale, offset = (x.double().T.repeat_interleave(32, 1) for x in scales.unbind(-1))
        return few_bits.pack_four(numbers), scales, (numbers.double() - 8) * scale + offset
    numbers = torch.randint(-127, 128, (m, n), generator=generator, dtype=torch.int8)
    scales = torch.randn(m, generator=generator).bfloat16()
    return few_bits.pack_eight(numbers), scales, numbers.double() * scales.double()[:, None]


def rows_of(rows: int, n: int):
    """Channels as unlike in size as those of a language model."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, n, generator=generator) * torch.exp(2 * torch.randn(n, generator=generator))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "m"), SHAPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 4, 7, 16])
def test_agrees_with_float64(bits, n, m, rows):
    packed, scales, truth = matrix(bits, n, m)
    x = rows_of(rows, n)
    found = few_bits.multiply(x, packed, scales)
    assert found.shape == (rows, m)
    for row, expected in zip(found, x.double() @ truth.T, strict=True):
        assert error(row, expected) <= tolerances.FIFTEEN_BITS


def rounded(x, bits: int):
    """What many rows become, in float64: where the matrix has four bits, groups of small steps are rounded to eight."""
    groups = x.unflatten(1, (-1, few_bits.GROUP))
    steps = groups.abs().amax(-1, keepdim=True) / 127
    numbers = groups * (1 / steps)  # in float32, as there: a tie must fall to the same side
    whole = numbers.round()
    rest = ((numbers - whole) * 254).round()
    if bits == 4:
        rest *= steps.square() > 2 * steps.square().mean(1, keepdim=True)
    return (steps.double() * (whole.double() + rest.double() / 254)).flatten(1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "m"), SHAPES)
@pytest.mark.parametrize("rows", [17, 32, 203])
def test_many_rows_agree_with_what_they_are_rounded_to(bits, n, m, rows):
    packed, scales, truth = matrix(bits, n, m)
    x = rows_of(rows, n)
    found, expected = few_bits.multiply(x, packed, scales), rounded(x, bits)
    for row, of_expected in zip(found, expected @ truth.T, strict=True):
        assert error(row, of_expected) <= tolerances.FLOAT32
    largest = x.unflatten(1, (-1, few_bits.GROUP)).abs().amax(-1, keepdim=True)
    off = ((x - expected).unflatten(1, (-1, few_bits.GROUP)) / largest).abs().amax(-1)
    assert off.max() <= 1.001 / 254  # half a step
    if bits == 4 and n > 96:
        assert (off < 1e-4).any(1).all()
        assert (off > 1e-3).any(1).all()
    elif bits == 8:
        assert off.max() <= 1.01 / 254**2


@pytest.mark.parametrize("bits", [4, 8])
def test_few_rows_lose_less_than_many(bits):
    packed, scales, truth = matrix(bits, 576, 192)
    x = rows_of(few_bits.FEW + 1, 576)
    expected = x.double() @ truth.T
    few, many = (error(few_bits.multiply(x[:rows], packed, scales), expected[:rows]) for rows in (len(x) - 1, len(x)))
    assert few <= tolerances.FIFTEEN_BITS
    assert (many > 4 * few) == (bits == 4)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_is_the_same_bit_for_bit_beside_any_others_and_on_any_threads(bits, monkeypatch):
    monkeypatch.setattr(few_bits, "_WORTH_A_TEAM", 1)
    packed, scales, _ = matrix(bits, 576, 192)
    x, found = rows_of(7, 576), []
    for threads in (1, 2, 5):
        with threads_of_torch(threads):
            found += [few_bits.multiply(x, packed, scales), few_bits.multiply(x[:3], packed, scales)]
    for other in found[1:]:
        assert other.equal(found[0][: len(other)])


@pytest.mark.parametrize("bits", [4, 8])
def test_more_rows_than_stay_in_the_cache(bits, monkeypatch):
    """They are multiplied a tile at a time, of which the last is short; each as beside any other many."""
    packed, scales, truth = matrix(bits, 576, 80)
    x = rows_of(203, 576)
    found = few_bits.multiply(x, packed, scales)
    assert error(found, rounded(x, bits) @ truth.T) <= tolerances.FLOAT32
    monkeypatch.setattr(few_bits, "_WORTH_A_TEAM", 1)
    assert found.equal(few_bits.multiply(x, packed, scales))
    if bits == 8:
        assert error(found, x.double() @ truth.T) <= tolerances.FIFTEEN_BITS
        for row in (0, 63, 64, 202):
            assert found[row].equal(few_bits.multiply(x[row : row + 1], packed, scales)[0])
    for first in (0, 1, 63, 186):
        assert found[first : first + 17].equal(few_bits.multiply(x[first : first + 17], packed, scales))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("code", ["least", "most"])
def test_the_largest_sums(bits, code):
    """Which is where whole numbers of too few bits would overflow."""
    low, high = (0, 15) if bits == 4 else (-127, 127)
    pack, dtype = (few_bits.pack_four, torch.uint8) if bits == 4 else (few_bits.pack_eight, torch.int8)
    numbers = torch.full((16, 64), low if code == "least" else high, dtype=dtype)
    scales = torch.ones(2, 16, 2) if bits == 4 else torch.ones(16)
    truth = numbers.double() - (7 if bits == 4 else 0)  # the offset is 1
    for x in (torch.full((2, 64), 3.0), torch.full((2, 64), -3.0), 1.003937 * torch.ones(2, 64)):
        found = few_bits.multiply(x, pack(numbers), scales.bfloat16())
        assert error(found, x.double() @ truth.T) <= tolerances.FIFTEEN_BITS


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "m"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_unpacked_is_what_was_packed(bits, n, m, dtype, threads, monkeypatch):
    monkeypatch.setattr(few_bits, "_WORTH_A_TEAM", 1)
    packed, scales, truth = matrix(bits, n, m)
    with threads_of_torch(threads):
        found = few_bits.unpack(packed, scales, dtype)
    assert found.equal(truth.float().to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_part_of_a_matrix_is_unpacked(bits):
    """Its scales are not one after another."""
    packed, scales, truth = matrix(bits, 96, 80)
    part = scales[:, 16:48] if bits == 4 else scales[16:48]
    assert few_bits.unpack(packed[16:48], part, torch.float32).equal(truth[16:48].float())


@pytest.mark.parametrize(("n", "m"), [*SHAPES, (64, 5008)])
@pytest.mark.parametrize("rows", [0, 1, 2, 7])
@pytest.mark.parametrize("threads", [1, 2])
def test_transposed_agrees_with_float64(n, m, rows, threads, monkeypatch):
    monkeypatch.setattr(few_bits, "_WORTH_A_TEAM", 1)
    packed, scales, truth = matrix(8, n, m)
    x = rows_of(rows, m)
    with threads_of_torch(threads):
        found = few_bits.multiply_transposed(x, packed, scales)
    assert found.shape == (rows, n)
    for row, expected in zip(found, x.double() @ truth, strict=True):
        assert error(row, expected) <= tolerances.FLOAT32
    assert found.equal(few_bits.multiply_transposed(x, packed, scales))


def test_transposed_has_its_numbers_next_to_nothing_and_no_others():
    packed, scales, truth = matrix(8, 96, 80)
    room = torch.full((5, 80), torch.nan)
    room[1:4] = rows_of(3, 80)
    found = few_bits.multiply_transposed(room[1:4], packed, scales)
    assert error(found, room[1:4].double() @ truth) <= tolerances.FLOAT32
    part = few_bits.multiply_transposed(room[1:4, 16:48], packed[16:48], scales[16:48])
    assert error(part, room[1:4, 16:48].double() @ truth[16:48]) <= tolerances.FLOAT32
    room[2, 40] = torch.nan
    again = few_bits.multiply_transposed(room[1:4], packed, scales)
    assert again[1].isnan().all()
    assert again[[0, 2]].equal(found[[0, 2]])


@pytest.mark.parametrize("bits", [4, 8])
def test_it_writes_its_own_rows_alone(bits):
    packed, scales, truth = matrix(bits, 96, 80)
    room = torch.full((5, 80), torch.nan)
    x = rows_of(3, 96)
    product = few_bits.Product(x, packed, scales, room[1:4])
    for factor in (1.0, -2.0):  # whatever is there when it is called
        x.mul_(factor)
        product()
        assert error(room[1:4], x.double() @ truth.T) <= tolerances.FIFTEEN_BITS
    assert room[0].isnan().all()
    assert room[4].isnan().all()


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_small_and_large_numbers(bits):
    packed, scales, truth = matrix(bits, 96, 80)
    assert not few_bits.multiply(torch.zeros(2, 96), packed, scales).any()
    for size in (1e-20, 1e20):
        x = rows_of(2, 96) * size
        assert error(few_bits.multiply(x, packed, scales).double() / size, x.double() @ truth.T / size) <= (
            tolerances.FIFTEEN_BITS
        )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_seen_in_its_row_alone(bits, value):
    packed, scales, _ = matrix(bits, 96, 80)
    x = rows_of(5, 96)
    before = few_bits.multiply(x, packed, scales)
    x[1, 40] = value
    after = few_bits.multiply(x, packed, scales)
    assert not after[1].isfinite().any()
    assert after[[0, 2, 3, 4]].equal(before[[0, 2, 3, 4]])


@pytest.mark.parametrize(
    "pair", [(few_bits.pack_four, few_bits.unpack_four), (few_bits.pack_eight, few_bits.unpack_eight)]
)
@pytest.mark.parametrize("block", few_bits.LANES)
def test_packed_and_unpacked(pair, block, monkeypatch):
    monkeypatch.setattr(few_bits, "lanes", lambda: block)
    pack, unpack = pair
    low, high, dtype = (0, 16, torch.uint8) if pack is few_bits.pack_four else (-127, 128, torch.int8)
    numbers = torch.randint(low, high, (48, 96), dtype=dtype)
    assert unpack(pack(numbers), block).equal(numbers)


@pytest.mark.parametrize("bits", [4, 8])
def test_operation(bits):
    packed, scales, truth = matrix(bits, 96, 80)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")  # it has no derivatives
    torch.library.opcheck(few_bits.multiply, (rows_of(3, 96), packed, scales), test_utils=tests)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(few_bits.unpack, (packed, scales, dtype), test_utils=tests)
    strided = rows_of(3, 192)[:, ::2]
    assert error(few_bits.multiply(strided, packed, scales), strided.double() @ truth.T) <= tolerances.FIFTEEN_BITS


@pytest.mark.parametrize("bits", [4, 8])
def test_another_default_device(bits):
    packed, scales, truth = matrix(bits, 96, 80)
    x = rows_of(3, 96)
    with torch.device("meta"):
        found = few_bits.multiply(x, packed, scales)
    assert error(found, x.double() @ truth.T) <= tolerances.FIFTEEN_BITS
