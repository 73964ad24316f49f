"""Tables that commands print."""

from rich.console import Console
from rich.table import Table

from fastweights.adaptation import MethodResult
from fastweights.training.pipeline import StageResult


def print_stages(runs: dict[str, list[StageResult]], title: str) -> None:
    """One row per stage of each run."""
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    table.add_column("after", no_wrap=True)
    for column in ("tokens", "loss", "ppl", "bits/byte", "retention"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, results in runs.items():
        for result in results:
            evaluation = result.evaluation
            table.add_row(
                name,
                result.stage,
                f"{result.tokens:,}",
                f"{evaluation.loss:.3f}",
                f"{evaluation.perplexity:,.2f}",
                f"{evaluation.bits_per_byte:.3f}",
                f"{result.retention:.3f}",
            )
    Console().print(table)


def print_methods(name: str, results: list[MethodResult], title: str) -> None:
    """One row per way to read; time and memory relative to the first."""
    table = Table(title=f"{name} on {title}", title_justify="left", caption=_tuned(results), caption_justify="left")
    for column in ("method", "context"):
        table.add_column(column, no_wrap=True)
    for column in ("tokens", "loss", "ppl", "bits/byte", "word ppl", "time", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        evaluation = result.evaluation
        table.add_row(
            result.method,
            result.context,
            f"{evaluation.tokens:,}",
            f"{evaluation.loss:.4f}",
            _large(evaluation.perplexity),
            f"{evaluation.bits_per_byte:.4f}",
            _large(evaluation.word_perplexity),
            f"{result.time_ratio:.2f}x",
            "-" if result.memory_ratio is None else f"{result.memory_ratio:.2f}x",
        )
    Console().print(table)


def _tuned(results: list[MethodResult]) -> str:
    lines = [
        f"{result.method}, {result.context}: "
        f"step size {result.settings.step_size:.2g}, decay {result.settings.decay:.2g}"
        for result in results
        if result.settings is not None
    ]
    return "\n".join(lines)


def _large(number: float) -> str:
    return f"{number:,.2f}" if number < 1e5 else f"{number:.2g}"
