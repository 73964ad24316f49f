"""The rules' Triton kernels on a GPU, beside flash attention and flash-linear-attention.

    python -m benchmarks.gpu

Correctness first: outputs, last state and all gradients against the reference in float64, for every form of gates, and
a decoding step, in each width of head that is timed. If the decay rule is wrong in one, nothing is timed; if the delta
rule is, it is left out. Then, in turns and by CUDA events, with the second-level cache emptied before each run:

- the forward pass, and with it all gradients, in bfloat16: softmax (torch's FlashAttention-2, and cuDNN's), the decay
  rule with both gates, with the key's alone and without any, the delta rule with a decay (gated delta) and without,
  both in plain PyTorch ("chunked"), and at one shape the decay rule token by token, as the paper's own code has it
  (one kernel there, and here a loop in PyTorch, whose launches count as well);
- one decoding step of 64 texts, beside softmax over a cache of 1,024 to 16,384 tokens;
- by length, which of softmax and the rules is faster;
- the first again, beside flash-linear-attention, where it is installed: fused_recurrent_gla (both gates), chunk_gla
  (the key's gate alone), and the gated delta rule, in chunks and token by token (forward alone).

Bytes are those of inputs and outputs, each moved once, and operations those of the recurrence token by token (of the
causal half of softmax): what must be done, of which a kernel may do more. Both stand beside what the card was measured
to reach, copying and multiplying. What was measured so far is kept at any moment, and `--resume` goes on from it, on
the same card with the same versions. With `--device cpu` and TRITON_INTERPRET=1 the same script runs in Triton's
interpreter on tiny shapes: a rehearsal, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

# Also as `python benchmarks/gpu.py`, where the folder rather than the repository is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import parsed, quantiles, read_csv, write_csv
from benchmarks.kernels import check, delta_inputs, fault, fault_of_step, forward, forward_and_backward, inputs
from fastweights.environment import environment
from fastweights.errors import FastWeightsError
from fastweights.ops import decay_rule, delta_rule

SHAPES = ((4, 2048, 16, 64), (4, 2048, 16, 128), (1, 16384, 16, 128), (8, 1024, 12, 64))
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
CONTEXTS = (1024, 4096, 16384)
TOKENS = 32768
"""In each call of the comparison by length."""
CHUNKED_UP_TO = 2048
"""Tokens of a text at which the chunked form is timed, which takes a second and more at longer ones."""
STEPS = ((64, 16, 64), (64, 16, 128))
GATES = {"both gates": (True, True), "key gate": (True, False), "value gate": (False, True), "no gates": (False, False)}
BY_LENGTH = {"decay, both gates": "#d1495b", "gated delta": "#00798c"}
"""Rules that are timed at each length, and their colours."""
HOST_CYCLES = 10_000_000
"""Of the card's clock, some milliseconds: longer than the host takes to launch anything here but the serial form."""
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

