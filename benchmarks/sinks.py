"""What a sliding window with sinks keeps of a model that nobody trained: retention, and the loss far into a long text.

    python -m benchmarks.sinks MODEL TEXT [--windows 64 128] [--sinks 0 1 2 4] [--far]
    python -m benchmarks.sinks MODEL TEXT --windows 128 --sinks 4 --layers 0-3,5-29 --wide-window 1024 --block-size 4096

The fast weights are off. With --layers, those that it does not name have --wide-window instead. Retention is the
original's perplexity over the window's, in blocks. With --far the text's first document is read as a stream instead,
and the loss given by the distance from its beginning: of the stream, and of the same tokens in blocks of 1,024, none of
which knows how far on it is.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from benchmarks.common import write_csv
from fastweights.data import load_documents, tokenize
from fastweights.environment import environment
from fastweights.evaluation.perplexity import evaluate, score
from fastweights.models import convert, load_model
from fastweights.models.loading import load_tokenizer
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.evaluation import EvaluationConfig
from fastweights.settings.text import DataConfig

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--sinks", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--layers", help="that have the window; by default all")
    parser.add_argument("--wide-window", type=int, default=0, help="of all others")
    parser.add_argument("--block-size", type=int, default=1024, help="tokens")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--far", action="store_true", help="read the first document, to 68k tokens, as a stream")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sinks.csv"))
    arguments = parser.parse_args()
    model, rows = load_model(arguments.model), []
    text = DataConfig(text=str(arguments.text), join_rows=not arguments.far)
    text = tokenize(load_documents(text)[:1], load_tokenizer(arguments.model))
    size = arguments.block_size
    blocks = EvaluationConfig(batch_size=1, max_tokens=size * arguments.blocks)
    original = None if arguments.far else evaluate(model, text, block_size=size, config=blocks).loss
    for window in arguments.windows:
        for sinks in arguments.sinks:
            settings = ConversionConfig(
                window=window, sinks=sinks, layers=arguments.layers, wide_window=arguments.wide_window
            )
            hybrid = window_alone(model, settings)
            if original is None:
                found = [{"context": context, **by_distance(hybrid, text, context)} for context in ("stream", "block")]
            else:
                loss = evaluate(hybrid, text, block_size=size, config=blocks).loss
                found = [{"original": original, "loss": loss, "retention": math.exp(original - loss)}]
            for row in found:
                windows = hybrid.config.windows
                rows.append({"window": window, "sinks": sinks, "mean": sum(windows) / len(windows), **row})
                console.print(rows[-1])
            write_csv(arguments.output, rows, environment())


def window_alone(model, settings: ConversionConfig):
    """A conversion whose fast weights say nothing."""
    hybrid = convert(model, settings)
    with torch.no_grad():
        for attention in hybrid.fast_attentions():
            attention.fast_scale.zero_()
    return hybrid


def by_distance(model, text, context: Literal["stream", "block"]) -> dict[str, float]:
    """Loss of tokens so and so far from the beginning of a document."""
    config = EvaluationConfig(context=context, max_tokens=68 * 1024, batch_size=2)
    losses = torch.cat([losses for _, losses in score(model, text, config=config)])
    places = ((1024, 4096), (4096, 8192), (8192, 16384), (16384, 32768), (32768, 65536), (65536, 68 * 1024))
    return {f"{first // 1024}k to {last // 1024}k": losses[first:last].mean().item() for first, last in places}


if __name__ == "__main__":
    main()
