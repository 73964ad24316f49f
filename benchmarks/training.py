"""A step of stage finetune on SmolLM2-135M's shape: all weights or LoRA, in full precision or under bf16 autocast.

    python -m benchmarks.training

Beside the conversion stands the same step of the softmax model in full precision, trained on text alone, without a
teacher. Random weights do: time does not depend on what they say. Each round takes all in turn.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import time_side_by_side, write_csv
from benchmarks.decode import smollm2_shape
from fastweights.environment import environment
from fastweights.layers.linear import use_onednn
from fastweights.models import convert
from fastweights.models.lora import add_lora
from fastweights.settings.conversion import ConversionConfig
from fastweights.training.finetune import divergence, next_token_loss

HYBRID = ConversionConfig(window=128, gate_rank=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/training.csv"))
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in a step, of one block")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    teacher = smollm2_shape().requires_grad_(False)
    use_onednn(teacher)
    ids = torch.randint(teacher.config.vocab_size, (1, arguments.tokens))
    softmax = smollm2_shape().train()
    use_onednn(softmax)
    all_weights, lora = convert(teacher, HYBRID).requires_grad_(True).train(), convert(teacher, HYBRID).train()
    add_lora(lora, arguments.rank)
    steps = {
        "softmax, text alone, fp32": _step(softmax, None, ids, bf16=False),
        "all weights, fp32": _step(all_weights, teacher, ids, bf16=False),
        "all weights, bf16": _step(all_weights, teacher, ids, bf16=True),
        "LoRA, fp32": _step(lora, teacher, ids, bf16=False),
        "LoRA, bf16": _step(lora, teacher, ids, bf16=True),
    }
    times = time_side_by_side(steps, arguments.repeats, seconds=300.0)
    rows = [
        {"step": name, "tokens": arguments.tokens, "tokens_per_second": 1e3 * arguments.tokens / ms["p50"], **ms}
        for name, ms in times.items()
    ]
    _print(rows)
    write_csv(arguments.output, rows, environment())
    Console().print(f"written to {arguments.output}")


def _step(model, teacher, ids, *, bf16: bool) -> Callable[[], None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, use_cache=False).logits
            if teacher is None:
                loss = next_token_loss(logits, ids)
            else:
                with torch.no_grad():
                    truth = teacher(input_ids=ids, use_cache=False).logits
                loss = divergence(logits, truth)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _print(rows: list[dict]) -> None:
    table = Table(title="a training step")
    for column in ("step", "tokens a second", "ms (p20, p50, p80)", "of plain training"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in rows:
        spread = ", ".join(f"{row[name]:.0f}" for name in ("p20", "p50", "p80"))
        of_plain = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        table.add_row(row["step"], f"{row['tokens_per_second']:.0f}", spread, f"{of_plain:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
