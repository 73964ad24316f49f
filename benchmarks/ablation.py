"""What each part of the conversion does to the loss after a fixed budget of transfer, all else being equal.

    python -m benchmarks.ablation [--llama FOLDER --llama-text FILE]

On the embedded GPT-2: calibration, gate biases, the value-side gate, absolute positions, the window. On a Llama model,
if one is given: the rotary embedding. One seed each, unless told otherwise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.common import write_csv
from fastweights.environment import environment
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.evaluation import HeldOutConfig
from fastweights.settings.text import STDLIB, DataConfig
from fastweights.settings.training import RunConfig, TrainConfig, TransferConfig
from fastweights.training import train

PURE = {"positions": "drop", "gate_bias": (-2.0, 6.0)}
CONVERSIONS = {
    "pure, gate biases -2..6": PURE,
    "not calibrated": PURE,
    "gate biases 2..6": {**PURE, "gate_bias": (2.0, 6.0)},
    "gate biases 3..8": {**PURE, "gate_bias": (3.0, 8.0)},
    "all gate biases 4": {**PURE, "gate_bias": (4.0, 4.0)},
    "no value-side gate": {**PURE, "value_gate": False},
    "absolute positions kept": {**PURE, "positions": "keep"},
    "window 16": {**PURE, "window": 16},
    "window 32": {**PURE, "window": 32},
    "window 64": {**PURE, "window": 64},
}
LLAMA = {
    "Llama, pure, gate biases 2..6": {},
    "Llama, no rotary embedding": {"rotary": False},
    "Llama, not calibrated": {},
    "Llama, window 32": {"window": 32},
    "Llama, window 32, no rotary embedding in the fast weights": {"window": 32, "rotary": False},
}
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/ablation.csv"))
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--llama", help="folder of a Llama model")
    parser.add_argument("--llama-text", help="text of its kind")
    arguments = parser.parse_args()
    jobs = [("embedded", DataConfig(), name, settings) for name, settings in CONVERSIONS.items()]
    if bool(arguments.llama) != bool(arguments.llama_text):
        parser.error("--llama and --llama-text go together: give both or neither")
    if arguments.llama:
        text = DataConfig(text=arguments.llama_text, block_size=256)
        jobs += [(arguments.llama, text, name, settings) for name, settings in LLAMA.items()]
    rows = []
    for seed in arguments.seeds:
        for model, data, name, settings in jobs:
            rows.append(_run(model, data, name, settings, seed, arguments))
            console.print(rows[-1])
            write_csv(arguments.output, rows, environment())
    _print(rows)


def _run(model: str, data: DataConfig, name: str, settings: dict, seed: int, arguments: argparse.Namespace) -> dict:
    per_step = 1024 // data.block_size
    config = TrainConfig(
        model=model,
        output=arguments.runs / f"{name}-{seed}".replace(" ", "-"),
        overwrite=True,
        stage="transfer",
        held_out="test" if data.text == STDLIB else TrainConfig.held_out,  # a file has no other split
        convert=ConversionConfig(**settings),
        data=data,
        transfer=TransferConfig(
            steps=arguments.steps,
            batch_size=per_step,
            learning_rate=2e-3,
            new_learning_rate=2e-2,
            calibrate="not calibrated" not in name,
        ),
        evaluation=HeldOutConfig(max_tokens=32768),
        run=RunConfig(seed=seed),
    )
    teacher, converted, transfer = train(config)
    return {
        "what": name,
        "seed": seed,
        "tokens": transfer.tokens,
        "teacher_loss": round(teacher.evaluation.loss, 4),
        "converted_loss": round(converted.evaluation.loss, 3),
        "loss": round(transfer.evaluation.loss, 4),
        "retention": round(transfer.retention, 3),
    }


def _print(rows: list[dict]) -> None:
    table = Table("what", title=f"after {rows[0]['tokens']:,} tokens of transfer", title_justify="left")
    for column in ("teacher's loss", "loss", "retention"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["what"], str(row["teacher_loss"]), str(row["loss"]), str(row["retention"]))
    console.print(table)


if __name__ == "__main__":
    main()
