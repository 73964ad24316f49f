"""`python -m fastweights` is the command `fastweights`."""

from fastweights.cli import main

main()
