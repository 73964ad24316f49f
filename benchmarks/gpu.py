"""The decay rule's Triton kernels on a GPU, beside flash attention and flash-linear-attention.

    python -m benchmarks.gpu

Correctness first: outputs, last state and all gradients against the reference in float64, for every form of gates; if
one is wrong, nothing is timed. Then, in turns and by CUDA events, with the second-level cache emptied before each run:

- the forward pass, and with it all gradients, in bfloat16: softmax (torch's FlashAttention-2, and cuDNN's), the decay
  rule with both gates, with the key's alone and without any, the same in plain PyTorch ("chunked"), and of
  flash-linear-attention, where it is installed, fused_recurrent_gla (both gates) and chunk_gla (the key's gate alone);
- one decoding step of 64 texts, beside softmax over a cache of 1,024 to 16,384 tokens;
- by length, which of softmax and the decay rule is faster.

Bytes are those of inputs and outputs, each moved once, and operations those of the recurrence token by token (of the
causal half of softmax): what must be done, of which a kernel may do more. Both stand beside what the card was measured
to reach, copying and multiplying. With `--device cpu` and TRITON_INTERPRET=1 the same script runs in Triton's
interpreter on tiny shapes: a rehearsal, whose times mean nothing.

With `--tune`, only how long the decay rule takes when its kernels are launched in other ways than `ops.decay_rule.gpu`
has in its table, one kernel at a time.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

# Also as `python benchmarks/gpu.py`, where the folder rather than the repository is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import quantiles, write_csv
from benchmarks.kernels import check, forward, forward_and_backward, inputs
from fastweights.environment import environment
from fastweights.errors import FastWeightsError
from fastweights.ops import decay_rule
from fastweights.ops.decay_rule import gpu

SHAPES = ((4, 2048, 16, 64), (4, 2048, 16, 128), (1, 16384, 16, 128), (8, 1024, 12, 64))
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
CONTEXTS = (1024, 4096, 16384)
TOKENS = 32768
"""In each call of the comparison by length."""
STEPS = ((64, 16, 64), (64, 16, 128))
VARIANTS: dict[str, list[dict]] = {
    "written": [{"num_warps": 2}, {"BV": 32}, {"precision": "bf16"}],
    "read_back": [{"num_warps": 2}, {"BV": 32}, {"precision": "bf16"}],
    "scan": [{"num_stages": 1}, {"num_stages": 5}, {"BK": 8}, {"BK": 32}, {"num_warps": 1}, {"num_warps": 4}],
    "outputs": [{"num_warps": 2}, {"num_warps": 4}, {"num_warps": 8}, {"BV": 32}, {"precision": "tf32"}],
    "gradients": [{"num_warps": 4}, {"num_warps": 8}, {"BK": 32, "BV": 32}, {"precision": "tf32"}],
    "step": [{"num_warps": 1}, {"num_warps": 4}, {"num_warps": 8}, {"BK": 32}, {"BV": 16}, {"BV": 64}, {"BV": 128}],
}
"""What is tried of each kernel in place of what it is launched with."""
GATES = {"both gates": (True, True), "key gate": (True, False), "value gate": (False, True), "no gates": (False, False)}
HOST_CYCLES = 10_000_000
"""Of the card's clock, some milliseconds: longer than the host takes to launch anything here."""
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

console = Console()
Task = Callable[[], object]


