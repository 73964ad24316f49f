"""What the benchmarks share: the machine's description, timings side by side, CSV files."""

from __future__ import annotations

import csv
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def environment() -> dict[str, object]:
    """Machine, versions and commit, to stand beside every figure."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "cpu": _cpu_model(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": _version("numba"),
        "commit": _commit(),
    }


def time_side_by_side(
    tasks: Mapping[str, Callable[[], object]], repeats: int, warmups: int = 1, seconds: float = 30.0
) -> dict[str, dict[str, float]]:
    """p20, p50 and p80 in milliseconds of each task, taken in turns so that a busy moment hits all alike.

    Each turn is two runs, of which the second counts: the first finds what the task before left in the processor's
    caches and in torch's memory. A task that has used up its `seconds` sits the later rounds out, but is timed at
    least once.
    """
    times: dict[str, list[float]] = {name: [] for name in tasks}
    used = dict.fromkeys(tasks, 0.0)
    for round_ in range(warmups + repeats):
        for name, task in tasks.items():
            if used[name] > seconds and times[name]:
                continue
            begin = time.perf_counter()
            task()
            start = time.perf_counter()
            task()
            elapsed = time.perf_counter() - start
            used[name] += time.perf_counter() - begin
            if round_ >= warmups or used[name] > seconds:
                times[name].append(1e3 * elapsed)
    return {name: quantiles(values) for name, values in times.items()}


def quantiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return {"p20": p20, "p50": statistics.median(values), "p80": p80}


def write_csv(path: Path, rows: list[dict], environment: Mapping[str, object]) -> None:
    """One line per row, each with the whole environment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{**row, **environment} for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for line in lines for name in line)))
        writer.writeheader()
        writer.writerows(lines)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
