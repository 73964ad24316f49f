"""`python -m fastweights.cli.reference docs/cli.md` writes the page of all commands and all their options."""

import os
import subprocess
import sys
from pathlib import Path

from fastweights.options import SHOW_ALL


def reference() -> str:
    """Markdown of every command with every option, also those that its help leaves out."""
    # What help shows is settled when the configs are defined, so a process of its own shows everything.
    code = "from fastweights.cli import app; print(app.generate_docs(usage_name='fastweights'))"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, SHOW_ALL: "1"}, capture_output=True, text=True, check=True
    )
    return run.stdout.strip() + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference())
