"""How the fields of a config show as options on the command line."""

import os

from cyclopts import Parameter

# Set to anything, it makes help list every option.
SHOW_ALL = "FASTWEIGHTS_ALL_OPTIONS"

# Taken like any option and listed in docs/cli.md, but left out of a command's help so that this fits on one screen.
ADVANCED = Parameter(show=SHOW_ALL in os.environ)

# On unless --no-... is given.
SWITCH = Parameter(negative=None, negative_bool="no-")

# Takes several values after one name: --contexts block stream.
SEVERAL = Parameter(consume_multiple=True)
