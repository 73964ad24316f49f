"""torch.export: one program for texts of every length."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim, export, load, save

from fastweights.errors import FastWeightsError
from fastweights.models import add_fast_weight_layer, convert
from fastweights.models.quantisation import quantise
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import make_gpt2, make_llama, random_ids
from tests.models.test_convolution import with_taps

LONGEST = 512
MODELS = {
    "pure": lambda: convert(make_gpt2(n_positions=LONGEST), ConversionConfig(positions="drop")),
    "averages of low rank, no sinks": lambda: convert(
        make_llama(max_position_embeddings=LONGEST), ConversionConfig(window=8, sinks=0, rule="average", gate_rank=2)
    ),
    "gated delta": lambda: with_taps(
        convert(make_llama(), ConversionConfig(window=8, rule="gated_delta", feature_map="dpfp", conv_size=4))
    ),
    "two windows": lambda: convert(make_llama(), ConversionConfig(window=8, wide_window=16, layers="0,2")),
    "eight bits": lambda: convert(make_llama(), ConversionConfig(window=8, window_dtype="int8", state_dtype="int8")),
    "full attention": lambda: convert(make_llama(), ConversionConfig(window=8, layers="1")),
    "learned bias": lambda: convert(make_gpt2(), ConversionConfig(window=8, positions="drop")),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_one_program_reads_texts_of_every_length(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    shapes = {"input_ids": {1: Dim("T", min=17, max=LONGEST)}, "use_cache": None}
    program = export(model, (), {"input_ids": random_ids(2, 40), "use_cache": False}, dynamic_shapes=shapes)
    save(program, tmp_path / "program.pt2")
    loaded = load(tmp_path / "program.pt2").module()
    for length in (40, 17, 100):
        ids = random_ids(2, length, seed=length)
        expected = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(loaded(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@torch.no_grad()
def test_in_few_bits(weights):
    model = quantise(MODELS["gated delta"]().eval(), weights)
    given = {"input_ids": random_ids(1, 40), "use_cache": False}
    if weights != "bf16":
        with pytest.raises(FastWeightsError, match="cannot be exported"):
            export(model, (), given)
        return
    model.generate(random_ids(1, 4), max_new_tokens=2)  # which joins matrices
    program = export(model.to("cpu"), (), given).module()
    torch.testing.assert_close(program(**given).logits, model(**given).logits)


def test_a_fast_weight_layer_is_refused():
    model = add_fast_weight_layer(make_llama()).eval()
    with pytest.raises(FastWeightsError, match="export the model below it"):
        export(model, (), {"input_ids": random_ids(1, 40), "use_cache": False})
