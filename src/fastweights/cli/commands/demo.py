"""`fastweights demo`"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from fastweights.cli.console import as_it_is, say
from fastweights.cli.tables import print_methods, print_parts, print_stages
from fastweights.settings.demo import DemoConfig

if TYPE_CHECKING:
    from fastweights.cli.demo import DemoResult


def demo(config: Annotated[DemoConfig, Parameter(name="*")] = DemoConfig()) -> None:  # noqa: B008 (frozen)
    """Convert the embedded transformer, train it, and show quality, text, speed, size of the
    state and learning while reading: about seven minutes."""
    from fastweights.cli.demo import PROMPT, run_demo

    console, start = Console(), time.perf_counter()
    result = run_demo(config, say=lambda line: say(line, "bold"))
    print_stages(result.stages, "quality on modules that no model has seen; retention = teacher / model perplexity")
    print_parts(result.stages)
    for name, text in result.samples.items():
        console.print(Panel(as_it_is(PROMPT, "dim") + as_it_is(text, "none"), title=name, title_align="left"))
    _print_decoding(console, result)
    print_methods("hybrid", result.comparison, "modules that it has not seen, each read from its beginning")
    say(f"done in {time.perf_counter() - start:.0f} s; results and pictures:")
    for file in result.files:
        say(f"  {file}")


def _print_decoding(console: Console, result: DemoResult) -> None:
    table = Table(title="cost of one more token (the teacher beyond its trained length: timing alone)")
    table.title_justify = "left"
    table.add_column("context", justify="right")
    for name in result.decode:
        table.add_column(f"{name}, ms", justify="right")
        table.add_column("state", justify="right")
    for costs in zip(*result.decode.values(), strict=True):
        cells = [cell for cost in costs for cell in (f"{cost.ms_per_token:.2f}", f"{cost.state_bytes / 1e6:.2f} MB")]
        table.add_row(f"{costs[0].context:,}", *cells)
    console.print(table)
