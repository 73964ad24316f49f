"""The rules of fast weights against softmax attention on the CPU, side by side in one process.

    python -m benchmarks.attention

12 heads of 64, causal, float32, as in GPT-2: softmax (torch's scaled_dot_product_attention), the decay rule with both
gates as vectors on the backends "cpu" and "chunked", and without gates on "cpu"; the delta rule with a decay (gated
delta) on both backends, and without it on "cpu". Rows of one head lie apart in memory, as projections give them, so
that nearly each is on a page of its own; "decay, cpu, heads first" is the same call with a head's rows side by side:
what a host's page tables cost. Every backend is first checked against the reference in float64; on a failed check no
timing is reported.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

# Also as `python benchmarks/attention.py`, where the folder rather than the repository is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import time_side_by_side, write_csv
from benchmarks.kernels import check, delta_inputs, forward, forward_and_backward, inputs
from fastweights.environment import environment
from fastweights.ops import decay_rule, delta_rule

HEADS, DIM = 12, 64
SHAPES = ((4, 1024), (1, 4096))
TOLERANCE = 1e-5

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/attention.csv"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    for backend in ("cpu", "chunked"):
        check(backend, inputs(1, 257, 2, DIM), TOLERANCE)
        check(backend, delta_inputs(1, 257, 2, DIM), TOLERANCE, rule=delta_rule)
    rows = [row for shape in SHAPES for row in measure(*shape, arguments.repeats)]
    show(rows)
    write_csv(arguments.output, rows, environment())
    console.print(f"written to {arguments.output}")


def measure(B: int, T: int, repeats: int) -> list[dict]:
    """Rows of milliseconds for the forward pass alone, and with the gradients of all inputs."""
    decay, delta = inputs(B, T, HEADS, DIM), delta_inputs(B, T, HEADS, DIM)
    softmax = [x.transpose(1, 2).contiguous() for x in decay[:3]]
    tasks: dict[str, tuple[Callable, list[torch.Tensor]]] = {
        "softmax": (
            lambda *x: F.scaled_dot_product_attention(*x, is_causal=True),
            softmax,
        ),
        "decay, cpu": (lambda *x: decay_rule(*x, backend="cpu")[0], decay),
        "decay, cpu, heads first": (lambda *x: decay_rule(*x, backend="cpu")[0], [_heads_first(x) for x in decay]),
        "decay, chunked": (lambda *x: decay_rule(*x, backend="chunked")[0], decay),
        "additive, cpu": (lambda *x: decay_rule(*x, backend="cpu")[0], decay[:3]),
        "gated delta, cpu": (lambda *x: delta_rule(*x, backend="cpu")[0], delta),
        "gated delta, chunked": (lambda *x: delta_rule(*x, backend="chunked")[0], delta),
        "delta, cpu": (lambda *x: delta_rule(*x, backend="cpu")[0], delta[:4]),
    }
    rows = []
    for mode, wrap in (("forward", forward), ("forward and backward", forward_and_backward)):
        gc.collect()
        times = time_side_by_side({name: wrap(*task) for name, task in tasks.items()}, repeats)
        softmax_ms = next(iter(times.values()))["p50"]
        for name, quantiles in times.items():
            faster = round(softmax_ms / quantiles["p50"], 2)
            ms = {f"{p}_ms": round(value, 2) for p, value in quantiles.items()}
            rows.append({"mode": mode, "B": B, "T": T, "what": name, **ms, "times_faster_than_softmax": faster})
    return rows


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """The same (B, T, H, D) with memory in the order (B, H, T, D)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def show(rows: list[dict]) -> None:
    table = Table("pass", "B", "T", "", title=f"{HEADS} heads of {DIM}, float32, causal", title_justify="left")
    for column in ("p20 ms", "p50 ms", "p80 ms", "softmax / this"):
        table.add_column(column, justify="right")
    for i, row in enumerate(rows):
        last = i + 1 == len(rows) or rows[i + 1]["mode"] != row["mode"]
        times = [f"{row[f'{p}_ms']:.1f}" for p in ("p20", "p50", "p80")]
        faster = f"{row['times_faster_than_softmax']:.2f}"
        table.add_row(row["mode"], str(row["B"]), str(row["T"]), row["what"], *times, faster, end_section=last)
    console.print(table)


if __name__ == "__main__":
    main()
