"""What makes the fast weights beside a window earn their place: one change at a time, all trained alike.

    python -m benchmarks.hybrids MODEL TEXT

Each row converts MODEL with a small window, trains the converted layers alone on TEXT by divergence from MODEL, end to
end from the first step, and is read on the text's last twentieth: retention (perplexity of MODEL over its own) of all,
of its window alone, and of the untrained window with its sinks.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import write_csv
from fastweights.environment import environment
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.evaluation import HeldOutConfig
from fastweights.settings.text import DataConfig
from fastweights.settings.training import FinetuneConfig, TrainConfig, TransferConfig
from fastweights.training.pipeline import train

WINDOW, SINKS, BLOCK, BATCH = 16, 1, 256, 6
BEST = {"rule": "average", "write": "leaving", "rotary": False}
CONVERSIONS = {
    "sums of all tokens": {"rule": "decay", "write": "all"},
    "sums of those that leave": {"rule": "decay", "write": "leaving"},
    "averages of all tokens": {"rule": "average", "write": "all"},
    "averages of those that leave": {"rule": "average", "write": "leaving"},
    "and without rotary": BEST,
    "and gates of rank 16": {**BEST, "gate_rank": 16},
    "and no value gate": {**BEST, "value_gate": False},
    "gated, elu+1, normalised": {"rule": "gated", "feature_map": "elu+1", "rotary": False},
    "delta, elu+1": {"rule": "delta", "feature_map": "elu+1", "rotary": False},
    "gated delta, elu+1": {"rule": "gated_delta", "feature_map": "elu+1", "rotary": False},
    "gated delta, elu+1, rotary": {"rule": "gated_delta", "feature_map": "elu+1"},
    "gated delta": {"rule": "gated_delta", "rotary": False},
    "gated delta, rotary": {"rule": "gated_delta"},
    "gated delta of all tokens": {"rule": "gated_delta", "write": "all"},
    "averages, learned softmax map": {**BEST, "feature_map": "softmax"},
}
BY_STAGE = ("all weights trained", "LoRA of rank 16", "half of it transfer")
ROWS = (*CONVERSIONS, *BY_STAGE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="such as a folder of stories15M")
    parser.add_argument("text", help="such as a file of stories")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--steps", type=int, default=60, help=f"of {BATCH} blocks of {BLOCK} tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/hybrids.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.rows:
        for seed in arguments.seeds:
            with TemporaryDirectory() as folder:
                config = _config(arguments, name, seed, Path(folder) / "run")
                last = train(config)[-1]
            assert last.parts is not None
            parts = {part: math.exp(last.parts["teacher"].loss - found.loss) for part, found in last.parts.items()}
            rows.append({"row": name, "seed": seed, "tokens": last.tokens, **parts})
            write_csv(arguments.output, rows, environment())
    _print(rows)


def _config(arguments: argparse.Namespace, name: str, seed: int, output: Path) -> TrainConfig:
    finetune = FinetuneConfig(
        steps=arguments.steps, batch_size=BATCH, learning_rate=3e-4, new_learning_rate=1e-2, weights="attention"
    )
    config = TrainConfig(
        model=arguments.model,
        output=output,
        stage="finetune",
        convert=ConversionConfig(window=WINDOW, sinks=SINKS, **CONVERSIONS.get(name, BEST)),
        data=DataConfig(text=arguments.text, join_rows=True, block_size=BLOCK),
        finetune=finetune,
        evaluation=HeldOutConfig(max_tokens=9216, parts_tokens=9216),
    )
    config = replace(config, run=replace(config.run, seed=seed))
    if name == "all weights trained":
        return replace(config, finetune=replace(finetune, weights="all"))
    if name == "LoRA of rank 16":
        return replace(config, finetune=replace(finetune, lora_rank=16, learning_rate=1e-3))
    if name == "half of it transfer":
        half = arguments.steps // 2
        transfer = TransferConfig(steps=half, batch_size=BATCH, learning_rate=3e-4, new_learning_rate=1e-2)
        return replace(config, stage="all", transfer=transfer, finetune=replace(finetune, steps=half))
    return config


def _print(rows: list[dict]) -> None:
    table = Table(title=f"retention, window {WINDOW}, {SINKS} sink, {rows[0]['tokens']:,} tokens of training")
    for column in ("", "seed", "all", "window alone", "fast weights alone", "untrained window"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        found = [f"{row[part]:.3f}" for part in ("all", "window alone", "fast weights alone", "untrained window")]
        table.add_row(row["row"], str(row["seed"]), *found)
    Console().print(table)


if __name__ == "__main__":
    main()