_STEP = "decoding step"
ALL, LENGTH, FLA = "all", "by length", "fla"
"""Comparisons."""
GOALS = {"fla, fused_recurrent_gla": "decay, both gates", "fla, chunk_gla": "decay, key gate"}
"""What of flash-linear-attention computes the same as what of ours."""

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
    parser.add_argument("--resume", action="store_true", help="keep what the file of --output has of this machine")
    parser.add_argument("--no-delta", action="store_true", help="leave the delta rule out")
    arguments = parser.parse_args()
    device = Device(arguments.device, arguments.repeats)
    try:
        check_device(device)
    except FastWeightsError as error:
        sys.exit(f"benchmarks.gpu: {error}")
    T, H, widths = (257, 2, sorted({D for *_, D in SHAPES})) if device.is_gpu else (8, 1, [16])
    forms = GATES if device.is_gpu else dict(list(GATES.items())[:1])  # the interpreter takes seconds for each
    for D, (dtype, tolerance) in product(widths, TOLERANCES.items()):
        q, k, v, *logs = inputs(1, T, H, D, device.name, dtype)
        for gates, there in forms.items():
            given = [q, k, v, *(log if has else None for log, has in zip(logs, there, strict=True))]
            check("gpu", given, tolerance, f" ({gates}, {dtype}, heads of {D})")
        what = f" (a decoding step, {dtype}, heads of {D})"
        if wrong := fault_of_step("gpu", inputs(2, 1, H, D, device.name, dtype), tolerance, what):
            sys.exit(f"{wrong}; nothing timed")
    console.print(f"the kernels agree with the reference ({', '.join(forms)}; float32 and bfloat16; {widths})")
    delta = not arguments.no_delta and all(check_delta(device, T, H, D) for D in widths)
    if find_spec("fla") is None:
        console.print(
            "flash-linear-attention is not installed: its rows are left out (pip install flash-linear-attention)"
        )

    here = {**environment(), **gpu_environment(device)}
    rows = finished(arguments.output, here) if arguments.resume else []
    limits = {name: rows[0][name] for name in CEILINGS} if rows else ceilings(device)
    done = {_group(row) for row in rows}
    for group, measured in _all(device, limits, delta):
        if group in done:
            continue
        rows += measured()
        # What there is so far is kept: a rented machine may be taken away at any moment.
        write_csv(arguments.output, rows, {**here, **limits})
    show(rows)
    plot(rows, arguments.output.with_suffix(".png"))
    console.print(f"written to {arguments.output}, and drawn in {arguments.output.with_suffix('.png')}")


_Group = tuple[int, int, int, int, bool, str]
"""B, T, H, D, whether it is a decoding step, and of which comparison it is."""


def _group(row: Mapping[str, Any]) -> _Group:
    return (*(row[name] for name in "BTHD"), row["mode"] == _STEP, row["comparison"])  # type: ignore[return-value]


def finished(file: Path, here: Mapping[str, object]) -> list[dict]:
    """Rows of a file that were measured where this runs, with the same versions and commit."""
    rows = read_csv(file) if file.exists() else []
    same = {name: parsed(str(value)) for name, value in here.items() if name not in ("date", "load", "threads")}
    # Of a copy without its history the commit is not known: rows of another version may lack a column.
    whole = [row for row in rows if "comparison" in row]
    kept = [row for row in whole if all(row.get(name) == value for name, value in same.items())]
    if file.exists():
        console.print(f"{file} has {len(rows)} rows, {len(kept)} of them of this machine, versions and commit: kept")
    return kept


