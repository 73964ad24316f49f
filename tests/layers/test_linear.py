import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from fastweights.layers import linear as module
from fastweights.layers.linear import linear, linear_by_row, set_onednn, use_onednn
from fastweights.models import convert
from tests import tolerances
from tests.conftest import make_gpt2, make_llama
from tests.ops.problems import error

pytestmark = pytest.mark.skipif(module._onednn() is None, reason="this torch has no oneDNN")
M, N = 640, 512  # big enough to be worth it


@pytest.fixture
def products(monkeypatch):
    """Every call of oneDNN's product."""
    calls, product = [], module._onednn()

    def counted(*arguments):
        calls.append(arguments)
        return product(*arguments)

    monkeypatch.setattr(module, "_onednn", lambda: counted)
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
    for product in (module._onednn(), None):
        monkeypatch.setattr(module, "_onednn", lambda product=product: product)
        products.clear()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert bool(products) == (product is not None)
    assert error(*gradients) <= tolerances.FLOAT32


def test_forward_mode_whatever_no_grad_says(products):
    x, weight = torch.randn(4, N), torch.randn(M, N)
    with torch.no_grad():
        _, found = torch.func.jvp(lambda weight: linear(x, weight), (weight,), (weight,))
    assert error(found, x.double() @ weight.double().t()) <= tolerances.FLOAT32
    assert products


def test_the_operator_is_one_like_torchs(products):
    x, weight, bias = torch.randn(2, 33, N), torch.randn(M, N, requires_grad=True), torch.randn(M)
    torch.library.opcheck(torch.ops.fastweights.linear.default, (x, weight, bias))
    assert products
    with FakeTensorMode() as fake:
        copies = [fake.from_tensor(tensor) for tensor in (x, weight, bias)]
        shape = torch.ops.fastweights.linear(*copies)
        assert isinstance(shape, FakeTensor)
    assert (shape.shape, shape.stride()) == ((2, 33, M), linear(x, weight, bias).stride())


def test_plain_tensors_only(products):
    class Subclass(torch.Tensor):
        pass

    x, weight, bias = torch.randn(2, N), torch.randn(M, N), torch.randn(M)
    expected = nn.functional.linear(x, weight, bias)
    for i in range(3):
        given = [x, weight, bias]
        given[i] = given[i].as_subclass(Subclass)
        found = linear(*given)
        assert type(found) is Subclass
        torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)
        given[i] = given[i].to("meta")
        assert linear(*(tensor.to("meta") for tensor in given)).is_meta
    linear(x, weight.to_sparse_csr())
    unchecked = inspect.unwrap(linear)
    assert unchecked(x, weight[0]).shape == (2,)
    assert unchecked(x, weight, bias[:1]).shape == (2, M)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # torch's own error
        unchecked(x[:, 1:], weight)
    assert not products
    linear(nn.Parameter(x), nn.Parameter(weight), nn.Parameter(bias))
    assert products


def test_off_by_one_setting(products):
    x, weight = torch.randn(2, N), torch.randn(M, N)
    set_onednn(False)
    try:
        linear(x, weight)
        linear_by_row(x[None], weight[None])
        assert not products
    finally:
        set_onednn(True)
    linear(x, weight)
    assert products


@pytest.mark.parametrize("gone", ["the operator", "its arguments"])
def test_a_torch_without_the_operator(monkeypatch, caplog, gone):
    def changed(x, weight):
        raise AssertionError

    operators = SimpleNamespace() if gone == "the operator" else SimpleNamespace(default=changed)
    names = SimpleNamespace() if gone == "the operator" else SimpleNamespace(_linear_pointwise=operators)
    monkeypatch.setattr(torch.ops, "mkldnn", names)
    module._onednn.cache_clear()
    try:
        x, layer = torch.randn(2, N), nn.Linear(N, M)
        expected = layer(x)
        use_onednn(layer)
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(layer(x), expected)
        layer(x).sum().backward()
        assert [(record.name, record.levelname) for record in caplog.records] == [("fastweights", "WARNING")]
        assert "oneDNN" in caplog.text
    finally:
        module._onednn.cache_clear()


@pytest.mark.parametrize("make", [make_gpt2, make_llama])
def test_operations_are_counted_as_torchs(monkeypatch, products, make):
    monkeypatch.setattr(module, "WORTH_A_FUNCTION", 0)
    ids = torch.randint(257, (2, 33))
    counts = []
    for enabled in (False, True):
        model = make()
        use_onednn(model, enabled=enabled)
        with FlopCounterMode(display=False) as forward:
            loss = model(ids, labels=ids).loss
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
        operator = torch.ops.fastweights.linear
        assert (operator in forward.get_flop_counts()["Global"]) is enabled
        assert (operator in backward.get_flop_counts()["Global"]) is enabled
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0


def test_operations_without_gradients_are_counted(products):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear(torch.randn(2, 33, N), torch.randn(M, N))
    assert products
    assert counter.get_total_flops() == 2 * 2 * 33 * M * N


@torch.no_grad()
def test_modules_keep_their_parameters(products):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, M), Conv1D(N, M), nn.LayerNorm(N))
    nn.init.normal_(model[1].weight)
    x, names = torch.randn(2, 1, N), list(model.state_dict())
    expected = model(x)
    use_onednn(model)
    assert [type(layer) for layer in model] == [nn.Linear, Conv1D, nn.LayerNorm]
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert len(products) == 2
    use_onednn(model, enabled=False)
    assert not any("forward" in vars(layer) for layer in model)
    model(x)
    assert len(products) == 2


def test_a_module_merely_handed_stays_as_it_is(base):
    model = convert(base)
    assert any("forward" in vars(layer) for layer in model.model.modules())
    assert not any("forward" in vars(layer) for layer in base.modules())
    assert not any(type(layer) in (module._Linear, module._Conv1D) for layer in model.modules())
