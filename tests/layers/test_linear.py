import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastweights.layers import linear as module
from fastweights.layers.linear import OneDNNConv1D, OneDNNLinear, linear, linear_by_row, use_onednn
from fastweights.models import convert
from tests import tolerances
from tests.conftest import make_gpt2
from tests.ops.problems import error

pytestmark = pytest.mark.skipif(module._onednn is None, reason="this torch has no oneDNN")
M, N = 640, 512  # big enough to be worth it


@pytest.fixture
def products(monkeypatch):
    """Every call of oneDNN's product."""
    calls, product = [], module._onednn

    def counted(*arguments):
        calls.append(arguments)
        return product(*arguments)

    monkeypatch.setattr(module, "_onednn", counted)
    monkeypatch.setattr(module, "WORTH_A_FUNCTION", module.WORTH_ALL_THREADS)  # what a test need not wait for
    return calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3, 5), (100,), (2, 32), (2, 33), (17,)])
def test_products(products, shape, bias):
    torch.manual_seed(0)
    x, weight, b = torch.randn(*shape, N), torch.randn(M, N), torch.randn(M) if bias else None
    expected = nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    assert error(linear(x, weight, b), expected) <= tolerances.FLOAT32
    assert len(products) == 1


def test_a_matrix_for_each_row(products):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, N), torch.randn(3, M, N)
    assert error(linear_by_row(x, weight), x.double() @ weight.double().mT) <= tolerances.FLOAT32
    assert len(products) == 3
    torch.testing.assert_close(linear_by_row(x[:0], weight[:0]), torch.empty(0, 5, M))
    torch.testing.assert_close(linear_by_row(x[:, :, :4], weight[:, :4, :4]), x[:, :, :4] @ weight[:, :4, :4].mT)
    assert len(products) == 3


def test_views(products):
    x, weight = torch.randn(3, 9, 2 * N)[:, ::2, N:], torch.randn(N, 2 * M).t()[::2]
    expected = nn.functional.linear(x.double(), weight.double())
    assert error(linear(x, weight), expected) <= tolerances.FLOAT32
    assert len(products) == 1


def test_part_of_the_columns_transposed_is_not_slow(products):
    x, weight = torch.randn(256, 128), torch.randn(128, M + 1)[:, :M].t()
    expected = nn.functional.linear(x.double(), weight.double())
    assert error(linear(x, weight), expected) <= tolerances.FLOAT32
    assert products[0][1].is_contiguous()  # as it is, oneDNN would multiply one number after the other


def test_everything_else_is_torchs(products):
    x, weight = torch.randn(2, N), torch.randn(M, N)
    linear(torch.randn(0, N), weight)
    linear(x, weight[:64])  # too small
    linear(x.double(), weight.double())
    linear(x.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    torch.testing.assert_close(
        torch.compile(linear, backend="aot_eager", fullgraph=True)(x, weight), nn.functional.linear(x, weight)
    )
    assert not products


@pytest.mark.parametrize("which", [(True, True, True), (True, False, False), (False, True, True), (False, False, True)])
def test_gradients_of_first_and_second_order(products, which):
    """Against torch's own product in float64."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, N), torch.randn(M, N), torch.randn(M)]
    found, expected = [], []
    for product, dtype, results in ((linear, torch.float32, found), (nn.functional.linear, torch.float64, expected)):
        leaves = [x.to(dtype).requires_grad_(needed) for x, needed in zip(inputs, which, strict=True)]
        wanted = [x for x, needed in zip(leaves, which, strict=True) if needed]
        loss = product(*leaves).square().sum()
        gradients = torch.autograd.grad(loss, wanted, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), wanted)
        results += [loss, *gradients, *second]
    for result, truth in zip(found, expected, strict=True):
        assert error(result.detach(), truth.detach()) <= tolerances.FLOAT32
    assert products


def test_derivatives_of_functions(products):
    """Forward mode, and gradients of each token."""
    torch.manual_seed(0)
    x, weight, bias, dx, dweight = (torch.randn(*shape) for shape in ((4, N), (M, N), (M,), (4, N), (M, N)))

    def outputs(product, dtype):
        given = [t.to(dtype) for t in (x, weight, bias)]
        tangents = (dx.to(dtype), dweight.to(dtype), given[2])
        _, forward = torch.func.jvp(product, tuple(given), tangents)
        square = torch.func.grad(lambda weight, row: product(row[None], weight).square().sum())
        return forward, torch.func.vmap(square, in_dims=(None, 0))(given[1], given[0])

    found, expected = outputs(linear, torch.float32), outputs(nn.functional.linear, torch.float64)
    assert products
    for result, truth in zip(found, expected, strict=True):
        assert error(result, truth) <= tolerances.FLOAT32


def test_a_model_trains_as_with_torchs_products(monkeypatch, products):
    torch.manual_seed(0)
    ids = torch.randint(257, (2, 100))
    model = convert(make_gpt2(n_embd=96))
    gradients = []
    for product in (module._onednn, None):
        monkeypatch.setattr(module, "_onednn", product)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert not gradients[0].equal(gradients[1])  # they really were others
    assert error(*gradients) <= tolerances.FLOAT32


@torch.no_grad()
def test_modules_keep_their_parameters(products):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, M), Conv1D(N, M), nn.LayerNorm(N))
    nn.init.normal_(model[1].weight)
    x, names = torch.randn(2, 1, N), list(model.state_dict())
    expected = model(x)
    use_onednn(model)
    assert [type(layer) for layer in model] == [OneDNNLinear, OneDNNConv1D, nn.LayerNorm]
    assert isinstance(model[0], nn.Linear)
    assert isinstance(model[1], Conv1D)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
