"""`fastweights demo`"""

from __future__ import annotations

import time
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from fastweights.cli.console import as_it_is, say
from fastweights.cli.tables import print_evaluated_parts, print_methods, print_parts, print_stages
from fastweights.settings.demo import DemoConfig

if TYPE_CHECKING:
    from fastweights.cli.demo_smollm2 import RealResult
    from fastweights.evaluation.cost import DecodeCost


def demo(config: Annotated[DemoConfig, Parameter(name="*")] = DemoConfig()) -> None:  # noqa: B008 (frozen)
    """Convert the embedded transformer, train it, and show quality, text, speed, size of the
    state and learning while reading; then what a real model, SmolLM2-135M, gives with the
    adapter that ships with the package: some eight minutes."""
    from fastweights.cli.demo import PROMPT, run_demo

    start = time.perf_counter()
    result = run_demo(config, say=lambda line: say(f"{_since(start)}  {line}", "bold"))
    print_stages(result.stages, "quality on modules that no model has seen; retention = teacher / model perplexity")
    print_parts(result.stages)
    for name, text in result.samples.items():
        _print_panel(name, PROMPT, text)
    _print_decoding(
        result.decode, "one more token, and the state in MB (the teacher beyond its trained length: timing alone)"
    )
    print_methods("hybrid", result.comparison, "modules that it has not seen, each read from its beginning")
    if result.real is not None:
        print_real(result.real)
    say(f"done in {time.perf_counter() - start:.0f} s; results and pictures:")
    for file in result.files:
        say(f"  {file}")


def _since(start: float) -> str:
    """Minutes and seconds."""
    minutes, seconds = divmod(int(time.perf_counter() - start), 60)
    return f"{minutes}:{seconds:02d}"


def print_real(result: RealResult) -> None:
    """What the real model gave."""
    from fastweights.cli.demo_smollm2 import LETTER, LETTER_QUESTION, MANUAL_QUESTION, WEIGHTS

    tokens = result.judged.parts["all"].tokens
    title = f"SmolLM2-135M on {tokens:,} tokens of Python's manual; retention = teacher / model perplexity"
    print_evaluated_parts({"smollm2": result.judged.parts}, title)
    _print_panel("a letter, and a question that it answers at its beginning", f"{LETTER}\n{LETTER_QUESTION}")
    for name, text in result.judged.samples.items():
        _print_panel(name, "", text)
    _print_decoding(
        result.decode, "one more token, and the state in MB (smollm2-base beyond its trained length: timing alone)"
    )
    if (reading := result.reading) is None:
        return
    say(
        f"smollm2 in {WEIGHTS} read {reading.tokens:,} tokens in {reading.seconds:.0f} s "
        f"({reading.tokens / reading.seconds:,.0f} tokens a second), and keeps "
        f"{reading.state_bytes / 1e6:.1f} MB of them"
    )
    _print_panel("smollm2", f"{MANUAL_QUESTION} ", reading.answer)
    say(f"to ask on: fastweights chat smollm2 --weights {WEIGHTS}, and there /load {reading.memory}")


def _print_panel(title: str, given: str, text: str = "") -> None:
    Console().print(Panel(as_it_is(given, "dim") + as_it_is(text, "none"), title=title, title_align="left"))


def _print_decoding(decode: dict[str, list[DecodeCost]], title: str) -> None:
    """One row per context; a model that was not timed at all of them has no figures at the last ones."""
    table = Table(title=title, title_justify="left")
    table.add_column("context", justify="right")
    for name in decode:
        table.add_column(f"{name}, ms", justify="right")
        table.add_column("MB", justify="right")
    for costs in zip_longest(*decode.values()):
        cells = [f"{next(filter(None, costs)).context:,}"]
        for cost in costs:
            cells += ("-", "-") if cost is None else (f"{cost.ms_per_token:.1f}", f"{cost.state_bytes / 1e6:,.2f}")
        table.add_row(*cells)
    Console().print(table)
