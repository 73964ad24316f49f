"""What the pages tell a reader to type is taken by the command line, and gives what they say."""

import re
import shlex
from pathlib import Path

import pytest
from benchmarks.comparison import VARIANTS

from fastweights.cli import make_app

DOCS = Path(__file__).parents[2] / "docs"
REPRODUCTION = (DOCS / "reproduction.md").read_text()


def command_lines(page: str) -> list[str]:
    """Those of shell blocks, and whole ones within the text."""
    blocks = [line for block in re.findall(r"```bash\n(.*?)```", page, re.S) for line in block.splitlines()]
    text = re.sub(r"```.*?```", "", page, flags=re.S)
    found = [*blocks, *(" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text))]
    return [line.split("  #")[0].strip() for line in found if line.startswith("fastweights ")]


def parsed(*tokens: str) -> dict:
    _, bound, _ = make_app().parse_args([*tokens], print_error=False, exit_on_error=False)
    return bound.arguments


@pytest.mark.parametrize(
    "line", [line for line in command_lines(REPRODUCTION) if "--config" not in line], ids=lambda line: line[:60]
)
def test_command_lines_are_taken(line):
    assert parsed(*shlex.split(line)[1:]) is not None


def test_each_row_of_the_comparison_can_be_had_from_the_command_line():
    rows = re.findall(r"^\| ((?:control|fwl)[^|(]*?)(?: \([^|]*\))? \| (?:`([^`]*)`|none) \|$", REPRODUCTION, re.M)
    assert [name for name, _ in rows] == list(VARIANTS)
    for name, options in rows:
        config = parsed("train", "--stage", "meta", *options.split())["config"]
        assert (config.fast_weight_layer, config.meta.blocks) == VARIANTS[name]
