"""`python -m fastweights` is the command `fastweights`."""

import sys


def main() -> None:
    """Entry point, where Ctrl-C is no traceback even while the command line itself is imported."""
    try:
        from fastweights.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("stopped; nothing new was saved\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