@dataclass(frozen=True)
class Device:
    """Where to run, and how a run is timed there."""

    name: str
    repeats: int

    @property
    def is_gpu(self) -> bool:
        return self.name == "cuda"

    def times(self, tasks: Mapping[str, Task]) -> dict[str, dict[str, float]]:
        """p20, p50 and p80 in milliseconds of each, taken in turns; on a GPU after two runs to compile and warm up."""
        warm_up = 2 if self.is_gpu else 0
        found: dict[str, list[float]] = {name: [] for name in tasks}
        for round_ in range(warm_up + self.repeats):
            for name, task in tasks.items():
                elapsed = self._time(task)
                if round_ >= warm_up:
                    found[name].append(elapsed)
        return {name: quantiles(values) for name, values in found.items()}

    def _time(self, task: Task) -> float:
        if not self.is_gpu:
            start = time.perf_counter()
            task()
            return 1e3 * (time.perf_counter() - start)
        _second_level_cache().zero_()
        torch.cuda._sleep(HOST_CYCLES)  # while the host says what is to run: what is timed is the GPU alone
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        task()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def main() -> None:
    """Check, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.csv"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()
    device = Device(arguments.device, arguments.repeats)
    try:
        check_device(device)
    except FastWeightsError as error:
        sys.exit(f"benchmarks.gpu: {error}")
    if arguments.tune:
        tune(device)
        return
    T, H, D = (257, 2, 64) if device.is_gpu else (20, 1, 16)
    for dtype, tolerance in TOLERANCES.items():
        q, k, v, *logs = inputs(1, T, H, D, device.name, dtype)
        for gates, there in GATES.items():
            given = [q, k, v, *(log if has else None for log, has in zip(logs, there, strict=True))]
            check("gpu", given, tolerance, f" ({gates}, {dtype})")
    console.print(f"the kernels agree with the reference ({', '.join(GATES)}; float32 and bfloat16)")
    if find_spec("fla") is None:
        console.print(
            "flash-linear-attention is not installed: its rows are left out (pip install flash-linear-attention)"
        )

    limits = ceilings(device)
    rows = []
    for measured in _all(device, limits):
        rows += measured
        # What there is so far is kept: a rented machine may be taken away at any moment.
        write_csv(arguments.output, rows, {**environment(), **gpu_environment(device), **limits})
    show(rows)
    plot(rows, arguments.output.with_suffix(".png"))
    console.print(f"written to {arguments.output}, and drawn in {arguments.output.with_suffix('.png')}")


def tune(device: Device) -> None:
    """Print how long calls take with each variant of each kernel's launch."""
    for wide, D in enumerate((64, 128)):
        shape = (4, 2048, 16) if device.is_gpu else (1, 20, 1)
        calls = {"step": _step_task(64 if device.is_gpu else 1, 16, D, device)}
        long = inputs(*shape, D, device.name, torch.bfloat16)
        calls |= {"other": forward_and_backward(_decay("gpu", (True, True)), long)}
        for name, call in calls.items():
            console.print(f"D = {D}, {name}, as it is: {device.times({name: call})[name]['p50']:.4f} ms")
        for kernel, variants in VARIANTS.items():
            name = "step" if kernel == "step" else "other"
            usual = gpu.LAUNCHES[kernel]
            for variant in variants:
                gpu.LAUNCHES[kernel] = tuple(x._replace(**variant) if i == wide else x for i, x in enumerate(usual))
                try:
                    found = f"{device.times({name: calls[name]})[name]['p50']:.4f} ms"
                except Exception as error:  # a launch that does not fit, of which Triton has several kinds
                    found = str(error).splitlines()[0]
                console.print(f"D = {D}, {kernel}, {variant}: {found}")
            gpu.LAUNCHES[kernel] = usual


def _step_task(B: int, H: int, D: int, device: Device) -> Task:
    """One decoding step with a state."""
    tensors, state = inputs(B, 1, H, D, device.name, torch.bfloat16), torch.randn(B, H, D, D, device=device.name)
    return forward(
        lambda *rule: decay_rule(*rule, initial_state=state, output_final_state=True, backend="gpu")[0], tensors
    )


