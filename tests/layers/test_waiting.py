"""On a GPU, layers ask for no numbers in their forward: who asks waits for all that was queued before.

Two ways to see it: a CPU that looks like a GPU to the layers and notes what they ask, and a GPU's own errors, where
there is one (`make gpu`).
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastweights import ConversionConfig, FastWeightLayerSettings, add_fast_weight_layer, convert
from fastweights.layers.attention import FastWeightAttention
from fastweights.layers.fast_weight_layer import FastWeightLayer
from fastweights.layers.host_copy import HostCopy

ASKING = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "nonzero", "cpu", "numpy")
MODELS = {
    "pure": lambda base: convert(base, ConversionConfig(rule="gated_delta", conv_size=4)),
    "hybrid": lambda base: convert(base, ConversionConfig(window=4, sinks=2)),
    "segments": lambda base: learning(add_fast_weight_layer(base, FastWeightLayerSettings(segment=3))),
}


def learning(model):
    """As after training: the layer starts as the identity, of which nobody sees where it was cut."""
    layer = model.model.fast_weight_layer
    layer.output_scale.data.fill_(0.5)
    layer.log_step_size.data.add_(1.0)
    return model


def make(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    return MODELS[kind](LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)))


def text(device, documents):
    """Two rows with padding before and between, of one document each, or of two."""
    ids = torch.randint(0, 64, (2, 12), device=device)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 7:9] = 0
    starts = torch.zeros_like(mask, dtype=torch.bool)
    starts[0, 6] = starts[1, 4] = True
    return {"input_ids": ids, "attention_mask": mask, "document_starts": starts if documents else None}


def watch(model, enter, leave):
    for module in model.modules():
        if isinstance(module, FastWeightAttention | FastWeightLayer):
            module.register_forward_pre_hook(lambda *_: enter())
            module.register_forward_hook(lambda *_: leave())


@pytest.fixture
def asked(monkeypatch):
    """A list to be filled between its `enter` and `leave`, while tensors say that they are on no CPU."""

    class Asked(list):
        is_inside = False

        def enter(self):
            self.is_inside = True

        def leave(self):
            self.is_inside = False

    found, on_its_way, sent = Asked(), HostCopy.tolist, HostCopy.__init__

    def noting(name, method):
        def note(tensor, *args, **kwargs):
            if found.is_inside:
                found.append(f"{name} of {tuple(tensor.shape)}")
            return method(tensor, *args, **kwargs)

        return note

    def send(copy, x):
        if found.is_inside:
            found.append("a copy that was sent too late")
        sent(copy, x)

    def read(copy):
        found.leave()
        numbers = on_its_way(copy)
        found.enter()
        return numbers

    for name in ASKING:
        monkeypatch.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name)))
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda tensor: not found.is_inside))
    monkeypatch.setattr(HostCopy, "__init__", send)
    monkeypatch.setattr(HostCopy, "tolist", read)
    return found


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "several"])
@pytest.mark.parametrize("kind", MODELS)
def test_layers_ask_nothing(asked, kind, documents):
    model = make(kind).double()  # for which no kernel of CPUs is taken
    watch(model, asked.enter, asked.leave)
    model(**text("cpu", documents)).logits.sum().backward()
    assert not asked


def test_a_layer_that_asks_is_seen(asked):
    model = make("pure").double()
    watch(model, asked.enter, asked.leave)
    layer = next(module for module in model.modules() if isinstance(module, FastWeightAttention))
    layer.q_proj.register_forward_pre_hook(lambda _, given: bool(given[0].any()) and None)
    model(**text("cpu", documents=False))
    assert asked == ["__bool__ of ()"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "several"])
@pytest.mark.parametrize("kind", MODELS)
def test_layers_do_not_wait_for_the_gpu(kind, documents):
    model, given = make(kind).cuda(), text("cuda", documents)
    expected = model.cpu()(**{name: x if x is None else x.cpu() for name, x in given.items()}).logits
    model.cuda()(**given)  # compiles what there is to compile
    watch(model, lambda: torch.cuda.set_sync_debug_mode("error"), lambda: torch.cuda.set_sync_debug_mode("default"))
    try:
        found = model(**given).logits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    real = given["attention_mask"].bool().cpu()
    assert (found.cpu() - expected)[real].abs().max() <= 1e-3
