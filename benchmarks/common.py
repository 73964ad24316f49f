"""What the benchmarks share: timings side by side, CSV files."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fastweights.files import written_whole


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
    """One line per row, each with the whole environment; whole at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{**row, **environment} for row in rows]
    with written_whole(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for line in lines for name in line)))
        writer.writeheader()
        writer.writerows(lines)


def read_csv(path: Path) -> list[dict]:
    """What `write_csv` wrote; numbers and truths are themselves again."""
    with path.open(newline="") as file:
        return [{name: parsed(value) for name, value in line.items()} for line in csv.DictReader(file)]


def parsed(text: str) -> object:
    """A field of such a file; what only looks like a number, such as a version 12.10, is taken for one."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
