"""ShortConvolution: its equation, token by token; pieces, padding and documents do not change it."""

from __future__ import annotations

import pytest
import torch

from fastweights.layers.convolution import ShortConvolution
from fastweights.layers.rules import TokenMarks

CHANNELS, SIZES = 5, (2, 4)


def make(size: int) -> ShortConvolution:
    """In float64, with weights of its own for each channel."""
    torch.manual_seed(size)
    convolution = ShortConvolution(CHANNELS, size).double()
    torch.nn.init.normal_(convolution.weight)
    return convolution


def texts(rows: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(rows, tokens, CHANNELS, dtype=torch.float64, generator=generator)


def by_token(convolution: ShortConvolution, x: torch.Tensor) -> torch.Tensor:
    """The sum that defines it."""
    size, y = convolution.weight.shape[1], torch.zeros_like(x)
    for t in range(x.shape[1]):
        for back in range(min(size, t + 1)):
            y[:, t] += convolution.weight[:, size - 1 - back] * x[:, t - back]
    return y


@pytest.mark.parametrize("size", SIZES)
def test_it_is_its_equation(size):
    convolution, x = make(size), texts(2, 9)
    y, tail = convolution(x)
    torch.testing.assert_close(y, by_token(convolution, x))
    assert torch.equal(tail, x[:, 10 - size :].mT)
    assert tail.untyped_storage().nbytes() == tail.nbytes


def test_a_new_one_changes_nothing():
    convolution, x = ShortConvolution(CHANNELS, 4), texts(2, 9).float()
    assert torch.equal(convolution(x)[0], x)
    torch.nn.init.normal_(convolution.weight)
    convolution.reset_parameters()
    assert torch.equal(convolution(x)[0], x)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cuts", [(1,), (2, 3), (6,)])
def test_pieces_are_the_whole(size, cuts):
    convolution, x = make(size), texts(2, 9)
    tail, found = None, []
    for piece in x.tensor_split(cuts, dim=1):
        y, tail = convolution(piece, tail)
        found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), convolution(x)[0])
    assert torch.equal(tail, convolution(x)[1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("marked", [False, True], ids=["padding", "padding and documents"])
def test_padding_is_as_if_it_were_not_there(size, marked):
    """In two calls, in rows of 0 to all tokens, with whatever number in the padding."""
    convolution = make(size)
    generator = torch.Generator().manual_seed(1)
    real = torch.rand(6, 14, generator=generator) < 0.6
    real[0], real[1, :7], real[1, 7:], real[2] = False, False, True, True
    starts = (torch.rand(6, 14, generator=generator) < 0.2) & real if marked else None
    x = texts(6, 14).masked_fill(~real[..., None], 1e9)
    found, tail = [], None
    for part in (slice(0, 7), slice(7, 14)):
        marks = TokenMarks(real[:, part], None if starts is None else starts[:, part])
        y, tail = convolution(x[:, part], tail, marks)
        found.append(y)
    found = torch.cat(found, 1)
    for row in range(6):
        alone, borders = x[row, real[row]], [0]
        if starts is not None:
            borders += starts[row, real[row]].nonzero().flatten().tolist()
        documents = alone.tensor_split(sorted({*borders} - {0}))
        expected = [by_token(convolution, document[None])[0] for document in documents]
        torch.testing.assert_close(found[row, real[row]], torch.cat(expected))
        last = torch.cat((x.new_zeros(size - 1, CHANNELS), documents[-1]))[1 - size :]
        assert torch.equal(tail[row], last.T)


def test_documents_do_not_see_each_other():
    convolution, x = make(4), texts(1, 12)
    starts = torch.zeros(1, 12, dtype=torch.bool)
    starts[0, [5, 6, 10]] = True
    y, tail = convolution(x, torch.ones(1, CHANNELS, 3, dtype=torch.float64), TokenMarks(starts=starts))
    for first, last in ((5, 6), (6, 10), (10, 12)):
        torch.testing.assert_close(y[:, first:last], by_token(convolution, x[:, first:last]))
    goes_on = convolution(x[:, :5], torch.ones(1, CHANNELS, 3, dtype=torch.float64))[0]
    torch.testing.assert_close(y[:, :5], goes_on)
    assert torch.equal(tail, torch.cat((x.new_zeros(1, 1, CHANNELS), x[:, 10:]), 1).mT)


@pytest.mark.parametrize("documents", [False, True])
def test_gradients(documents):
    convolution, x = make(3), texts(2, 6).requires_grad_()
    tail = torch.randn(2, CHANNELS, 2, dtype=torch.float64, requires_grad=True)
    starts = torch.tensor([[False, False, True, False, False, False], [False, True, False, False, True, False]])
    marks = TokenMarks(starts=starts) if documents else None

    def of(x, tail, weight):
        return torch.func.functional_call(convolution, {"weight": weight}, (x, tail, marks))

    assert torch.autograd.gradcheck(of, (x, tail, convolution.weight))


def test_it_computes_in_float32():
    convolution = ShortConvolution(CHANNELS, 4)
    torch.nn.init.normal_(convolution.weight)
    x = texts(1, 9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y, tail = convolution.to(torch.bfloat16)(x)
    assert convolution.weight.dtype == torch.float32
    assert (y.dtype, tail.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, convolution(x.float())[0].bfloat16())
