"""No pretrained weight is lost in conversion, and what a checkpoint lacks starts as in a new model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from fastweights.models import convert
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import MAKERS, VOCABULARY, random_ids
from tests.models.test_fast_weight_layer import trained

SOFTMAX = ConversionConfig(layer_types=["full_attention"] * 3)


@pytest.fixture(params=sorted(MAKERS))
def family(request) -> str:
    return request.param


@torch.no_grad()
def test_modules_that_a_user_put_in_keep_their_weights(family):
    base = MAKERS[family](tie_word_embeddings=False)
    base.set_output_embeddings(nn.Linear(32, VOCABULARY, bias=False))
    base.set_input_embeddings(nn.Embedding(VOCABULARY, 32))
    ids = random_ids(2, 9)
    assert convert(base, SOFTMAX)(ids).logits.equal(base(ids).logits)
    projections = dict(base.named_parameters())
    for name, parameter in convert(base).model.base.named_parameters():
        if "rule" not in name and "scale" not in name:
            assert parameter.equal(projections[f"{base.base_model_prefix}.{name}"]), name


@torch.no_grad()
@pytest.mark.parametrize("kind", ["window", "block", "map"])
def test_what_a_checkpoint_lacks_starts_as_new(family, kind, tmp_path):
    base = MAKERS[family](tie_word_embeddings=False)
    if kind == "block":
        new = trained(base, kind="hybrid")
    else:
        new = convert(base, ConversionConfig(window=8, feature_map="relu" if kind == "map" else "identity"))
    if kind == "block":
        new.fast_weight_layer.reset_parameters()
    new.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    ours = {
        name
        for name in weights
        if any(part in name for part in ("rule", "_map", "fast_scale", "fast_unit", "window_", "fast_weight_layer"))
        and not name.endswith(("up.weight", "down.weight"))  # random
    }
    assert len(ours) > 10
    loaded = ("key_gate.bias", "1.attn.fast_unit", "1.self_attn.fast_unit")
    kept = {"model.fast_weight_layer.norm_scale"} | {name for name in ours if name.endswith(loaded)}
    for name in kept & ours:
        weights[name] = torch.full_like(weights[name], 3.0)
    save_file({name: w for name, w in weights.items() if name not in ours - kept}, file, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, value in new.state_dict().items():
        if name in kept:
            value = torch.full_like(value, 3.0)
        assert loaded[name].equal(value), name
