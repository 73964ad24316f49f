"""How the fields of a config show as options on the command line."""

from cyclopts import Parameter

# Taken like any option, listed in docs/cli.md, left out of a command's help so that this fits on one screen.
ADVANCED = Parameter(show=False)
