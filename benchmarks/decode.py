"""Decoding at batch size 1 on the shape of a real model: softmax attention against fast weights, pure and hybrid.

    python -m benchmarks.decode
    python -m benchmarks.decode --shape gemma3 --weights int4 --contexts 128 1024 4096 16384
    python -m benchmarks.decode --shape opt --weights int4 --contexts 128 1024 1984

Random weights do: time and memory do not depend on what the weights say. The promises checked: fast weights at any
context up to 64k are no slower than transformers' own softmax model at 128, a token at 64k costs at most 1.05 of one at
1k, and the state keeps its size. "softmax, our steps" is the softmax model with the matrix products and the steps that
all models of this library have (models/decoding.py). Each context is timed in rounds that take every model in turn. Of
Gemma 3's layers, every sixth sees all text, and is converted; the others keep their window of 512.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from benchmarks.common import write_csv
from fastweights.environment import environment
from fastweights.evaluation.cost import decode_costs
from fastweights.models import convert
from fastweights.models.quantisation import quantise
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.weights import WEIGHTS

CONTEXTS = (128, 1024, 4096, 16384, 65536)


def smollm2_shape() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    ).eval()


def gemma3_shape() -> Gemma3ForCausalLM:
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=262144,
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            query_pre_attn_scalar=256,
            sliding_window=512,
            max_position_embeddings=32768,
        )
    ).eval()


def opt_shape() -> OPTForCausalLM:
    return OPTForCausalLM(OPTConfig(vocab_size=50272, max_position_embeddings=2048)).eval()  # else its defaults


SHAPES = {
    "smollm2": ("SmolLM2-135M", smollm2_shape),
    "gemma3": ("Gemma 3 270M", gemma3_shape),
    "opt": ("OPT-125M, whose positions end at 2,048", opt_shape),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/decode.csv"))
    parser.add_argument("--shape", choices=[*SHAPES], default="smollm2")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--weights", choices=WEIGHTS, default="fp32", help="of all models, by our products")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--tokens", type=int, default=24, help="steps timed at each context")
    parser.add_argument("--softmax-up-to", type=int, default=16384, help="longest context of the softmax model")
    parser.add_argument(
        "--read-at-most", type=int, default=2048, help="tokens really read before each context; the rest is pretended"
    )
    arguments = parser.parse_args()

    torch.manual_seed(0)
    dtype, (name, shape) = getattr(torch, arguments.dtype), SHAPES[arguments.shape]
    softmax = shape()
    models = {
        "softmax": softmax,
        "softmax, our steps": convert(softmax, ConversionConfig(layers="none")),
        "pure": convert(softmax),
        "hybrid (window 64)": convert(softmax, ConversionConfig(window=64, sinks=0)),
        "hybrid (window 64, 4 sinks)": convert(softmax, ConversionConfig(window=64, sinks=4)),
    }
    costs = decode_costs(
        {name: quantise(_cast(model, dtype), arguments.weights) for name, model in models.items()},
        arguments.contexts,
        tokens=arguments.tokens,
        read_at_most=arguments.read_at_most,
        softmax_up_to=arguments.softmax_up_to,
    )
    about = {"shape": arguments.shape, "dtype": arguments.dtype, "weights": arguments.weights}
    rows = [{"model": name, **about, **vars(cost)} for name in models for cost in costs[name]]
    _print(rows, name)
    write_csv(arguments.output, rows, environment())
    console.print(f"written to {arguments.output}")


def _cast(model, dtype: torch.dtype):
    """As `from_pretrained(dtype=...)` does: gates and scales stay in fp32."""
    new = set(model.new_parameter_names()) if hasattr(model, "new_parameter_names") else set()
    for name, parameter in model.named_parameters():
        if name not in new:
            parameter.data = parameter.data.to(dtype)
    return model


def _print(rows: list[dict], shape: str) -> None:
    table = Table("model", title=f"one token at batch size 1, the shape of {shape}", title_justify="left")
    for column in ("context", "ms", "softmax at 128 = 1", "state, MB"):
        table.add_column(column, justify="right")
    unit = next(row["ms_per_token"] for row in rows if row["model"] == "softmax")
    for row in rows:
        ratio = row["ms_per_token"] / unit
        state = row["state_bytes"] / 1e6
        table.add_row(row["model"], f"{row['context']:,}", f"{row['ms_per_token']:.1f}", f"{ratio:.2f}", f"{state:.2f}")
    console.print(table)


console = Console()

if __name__ == "__main__":
    main()
