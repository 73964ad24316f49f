"""On a GPU, layers ask for no numbers in their forward: who asks waits for all that was queued before."""

import pytest
import torch

from fastweights import ConversionConfig, FastWeightLayerSettings, add_fast_weight_layer, convert
from fastweights.layers.attention import FastWeightAttention
from fastweights.layers.fast_weight_layer import FastWeightLayer
from fastweights.layers.host_copy import HostCopy
from tests.conftest import make_llama

ASKING = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "nonzero", "cpu", "numpy")
MODELS = {
    "pure": lambda: convert(make_llama(), ConversionConfig(rule="gated_delta", conv_size=4)),
    "hybrid": lambda: convert(make_llama(), ConversionConfig(window=4, sinks=2)),
    "segments": lambda: add_fast_weight_layer(make_llama(), FastWeightLayerSettings(segment=3)),
}


@pytest.fixture
def asked(monkeypatch):
    """What layers ask of tensors while they run, on a CPU that looks like a GPU to them."""
    found, inside, allowed = [], [], HostCopy.tolist

    def note(name, method):
        def noting(tensor, *args, **kwargs):
            if inside:
                found.append(f"{name} of {tuple(tensor.shape)}")
            return method(tensor, *args, **kwargs)

        return noting

    def enter(module, *args):
        inside.append(module)

    def leave(module, *args):
        inside.pop()

    def read(copy):
        outside, inside[:] = inside[:], []
        numbers = allowed(copy)
        inside[:] = outside
        return numbers

    for name in ASKING:
        monkeypatch.setattr(torch.Tensor, name, note(name, getattr(torch.Tensor, name)))
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda tensor: not inside))
    monkeypatch.setattr(HostCopy, "tolist", read)

    def watch(model):
        for module in model.modules():
            if isinstance(module, FastWeightAttention | FastWeightLayer):
                module.register_forward_pre_hook(enter)
                module.register_forward_hook(leave)
        return found

    return watch


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "several"])
@pytest.mark.parametrize("kind", MODELS)
def test_layers_ask_nothing(asked, kind, documents):
    model = MODELS[kind]()
    found = asked(model.double())
    ids = torch.randint(0, 50, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, 7:9] = 0
    starts = torch.zeros_like(mask, dtype=torch.bool)
    starts[0, 6] = starts[1, 4] = documents
    model(ids, attention_mask=mask, document_starts=starts if documents else None).logits.sum().backward()
    assert not found
