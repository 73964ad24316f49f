"""Tables that commands print."""

from rich.console import Console
from rich.table import Table

from fastweights.training.pipeline import StageResult


def print_stages(runs: dict[str, list[StageResult]], title: str) -> None:
    """One row per stage of each run."""
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    table.add_column("after")
    for column in ("tokens", "loss", "perplexity", "bits/byte", "retention"):
        table.add_column(column, justify="right")
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