def _all(device: Device, limits: dict[str, float]) -> Iterator[list[dict]]:
    if not device.is_gpu:
        yield measure(1, 20, 1, 16, device=device, limits=limits)
        yield measure_step(1, 1, 16, device=device, limits=limits, contexts=(32,))
        yield measure(1, 16, 1, 16, device=device, limits=limits, by_length=True)
        return
    for T in LENGTHS:
        yield measure(max(1, TOKENS // T), T, 16, 64, device=device, limits=limits, by_length=True)
    for shape in STEPS:
        yield measure_step(*shape, device=device, limits=limits, contexts=CONTEXTS)
    for shape in SHAPES:
        yield measure(*shape, device=device, limits=limits)


def check_device(device: Device) -> None:
    """Whether the kernels can run there.

    Raises:
        FastWeightsError: if not; it says what is missing.
    """
    if find_spec("triton") is None:
        raise FastWeightsError("Triton is not installed: pip install triton")
    if device.is_gpu and not torch.cuda.is_available():
        raise FastWeightsError(
            "there is no GPU here that torch can use; --device cpu rehearses, with TRITON_INTERPRET=1"
        )
    if not device.is_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise FastWeightsError("on a CPU the kernels run in Triton's interpreter alone: set TRITON_INTERPRET=1")


def ceilings(device: Device) -> dict[str, float]:
    """What the card reaches: bytes a second copying, and operations a second multiplying bfloat16 matrices."""
    size, side = (1 << 30, 8192) if device.is_gpu else (1 << 20, 64)
    source = torch.zeros(size, dtype=torch.uint8, device=device.name)
    target, a = torch.empty_like(source), torch.randn(side, side, device=device.name, dtype=torch.bfloat16)
    times = device.times({"copy": lambda: target.copy_(source), "multiply": lambda: a @ a})
    return {
        "ceiling_GB/s": float(f"{2 * size / times['copy']['p50'] / 1e6:.4g}"),
        "ceiling_TFLOP/s": float(f"{2 * side**3 / times['multiply']['p50'] / 1e9:.4g}"),
    }


def measure(
    B: int,
    T: int,
    H: int,
    D: int,
    *,
    device: Device,
    limits: dict[str, float],
    by_length: bool = False,
) -> list[dict]:
    """Rows of one shape, forward and with all gradients; `by_length`, of softmax and of both gates alone."""
    rule = inputs(B, T, H, D, device.name, torch.bfloat16)
    q, k, v, f, z = rule
    softmax = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    flash = _softmax(device, SDPBackend.FLASH_ATTENTION)
    contenders: dict[str, tuple[Callable, list[torch.Tensor]]] = {"softmax, flash": (flash, softmax)}
    contenders |= {"decay, both gates": (_decay("gpu", (True, True)), rule)}
    if device.is_gpu:
        contenders |= {"softmax, cuDNN": (_softmax(device, SDPBackend.CUDNN_ATTENTION), softmax)}
    if not by_length:
        contenders |= {"decay, key gate": (_decay("gpu", (True, False)), rule[:4])}
        contenders |= {"decay, no gates": (_decay("gpu", (False, False)), rule[:3])}
        contenders |= {"decay, both gates, chunked in PyTorch": (_decay("chunked", (True, True)), rule)}
        contenders |= _of_fla(q, k, v, f, z)
    rows = []
    for mode, wrap in (("forward", forward), ("forward and backward", forward_and_backward)):
        tasks = {name: wrap(run, tensors) for name, (run, tensors) in contenders.items()}
        times = device.times(_that_run(tasks, f"{mode}, {B} x {T} x {H} x {D}"))
        for name, of in times.items():
            amounts = work(name, mode, B, T, H, D)
            rows.append(_row(mode, name, (B, T, H, D), of, times["softmax, flash"]["p50"], amounts, limits, by_length))
    return rows


def _that_run(tasks: Mapping[str, Task], where: str) -> dict[str, Task]:
    """Those that do not fail, in memory for instance; what fails is said. The first must run."""
    found = {}
    for name, task in tasks.items():
        try:
            task()
        except (RuntimeError, NotImplementedError) as error:
            if not found:
                raise
            console.print(f"left out: {name}, {where}: {str(error).splitlines()[0]}")
        else:
            found[name] = task
    return found


def measure_step(
    B: int, H: int, D: int, *, device: Device, limits: dict[str, float], contexts: tuple[int, ...]
) -> list[dict]:
    """Rows of one decoding step: ours, and softmax after so many tokens."""
    rule = inputs(B, 1, H, D, device.name, torch.bfloat16)
    state = torch.randn(B, H, D, D, device=device.name)
    flash = {}
    for context in contexts:
        q = torch.randn(B, H, 1, D, device=device.name, dtype=torch.bfloat16)
        k, v = (torch.randn(B, H, context, D, device=device.name, dtype=torch.bfloat16) for _ in range(2))
        flash[f"softmax after {context:,}"] = lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)
    tasks: dict[str, Task] = {
        "decay, both gates": lambda: decay_rule(*rule, initial_state=state, output_final_state=True, backend="gpu"),
        **flash,
    }
    with torch.no_grad():
        times = device.times(tasks)
    rows = []
    for name, of in times.items():
        elements = B * H * D
        context = int(name.rsplit(" ", 1)[-1].replace(",", "")) if name.startswith("softmax") else 0
        amounts = (4 * elements * context, 4 * elements * context)
        if not context:
            amounts = (2 * 4 * elements * D + 2 * 6 * elements, 4 * elements * D)
        first = next(iter(flash))
        rows.append(_row("decoding step", name, (B, 1, H, D), of, times[first]["p50"], amounts, limits, False))
    return rows


def work(name: str, mode: str, B: int, T: int, H: int, D: int) -> tuple[float, float]:
    """Bytes that must be moved and operations that must be done, at the least.

    A token's write and read are 2D² operations each. Backward they are five: the state once more, the gradients of q, k
    and v, and the state's gradient. Of softmax, the two products of the causal half, and two and a half times as much.
    """
    gates = {"no gates": 0, "key gate": 1, "chunk_gla": 1}
    tensors = 4 + (0 if name.startswith("softmax") else next((n for key, n in gates.items() if key in name), 2))
    backward = mode != "forward"
    moved = 2 * B * T * H * D * (tensors + (2 * tensors - 1 if backward else 0))
    if name.startswith("softmax"):
        return moved, 2 * B * H * D * T * T * (3.5 if backward else 1)
    return moved, 2 * B * T * H * D * D * (7 if backward else 2)


def gpu_environment(device: Device) -> dict[str, object]:
    """The card and the versions that kernels depend on."""
    card = torch.cuda.get_device_name() if device.is_gpu else "none (Triton's interpreter)"
    return {"gpu": card, "triton": version("triton"), "cuda": torch.version.cuda or "none"}


def show(rows: list[dict]) -> None:
    """A table of all, by B x T x H x D; bytes and FLOP a second in percent of what the card reaches."""
    table = Table("", title="bfloat16, causal", title_justify="left")
    for column in ("p20 ms", "p50 ms", "p80 ms", "softmax / this", "bytes", "FLOP"):
        table.add_column(column, justify="right")
    before = None
    for row in rows:
        if before != (group := (row["mode"], *(row[name] for name in "BTHD"))):
            table.add_section()
            table.add_row("{}, {} x {} x {} x {}".format(*group), style="bold")
            before = group
        times = [f"{row[f'{p}_ms']:.3f}" for p in ("p20", "p50", "p80")]
        shares = [f"{row['share_of_bytes']:.0%}", f"{row['share_of_flops']:.0%}"]
        table.add_row(row["what"], *times, f"{row['times_faster_than_softmax']:.2f}", *shares)
    console.print(table)
    for mode in ("forward", "forward and backward"):
        by_length = [row for row in rows if row["by_length"] and row["mode"] == mode]
        for softmax in sorted({row["what"] for row in by_length if row["what"].startswith("softmax")}):
            ms = {row["T"]: row["p50_ms"] for row in by_length if row["what"] == softmax}
            decay = [row for row in by_length if row["what"] == "decay, both gates"]
            faster = next((row["T"] for row in decay if row["p50_ms"] < ms.get(row["T"], 0)), None)
            where = "at no length here" if faster is None else f"from {faster:,} tokens on"
            console.print(f"{mode}: the decay rule with both gates is faster than {softmax}, {where}")


def plot(rows: list[dict], output: Path) -> None:
    """Time by length, of softmax and the decay rule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for panel, mode in zip(figure.subplots(1, 2), ("forward", "forward and backward"), strict=True):
        for what, color in (
            ("softmax, flash", "#444444"),
            ("softmax, cuDNN", "#8d6a9f"),
            ("decay, both gates", "#d1495b"),
        ):
            points = [row for row in rows if row["by_length"] and row["mode"] == mode and row["what"] == what]
            panel.plot(
                [row["T"] for row in points],
                [row["p50_ms"] for row in points],
                label=what,
                color=color,
                marker="o",
                markersize=3,
            )
        panel.set(xscale="log", yscale="log", xlabel="tokens in a text", ylabel="ms", title=mode)
        panel.legend(frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)


def _row(
    mode: str,
    name: str,
    shape: tuple[int, ...],
    times: dict[str, float],
    softmax_ms: float,
    amounts: tuple[float, float],
    limits: dict[str, float],
    by_length: bool,
) -> dict:
    gigabytes, teraflops = amounts[0] / times["p50"] / 1e6, amounts[1] / times["p50"] / 1e9
    return {
        "mode": mode,
        **dict(zip("BTHD", shape, strict=True)),
        "what": name,
        **{f"{p}_ms": round(value, 4) for p, value in times.items()},
        "times_faster_than_softmax": round(softmax_ms / times["p50"], 3),
        "GB/s": round(gigabytes, 2),
        "TFLOP/s": round(teraflops, 4),
        "share_of_bytes": round(gigabytes / limits["ceiling_GB/s"], 3),
        "share_of_flops": round(teraflops / limits["ceiling_TFLOP/s"], 3),
        "by_length": by_length,
    }


def _second_level_cache() -> torch.Tensor:
    """Something larger than it, to write over what it holds."""
    global _FLUSH
    if _FLUSH is None:
        _FLUSH = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    return _FLUSH


_FLUSH: torch.Tensor | None = None


def _softmax(device: Device, backend: SDPBackend) -> Callable:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend) if device.is_gpu else nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run


def _decay(backend: Any, gates: tuple[bool, bool]) -> Callable:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *logs: torch.Tensor) -> torch.Tensor:
        given = iter(logs)
        return decay_rule(q, k, v, *(next(given) if has else None for has in gates), backend=backend)[0]

    return run


def _of_fla(*tensors: torch.Tensor) -> dict[str, tuple[Callable, list[torch.Tensor]]]:
    if find_spec("fla") is None:
        return {}
    gla = import_module("fla.ops.gla")  # which is optional

    return {
        "fla, fused_recurrent_gla": (
            lambda q, k, v, f, z: gla.fused_recurrent_gla(q, k, v, gk=f, gv=z)[0],
            list(tensors),
        ),
        "fla, chunk_gla": (lambda q, k, v, f: gla.chunk_gla(q, k, v, f)[0], list(tensors[:4])),
    }


if __name__ == "__main__":
    main()
