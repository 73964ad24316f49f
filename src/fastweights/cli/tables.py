"""Tables that commands print."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.bar import Bar
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from fastweights.cli.console import as_it_is

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastweights.evaluation.comparison import MethodResult
    from fastweights.evaluation.divergence import Divergence
    from fastweights.evaluation.perplexity import Evaluation
    from fastweights.evaluation.recall import Recall
    from fastweights.settings.conversion import ConversionConfig
    from fastweights.training.grid import Row
    from fastweights.training.pipeline import StageResult

# Words are not defined in source code and the like, and what is said of them then means nothing.
_MEANINGFUL_PERPLEXITY = 1e4


def print_stages(runs: dict[str, list[StageResult]], title: str) -> None:
    """One row per stage of each run."""
    table = Table(title=as_it_is(title), title_justify="left")
    table.add_column("model", overflow="fold")  # a name is told from others by its end, too
    table.add_column("after", no_wrap=True)
    for column in ("tokens", "loss", "ppl", "bits/byte", "retention"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, results in runs.items():
        for result in results:
            evaluation = result.evaluation
            table.add_row(
                as_it_is(name),
                result.stage,
                f"{result.tokens:,}",
                f"{evaluation.loss:.3f}",
                f"{evaluation.perplexity:,.2f}",
                f"{evaluation.bits_per_byte:.3f}",
                f"{result.retention:.3f}",
            )
    Console().print(table)


def print_layers(worth: list[float], settings: ConversionConfig) -> None:
    """A bar for each layer: what it is worth to leave it as it is, and what becomes of it."""
    table = Table(title="what each layer's own attention is worth", title_justify="left")
    for column in ("layer", "nats a token"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("becomes", no_wrap=True)
    most = max(worth) or 1.0
    settled = settings.for_layers(len(worth))
    for i, (nats, kind, window) in enumerate(zip(worth, settled.layer_types or (), settled.windows or (), strict=True)):
        becomes = f"{kind}, {window:,}" if window else kind
        table.add_row(str(i), f"{nats:.4f}", Bar(most, 0, max(nats, 0.0), width=24), becomes)
    Console().print(table)


def print_parts(runs: dict[str, list[StageResult]]) -> None:
    """One row for each part of each run's hybrid model, if any is one."""
    found = {name: parts for name, results in runs.items() if (parts := results[-1].parts)}
    if found:
        tokens = next(iter(found.values()))["all"].tokens
        print_evaluated_parts(found, f"what its parts are worth, on {tokens:,} tokens")


