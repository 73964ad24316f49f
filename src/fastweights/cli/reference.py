"""`python -m fastweights.cli.reference docs/cli.md` writes the page of all commands and all their options."""

import sys
from pathlib import Path

from fastweights.cli import make_app


def reference() -> str:
    """Markdown of every command with every option, also those that its help leaves out."""
    argv, sys.argv = sys.argv, ["fastweights"]  # cyclopts puts the name of the running program into usage lines
    try:
        return make_app(show_all=True).generate_docs(usage_name="fastweights").strip() + "\n"
    finally:
        sys.argv = argv


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
