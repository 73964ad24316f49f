"""Linear layers that take oneDNN's products, in the hands of torch and of other libraries."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from fastweights.layers import FastWeightLayer
from fastweights.layers import linear as module
from fastweights.layers.linear import use_onednn
from tests.conftest import make_gpt2, make_llama, random_ids

pytestmark = pytest.mark.skipif(module._onednn() is None, reason="this torch has no oneDNN")
N = 640  # big enough to be worth it


@pytest.fixture
def products(monkeypatch):
    """The matrix of every product of oneDNN's."""
    matrices, product = [], module._onednn()

    def noted(x, weight, *arguments):
        matrices.append(weight)
        return product(x, weight, *arguments)

    monkeypatch.setattr(module, "_onednn", lambda: noted)
    monkeypatch.setattr(module, "WORTH_A_FUNCTION", module.WORTH_ALL_THREADS)
    return matrices


@pytest.fixture(params=[nn.Linear, Conv1D])
def layer(request) -> nn.Module:
    torch.manual_seed(0)
    layer = request.param(N, N)
    use_onednn(layer)
    return layer


X = torch.randn(2, N, generator=torch.Generator().manual_seed(0))


def plain(layer: nn.Module) -> torch.Tensor:
    """What torch's own forward gives."""
    return type(layer).forward(layer, X)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_copy_uses_its_own_weights(products, layer):
    copied = copy.deepcopy(nn.Sequential(layer))[0]
    with torch.no_grad():
        copied.weight.mul_(2)
    assert_same(copied(X), plain(copied))
    assert len(products) == 1
    assert products[0].data_ptr() == copied.weight.data_ptr()
    assert_same(layer(X), plain(layer))


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickled_it_is_torchs(products, layer, how):
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(layer)
    with torch.no_grad():
        loaded.weight.mul_(2)
    assert_same(loaded(X), plain(loaded))
    assert not products
    use_onednn(loaded)
    assert_same(loaded(X), plain(loaded))
    assert products[0].data_ptr() == loaded.weight.data_ptr()
    assert loaded.state_dict().keys() == layer.state_dict().keys()


def test_a_replica_of_data_parallel_uses_its_own_weights(layer):
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        setattr(replica, name, 2 * parameter.detach())
    assert_same(replica(X), plain(replica))


def test_another_forward_stays(layer):
    other = nn.Linear(N, N)
    other.forward = lambda x: x
    for enabled in (True, False):
        use_onednn(other, enabled=enabled)
        assert other(X) is X


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@torch.no_grad()
def test_offloaded_by_accelerate(products, tmp_path, offload):
    from accelerate import cpu_offload, disk_offload

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, N), nn.Linear(N, N))
    expected = model(X)
    use_onednn(model)
    if offload == "cpu":
        cpu_offload(model, torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), torch.device("cpu"))
    assert model[0].weight.is_meta
    assert_same(model(X), expected)
    assert len(products) == 2
    use_onednn(model)  # leaves the hooks' forward
    assert_same(model(X), expected)


def test_lora_of_peft(products):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, N), nn.ReLU(), Conv1D(N, N))
    expected = model(X)
    use_onednn(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["0", "2"], r=4, init_lora_weights=False))
    output = adapted(X)
    assert len(products) == 2
    assert not torch.allclose(output, expected, atol=1e-2)
    output.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    merged = adapted.merge_and_unload()
    assert [type(part) for part in merged] == [nn.Linear, nn.ReLU, Conv1D]
    assert_same(merged(X), output)


def test_compiled_and_exported(products, layer):
    expected = plain(layer)
    assert_same(torch.compile(layer, backend="aot_eager", fullgraph=True)(X), expected)
    exported = torch.export.export(layer, (X,))
    assert_same(exported.module()(X), expected)
    assert exported.state_dict.keys() == layer.state_dict().keys()
    assert not products


def test_compiled_to_train(layer):
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(X).square().sum().backward()
    found = layer.weight.grad.clone()
    layer.zero_grad()
    plain(layer).square().sum().backward()
    torch.testing.assert_close(found, layer.weight.grad, rtol=1e-3, atol=1e-2)


def test_parametrised(products, layer):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    expected = 2 * (plain(layer) - layer.bias) + layer.bias
    parametrize.register_parametrization(layer, "weight", Doubled())
    output = layer(X)
    assert_same(output, expected)
    output.sum().backward()
    assert layer.parametrizations.weight.original.grad.any()
    parametrize.remove_parametrizations(layer, "weight")
    assert_same(layer(X), expected)
    use_onednn(layer, enabled=False)
    assert "forward" not in vars(layer)


def test_functional_call(products, layer):
    doubled = {name: 2 * parameter.detach() for name, parameter in layer.named_parameters()}
    assert_same(torch.func.functional_call(layer, doubled, (X,)), 2 * plain(layer))
    assert products


@torch.no_grad()
def test_quantised_by_torch(products):
    """quantize_dynamic puts layers of 8 bits in the place of each nn.Linear, and finds them by their exact class."""
    ids = random_ids(2, 9)
    model = make_llama(hidden_size=N, num_hidden_layers=1, initializer_range=0.02)
    expected = model(ids).logits
    use_onednn(model)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    products.clear()
    logits = quantised(ids).logits
    assert not products
    assert not any(type(part) is nn.Linear for part in quantised.modules())
    assert quantised.lm_head.weight().dtype == torch.qint8
    assert 0 < (logits - expected).abs().max() < 0.1 * expected.abs().max()
    assert_same(model(ids).logits, expected)  # the model itself stays as it is
    assert products


@torch.no_grad()
def test_quantised_by_torchao(products):
    quantization = pytest.importorskip("torchao.quantization")
    ids = random_ids(2, 9)
    model = make_llama(hidden_size=N, num_hidden_layers=1, initializer_range=0.02)
    use_onednn(model)
    expected = model(ids).logits
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    products.clear()
    logits = model(ids).logits
    assert not products
    assert type(model.lm_head) is nn.Linear
    assert type(model.lm_head.weight) not in (torch.Tensor, nn.Parameter)
    assert 0 < (logits - expected).abs().max() < 0.1 * expected.abs().max()


@torch.no_grad()
def test_what_quantises_leaves_the_fast_weight_layer():
    """It is fp32 whatever the model's dtype, and reads its matrices itself."""
    layer = FastWeightLayer(32)
    hidden, labels, unembedding = torch.randn(1, 9, 32), random_ids(1, 9), nn.Linear(32, 257, bias=False)
    expected, _ = layer(hidden, labels, unembedding)
    quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    assert not any(isinstance(part, nn.Linear) for part in layer.modules())
    assert quantised(hidden, labels, unembedding)[0].equal(expected)


def test_names_stay(products):
    model = make_gpt2()
    names = list(model.state_dict())
    use_onednn(model)
    assert list(model.state_dict()) == names
    make_gpt2().load_state_dict(model.state_dict())