def print_evaluated_parts(found: dict[str, dict[str, Evaluation]], title: str) -> None:
    """One row for each part of each hybrid model."""
    table = Table(title=as_it_is(title), title_justify="left")
    table.add_column("model", overflow="fold")
    table.add_column("read with", no_wrap=True)
    for column in ("loss", "ppl", "bits/byte", "retention"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, parts in found.items():
        for part, evaluation in parts.items():
            table.add_row(
                as_it_is(name),
                part,
                f"{evaluation.loss:.3f}",
                f"{evaluation.perplexity:,.2f}",
                f"{evaluation.bits_per_byte:.3f}",
                f"{math.exp(parts['teacher'].loss - evaluation.loss):.3f}",
            )
    Console().print(table)


def print_positions(name: str, results: list[MethodResult]) -> None:
    """Loss by position in the document, one row per way to read, where there is more than one range of positions."""
    ranges = results[0].by_position
    if len(ranges) < 2:
        return
    table = Table(title=as_it_is(f"{name}: loss by position in the document"), title_justify="left")
    table.add_column("method", no_wrap=True)
    table.add_column("context", no_wrap=True)
    for place in ranges:
        table.add_column(_until(place.stop), justify="right", no_wrap=True)
    for result in results:
        table.add_row(result.method, result.context, *(f"{place.loss:.3f}" for place in result.by_position))
    _print_whole(table)


def print_recall(name: str, recalled: dict[str, list[Recall]]) -> None:
    """Share of values that were recalled, one row per way to read, one column per distance."""
    distances = sorted({recall.distance for row in recalled.values() for recall in row})
    table = Table(
        title=as_it_is(f"{name}: names recalled (and loss) after so many tokens"),
        title_justify="left",
        caption="by chance 0.10 (2.30)",
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    for distance in distances:
        table.add_column(f"{distance:,}", justify="right", no_wrap=True)
    for method, row in recalled.items():
        cells = {recall.distance: f"{recall.accuracy:.2f} ({recall.loss:.2f})" for recall in row}
        table.add_row(method, *(cells.get(distance, "-") for distance in distances))
    _print_whole(table)


def print_divergences(name: str, found: dict[str, Divergence]) -> None:
    """How far each way to read is from the original, and from where on in a document."""
    table = Table(
        title=as_it_is(f"{name}: divergence from the original, nats a token"),
        title_justify="left",
        caption="KL(original || model); same: share of tokens at which both find the same next one the likeliest",
        caption_justify="left",
    )
    table.add_column("method, context", no_wrap=True)
    ranges = next(iter(found.values())).by_position
    several = len(ranges) > 1
    for column in ("mean", "median", "same", *(_until(place.stop) for place in ranges if several)):
        table.add_column(column, justify="right", no_wrap=True)
    for row, measured in found.items():
        cells = [f"{measured.divergence:.4f}", f"{measured.median:.4f}", f"{measured.same_likeliest:.3f}"]
        table.add_row(row, *cells, *(f"{place.divergence:.4f}" for place in measured.by_position if several))
    _print_whole(table)


def _print_whole(table: Table) -> None:
    """With no number cut short, also where that takes more columns than the terminal has."""
    console = Console()
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.width = max(console.width, needed)
    console.print(table)


_SHOWN_PARTS = ("window alone", "fast weights alone", "untrained window")


def print_grid(rows: list[Row], title: str) -> None:
    """One row per rule, feature map and window: means over seeds; of hybrid models, what each part keeps, too."""
    caption = "retention: the original model's perplexity over this one's, with its standard deviation over seeds"
    table = Table(title=as_it_is(title), title_justify="left", caption_justify="left")
    columns: dict[str, Callable[[Row], str]] = {
        "rule": lambda row: row.rule,
        "map": lambda row: row.feature_map,
        "window": lambda row: str(row.window or "-"),
        "seeds": _seeds,
        "loss": lambda row: f"{row.loss:.4f}",
        "ppl": lambda row: _large(row.perplexity),
        "retention": _retention,
        "seconds": lambda row: f"{row.seconds:,.0f}",
        "tokens/s": lambda row: f"{row.tokens_per_second:,.0f}",
    }
    if any(row.parts for row in rows):
        caption += ";\nits parts on the first tokens of the text, and so the whole beside them"
        shown = {"whole": "all", **{part: part for part in _SHOWN_PARTS}}
        columns |= {name: lambda row, part=part: _part(row, part) for name, part in shown.items()}
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    table.caption = caption
    _print_whole(table)


def _seeds(row: Row) -> str:
    return f"{len(row.seeds)}" + (f", {len(row.diverged)} diverged" if row.diverged else "")


def _retention(row: Row) -> str:
    return f"{row.retention:.3f}" + ("" if row.retention_spread is None else f" ± {row.retention_spread:.3f}")


def _part(row: Row, part: str) -> str:
    return f"{row.parts[part]:.3f}" if part in row.parts else "-"


def _until(stop: int | None) -> str:
    """What a range of positions that ends there is called."""
    return "beyond" if stop is None else f"to {_short(stop)}"


def _short(n: int) -> str:
    return str(n) if n < 1024 else f"{n // 1024}k"


def print_methods(name: str, results: list[MethodResult], title: str) -> None:
    """One row per way to read; time and peak memory relative to the first."""
    title = f"{name} on {title}, {results[0].evaluation.tokens:,} tokens"
    table = Table(title=as_it_is(title), title_justify="left", caption=_tuned(results), caption_justify="left")
    columns: dict[str, Callable[[MethodResult], str]] = {
        "method": lambda result: result.method,
        "context": lambda result: result.context,
        "loss": lambda result: f"{result.evaluation.loss:.4f}",
        "ppl": lambda result: _large(result.evaluation.perplexity),
        "bits/byte": lambda result: f"{result.evaluation.bits_per_byte:.4f}",
        "time": lambda result: f"{result.time_ratio:.2f}x",
        "peak": lambda result: "-" if result.peak_bytes_ratio is None else f"{result.peak_bytes_ratio:.2f}x",
    }
    if min(result.evaluation.word_perplexity for result in results) < _MEANINGFUL_PERPLEXITY:
        columns["word ppl"] = lambda result: _large(result.evaluation.word_perplexity)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
    for result in results:
        table.add_row(*(cell(result) for cell in columns.values()))
    _print_whole(table)


def _tuned(results: list[MethodResult]) -> str:
    lines = [
        f"{result.name}: step size {result.settings.step_size:.2g}, decay {result.settings.decay:.2g}"
        for result in results
        if result.settings is not None
    ]
    return "\n".join(lines)


def _large(number: float) -> str:
    return f"{number:,.2f}" if number < 1e5 else f"{number:.2g}"