def _all(device: Device, limits: dict[str, float], delta: bool) -> Iterator[tuple[_Group, Callable[[], list[dict]]]]:
    """Each group of rows, and what measures it."""
    shapes, steps, lengths, contexts = SHAPES, STEPS, [(max(1, TOKENS // T), T, 16, 64) for T in LENGTHS], CONTEXTS
    if not device.is_gpu:
        shapes, steps, lengths, contexts = ((1, 8, 1, 16),), ((1, 1, 16),), [(1, 4, 1, 16)], (32,)
    common: dict[str, Any] = {"device": device, "limits": limits, "delta": delta}
    for shape in shapes:
        yield (*shape, False, ALL), partial(measure, *shape, serial=shape == shapes[0], **common)
    for B, H, D in steps:
        yield (B, 1, H, D, True, ALL), partial(measure_step, B, H, D, contexts=contexts, **common)
    for shape in lengths:
        yield (*shape, False, LENGTH), partial(measure, *shape, comparison=LENGTH, **common)
    # Last, as its kernels are tuned for minutes, and may fail in ways of their own.
    for shape in shapes if find_spec("fla") is not None else ():
        yield (*shape, False, FLA), partial(measure, *shape, comparison=FLA, **common)


def check_delta(device: Device, T: int, H: int, D: int) -> bool:
    """Whether the delta rule's kernels agree with the reference; where they do not, it says so."""
    for dtype, tolerance in TOLERANCES.items():
        given = delta_inputs(1, T, H, D, device.name, dtype)
        for what, tensors in (("gated delta", given), ("delta", given[:4])):
            if wrong := fault("gpu", tensors, tolerance, f" ({what}, {dtype}, heads of {D})", delta_rule):
                console.print(f"{wrong}: the delta rule is left out")
                return False
        what, one = f" (a decoding step, {dtype}, heads of {D})", delta_inputs(2, 1, H, D, device.name, dtype)
        if wrong := fault_of_step("gpu", one, tolerance, what, delta_rule):
            console.print(f"{wrong}: the delta rule is left out")
            return False
    console.print(f"so do the delta rule's, with a decay and without (heads of {D})")
    return True


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


CEILINGS = ("ceiling_GB/s", "ceiling_TFLOP/s")


def ceilings(device: Device) -> dict[str, float]:
    """What the card reaches: bytes a second copying, and operations a second multiplying bfloat16 matrices."""
    size, side = (1 << 30, 8192) if device.is_gpu else (1 << 20, 64)
    source = torch.zeros(size, dtype=torch.uint8, device=device.name)
    target, a = torch.empty_like(source), torch.randn(side, side, device=device.name, dtype=torch.bfloat16)
    times = device.times({"copy": lambda: target.copy_(source), "multiply": lambda: a @ a})
    reached = 2 * size / times["copy"]["p50"] / 1e6, 2 * side**3 / times["multiply"]["p50"] / 1e9
    return {name: float(f"{value:.4g}") for name, value in zip(CEILINGS, reached, strict=True)}


def measure(
    B: int,
    T: int,
    H: int,
    D: int,
    *,
    device: Device,
    limits: dict[str, float],
    delta: bool,
    comparison: str = ALL,
    serial: bool = False,
) -> list[dict]:
    """Rows of one shape, forward and with all gradients; by length of softmax and `BY_LENGTH` alone.

    `serial`: and of the decay rule token by token.
    """
    rule, of_delta = (make(B, T, H, D, device.name, torch.bfloat16) for make in (inputs, delta_inputs))
    q, k, v, *_ = rule
    softmax = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    flash = _softmax(device, SDPBackend.FLASH_ATTENTION)
    contenders: dict[str, tuple[Callable, list[torch.Tensor]]] = {"softmax, flash": (flash, softmax)}
    contenders |= {"decay, both gates": (_decay("gpu", (True, True)), rule)}
    if device.is_gpu:
        contenders |= {"softmax, cuDNN": (_softmax(device, SDPBackend.CUDNN_ATTENTION), softmax)}
    contenders |= {"gated delta": (_delta("gpu"), of_delta)}
    if comparison != LENGTH:
        contenders |= {"decay, key gate": (_decay("gpu", (True, False)), rule[:4])}
    if comparison == FLA:
        contenders |= _of_fla(rule, of_delta)
    if comparison == ALL:
        contenders |= {"decay, no gates": (_decay("gpu", (False, False)), rule[:3])}
        contenders |= {"delta": (_delta("gpu"), of_delta[:4])}
        if T <= CHUNKED_UP_TO:
            contenders |= {"decay, both gates, chunked in PyTorch": (_decay("chunked", (True, True)), rule)}
            contenders |= {"gated delta, chunked in PyTorch": (_delta("chunked"), of_delta)}
        if serial:
            contenders |= {"decay, both gates, token by token in PyTorch": (_decay("reference", (True, True)), rule)}
    contenders = {name: task for name, task in contenders.items() if delta or not _is_delta(name)}
    rows = []
    for mode, wrap in (("forward", forward), ("forward and backward", forward_and_backward)):
        tasks = {name: wrap(run, tensors) for name, (run, tensors) in contenders.items()}
        times = device.times(_that_run(tasks, f"{mode}, {B} x {T} x {H} x {D}"))
        for name, of in times.items():
            amounts = work(name, mode, B, T, H, D)
            rows.append(_row(mode, name, (B, T, H, D), of, times["softmax, flash"]["p50"], amounts, limits, comparison))
    return rows


def _that_run(tasks: Mapping[str, Task], where: str) -> dict[str, Task]:
    """Those that do not fail, in memory for instance; what fails is said. The first must run."""
    found = {}
    for name, task in tasks.items():
        try:
            task()
        except Exception as error:  # Triton's and other libraries' are of no common class
            if not found:
                raise
            console.print(f"left out: {name}, {where}: {(str(error).splitlines() or [type(error).__name__])[0]}")
        else:
            found[name] = task
    return found


def measure_step(
    B: int, H: int, D: int, *, device: Device, limits: dict[str, float], delta: bool, contexts: tuple[int, ...]
) -> list[dict]:
    """Rows of one decoding step: ours, and softmax after so many tokens."""
    rule, of_delta = (make(B, 1, H, D, device.name, torch.bfloat16) for make in (inputs, delta_inputs))
    state = torch.randn(B, H, D, D, device=device.name)
    flash = {}
    for context in contexts:
        q = torch.randn(B, H, 1, D, device=device.name, dtype=torch.bfloat16)
        k, v = (torch.randn(B, H, context, D, device=device.name, dtype=torch.bfloat16) for _ in range(2))
        flash[f"softmax after {context:,}"] = lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)
    kept: dict[str, Any] = {"initial_state": state, "output_final_state": True, "backend": "gpu"}
    tasks: dict[str, Task] = {**flash, "decay, both gates": lambda: decay_rule(*rule, **kept)}
    if delta:
        tasks |= {"gated delta": lambda: delta_rule(*of_delta, **kept)}
    with torch.no_grad():
        times = device.times(_that_run(tasks, f"{_STEP}, {B} x 1 x {H} x {D}"))
    rows = []
    for name, of in times.items():
        elements = B * H * D
        context = int(name.rsplit(" ", 1)[-1].replace(",", "")) if name.startswith("softmax") else 0
        amounts = (4 * elements * context, 4 * elements * context)
        if not context:
            amounts = (2 * 4 * elements * D + 2 * _tensors(name, D) * elements, 2 * _products(name)[0] * elements * D)
        first = next(iter(flash))
        rows.append(_row(_STEP, name, (B, 1, H, D), of, times[first]["p50"], amounts, limits, ALL))
    return rows


def work(name: str, mode: str, B: int, T: int, H: int, D: int) -> tuple[float, float]:
    """Bytes that must be moved and operations that must be done, at the least.

    Of softmax, the two products of the causal half, and two and a half times as much backward.
    """
    backward, tensors = mode != "forward", _tensors(name, D)
    moved = 2 * B * T * H * D * (tensors + (2 * tensors - 1 if backward else 0))
    if name.startswith("softmax"):
        return moved, 2 * B * H * D * T * T * (3.5 if backward else 1)
    return moved, 2 * B * T * H * D * D * sum(_products(name)[: 1 + backward])


def _is_delta(name: str) -> bool:
    return "delta" in name


def _tensors(name: str, D: int) -> float:
    """Tensors of D numbers a token and head that go in and come out; the delta rule's gates are one number each."""
    if name.startswith("softmax"):
        return 4
    if _is_delta(name):
        return 4 + (1 if name == "delta" else 2) / D
    return 4 + next((n for key, n in {"no gates": 0, "key gate": 1, "chunk_gla": 1}.items() if key in name), 2)


def _products(name: str) -> tuple[int, int]:
    """Products of a vector and a state, 2D² operations each, for a token: forward, and more of them backward.

    Forward a write and a read, and in the delta rule a read by the key. Backward the state once more (the same but for
    the read), and of each a product for either side's gradient: q and S; k, v and S by the write; k and S by the key.
    """
    return (3, 9) if _is_delta(name) else (2, 5)


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
        if before != (group := (row["mode"], *(row[name] for name in "BTHD"), row["comparison"])):
            table.add_section()
            beside = f", {row['comparison']}" if row["comparison"] != ALL else ""
            table.add_row("{}, {} x {} x {} x {}".format(*group) + beside, style="bold")
            before = group
        times = [f"{row[f'{p}_ms']:.3f}" for p in ("p20", "p50", "p80")]
        shares = [f"{row['share_of_bytes']:.0%}", f"{row['share_of_flops']:.0%}"]
        table.add_row(row["what"], *times, f"{row['times_faster_than_softmax']:.2f}", *shares)
    console.print(table)
    for theirs, ours in GOALS.items():
        for group in dict.fromkeys((row["mode"], *_group(row)) for row in rows if row["what"] == theirs):
            ms = {row["what"]: row["p50_ms"] for row in rows if (row["mode"], *_group(row)) == group}
            where = "{}, {} x {} x {} x {}".format(*group)
            if ours in ms:
                console.print(f"{where}: {ours} takes {ms[ours] / ms[theirs]:.2f} of the time of {theirs}")
    for mode in ("forward", "forward and backward"):
        by_length = [row for row in rows if row["comparison"] == LENGTH and row["mode"] == mode]
        for softmax in sorted({row["what"] for row in by_length if row["what"].startswith("softmax")}):
            ms = {row["T"]: row["p50_ms"] for row in by_length if row["what"] == softmax}
            for rule in BY_LENGTH:
                ours = [row for row in by_length if row["what"] == rule]
                faster = next((row["T"] for row in ours if row["p50_ms"] < ms.get(row["T"], 0)), None)
                where = "at no length here" if faster is None else f"from {faster:,} tokens on"
                if ours:
                    console.print(f"{mode}: {rule} is faster than {softmax}, {where}")


def plot(rows: list[dict], output: Path) -> None:
    """Time by length, of softmax and the rules."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for panel, mode in zip(figure.subplots(1, 2), ("forward", "forward and backward"), strict=True):
        for what, color in {"softmax, flash": "#444444", "softmax, cuDNN": "#8d6a9f", **BY_LENGTH}.items():
            points = [
                row for row in rows if row["comparison"] == LENGTH and row["mode"] == mode and row["what"] == what
            ]
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
    comparison: str,
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
        "comparison": comparison,
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


def _delta(backend: str) -> Callable:
    return lambda *tensors: delta_rule(*tensors, backend=backend)[0]


def _of_fla(rule: list[torch.Tensor], of_delta: list[torch.Tensor]) -> dict[str, tuple[Callable, list[torch.Tensor]]]:
    try:
        gla, delta = import_module("fla.ops.gla"), import_module("fla.ops.gated_delta_rule")  # which are optional
    except Exception as error:  # of any class: versions of Triton and of it that do not fit each other
        console.print(f"left out: flash-linear-attention, which cannot be imported: {error}")
        return {}
    by_chunks, by_tokens = delta.chunk_gated_delta_rule, delta.fused_recurrent_gated_delta_rule

    def gated_delta(run: Callable) -> Callable:
        return lambda q, k, v, beta, decay: run(q, k, v, g=decay[..., 0], beta=beta[..., 0])[0]

    return {
        "fla, fused_recurrent_gla": (lambda q, k, v, f, z: gla.fused_recurrent_gla(q, k, v, gk=f, gv=z)[0], rule),
        "fla, chunk_gla": (lambda q, k, v, f: gla.chunk_gla(q, k, v, f)[0], rule[:4]),
        "fla, chunk_gated_delta_rule": (gated_delta(by_chunks), of_delta),
        "fla, fused_recurrent_gated_delta_rule": (gated_delta(by_tokens), of_delta),
    }


if __name__ == "__main__":
    main()
