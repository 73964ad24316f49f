"""What a text's loss is where a model reads it token by token, as it does while it writes, beside one pass over it.

    python -m benchmarks.stepwise MODEL TEXT [--block-size 4096] [--blocks 2] [--weights fp32]

The blocks are rows of one batch, and their steps those of `generate`. Both losses are of all tokens but each block's
first. They differ by what is rounded between two tokens and not within a pass (`state_dtype`), and by the kernels.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch.nn.functional import cross_entropy

from benchmarks.common import write_csv
from fastweights.data import load_documents, tokenize
from fastweights.environment import environment
from fastweights.models import FastWeightsForCausalLM, load_model
from fastweights.models.cache import FastWeightsCache, state_bytes
from fastweights.models.loading import load_tokenizer
from fastweights.models.quantisation import quantise
from fastweights.settings.text import DataConfig
from fastweights.settings.weights import WEIGHTS

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+")
    parser.add_argument("text", type=Path)
    parser.add_argument("--block-size", type=int, default=4096, help="tokens")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--weights", choices=WEIGHTS, default="fp32")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/stepwise.csv"))
    arguments = parser.parse_args()
    rows = []
    for name in arguments.model:
        model = quantise(load_model(name), arguments.weights)
        if not isinstance(model, FastWeightsForCausalLM):
            parser.error(f"{name} has no fast weights: give a model that was converted")
        documents = load_documents(DataConfig(text=str(arguments.text), join_rows=True))[:1]
        ids = tokenize(documents, load_tokenizer(name)).tokens[: arguments.block_size * arguments.blocks]
        if len(ids) < arguments.block_size * arguments.blocks:
            parser.error(f"{arguments.text} has {len(ids):,} tokens, fewer than the blocks: give fewer or shorter ones")
        blocks = ids.view(arguments.blocks, -1)
        (steps, size), whole = by_steps(model, blocks), at_once(model, blocks)
        row = {"model": name, "weights": arguments.weights, "tokens": blocks.numel(), "state MB": size / 1e6}
        rows.append(row | {"one pass": whole, "steps": steps, "retention": math.exp(whole - steps)})
        console.print(rows[-1])
        write_csv(arguments.output, rows, environment())


@torch.no_grad()
def by_steps(model: FastWeightsForCausalLM, blocks: Int[Tensor, "B T"]) -> tuple[float, float]:
    """Loss of the tokens after the first, and bytes of each row's state after them."""
    cache, total = FastWeightsCache(model.config), 0.0
    for token in range(blocks.shape[1] - 1):
        logits = model(blocks[:, token : token + 1], cache=cache).logits[:, 0]
        total += cross_entropy(logits.double(), blocks[:, token + 1], reduction="sum").item()
    return total / (len(blocks) * (blocks.shape[1] - 1)), state_bytes(cache) / len(blocks)


@torch.no_grad()
def at_once(model: FastWeightsForCausalLM, blocks: Int[Tensor, "B T"]) -> float:
    """Loss of the same tokens."""
    losses = [
        cross_entropy(model(block[None, :-1], use_cache=False).logits[0].double(), block[1:]).item() for block in blocks
    ]
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()
