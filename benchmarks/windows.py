"""Window attention with sinks and its gradients on the CPU: by flash attention, and written out with all logits.

    python -m benchmarks.windows

9 heads of 64 that share 3 keys and values, as in SmolLM2-135M, 2,048 tokens, four sinks, in float32 and bf16. Outputs
and all gradients are first checked against the window written out in float64; on a failed check nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import time_side_by_side, write_csv
from benchmarks.kernels import forward
from fastweights.environment import environment
from fastweights.layers.window import Sinks, window_attention, written_out

HEADS, KV_HEADS, DIM, SINKS = 9, 3, 64, 4
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/windows.csv"))
    parser.add_argument("--windows", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    for dtype, tolerance in TOLERANCES.items():
        for window in arguments.windows:
            check(window, dtype, tolerance)
            rows += measure(window, arguments.tokens, dtype, arguments.repeats)
    show(rows)
    write_csv(arguments.output, rows, {"threads": arguments.threads, **environment()})
    console.print(f"written to {arguments.output}")


def inputs(tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and, for sinks, queries, keys and values."""
    heads = (HEADS, KV_HEADS, KV_HEADS)
    of_text = [torch.randn(1, tokens, n, DIM, dtype=dtype) for n in heads]
    return [*of_text, torch.randn_like(of_text[0]), *torch.randn(2, 1, 1, SINKS, KV_HEADS, DIM, dtype=dtype)]


def run(which: str, window: int, *tensors: torch.Tensor) -> torch.Tensor:
    """The window's output."""
    q, k, v, *sinks = tensors
    index, scale = torch.arange(q.shape[1])[None], DIM**-0.5
    if which == "written out":
        return written_out(q, k, v, window, scale, None, index, Sinks(*sinks))
    return window_attention(q, k, v, window=window, scale=scale, index=index, sinks=Sinks(*sinks))


def check(window: int, dtype: torch.dtype, tolerance: float) -> None:
    """Ends the program if outputs or gradients are not what they should be."""
    tensors = inputs(3 * window // 2, dtype)
    found = with_gradients("flash", window, tensors)
    truth = with_gradients("written out", window, [x.double() for x in tensors])
    for name, one, true in zip(("o", "dq", "dk", "dv", "dsink_q", "dsink_k", "dsink_v"), found, truth, strict=True):
        error = ((one - true).abs().max() / true.abs().max()).item()
        if not error <= tolerance:
            sys.exit(f"{name} of a window of {window} in {dtype} is off by {error:.1e}; nothing timed")


def with_gradients(which: str, window: int, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The window's output, and the gradients of all inputs."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    o = run(which, window, *leaves)
    return [o, *torch.autograd.grad(o, leaves, torch.ones_like(o))]


def measure(window: int, tokens: int, dtype: torch.dtype, repeats: int) -> list[dict]:
    """Rows of milliseconds for the forward pass alone, and with all gradients."""
    tensors, rows = inputs(tokens, dtype), []
    names = ("written out", "flash")
    modes = {
        "forward": {name: forward(partial(run, name, window), tensors) for name in names},
        "forward and backward": {name: partial(with_gradients, name, window, tensors) for name in names},
    }
    for mode, tasks in modes.items():
        times = time_side_by_side(tasks, repeats)
        slower = times["written out"]["p50"]
        for which, ms in times.items():
            rounded = {f"{p}_ms": round(value, 2) for p, value in ms.items()}
            times_faster = round(slower / ms["p50"], 2)
            what = {"mode": mode, "dtype": str(dtype).removeprefix("torch."), "window": window, "tokens": tokens}
            rows.append({**what, "what": which, **rounded, "times_faster": times_faster})
    return rows


def show(rows: list[dict]) -> None:
    table = Table("pass", "dtype", "window", "", title=f"{HEADS} heads of {DIM}, {SINKS} sinks", title_justify="left")
    for column in ("p20 ms", "p50 ms", "p80 ms", "written out / this"):
        table.add_column(column, justify="right")
    for row in rows:
        times = [f"{row[f'{p}_ms']:.1f}" for p in ("p20", "p50", "p80")]
        faster = f"{row['times_faster']:.2f}"
        table.add_row(row["mode"], row["dtype"], str(row["window"]), row["what"], *times, faster)
    console.print(table)


if __name__ == "__main__":
    main()
