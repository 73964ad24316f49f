"""How the fields of configs become options."""

import dataclasses
import inspect
from typing import get_args, get_type_hints

from fastweights.cli import COMMANDS
from fastweights.cli.options import ADVANCED


def test_every_config_of_a_command_is_in_the_table_and_no_other():
    found: set[type] = set()
    for command in COMMANDS.values():
        for hint in get_type_hints(command).values():
            gather(hint, found)
    assert found == set(ADVANCED)


def test_the_table_names_fields_that_exist():
    for config, advanced in ADVANCED.items():
        assert set(advanced) <= {field.name for field in dataclasses.fields(config)}


def gather(hint: object, found: set[type]) -> None:
    """All dataclasses that a hint leads to."""
    for part in get_args(hint):
        gather(part, found)
    if inspect.isclass(hint) and dataclasses.is_dataclass(hint) and hint not in found:
        found.add(hint)
        for inner in get_type_hints(hint).values():
            gather(inner, found)
