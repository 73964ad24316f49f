"""How the fields of a config show as options on the command line, and a check that several commands share."""

import os
from pathlib import Path

from cyclopts import Parameter

from fastweights.errors import FastWeightsError

# Set to anything, it makes help list every option.
SHOW_ALL = "FASTWEIGHTS_ALL_OPTIONS"

# Taken like any option and listed in docs/cli.md, but left out of a command's help so that this fits on one screen.
ADVANCED = Parameter(show=SHOW_ALL in os.environ)

# On unless --no-... is given.
SWITCH = Parameter(negative=None, negative_bool="no-")

# Takes several values after one name: --contexts block stream.
SEVERAL = Parameter(consume_multiple=True)


def check_folder(output: Path) -> None:
    """Refuse what cannot be, or become, a folder to write to."""
    output = output.absolute()
    path = next(path for path in (output, *output.parents) if path.exists())
    if not path.is_dir():
        raise FastWeightsError(f"output {output}: {path} is a file, give a folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise FastWeightsError(f"output {output}: {path} may not be written to, give another folder")


def check_seed(seed: int) -> None:
    """Refuse what NumPy takes for no seed."""
    if not 0 <= seed < 2**32:
        raise FastWeightsError(f"seed is {seed}; allowed are 0 to {2**32 - 1}")
