"""Puts transformers' own tests beside the environment, for tests/models/test_transformers_suite.py (`make test`).

They are in its source distribution only; that of the version which is installed is taken.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers


def fetch(folder: Path, version: str) -> None:
    """Unpack `tests/` of that version's source distribution as `folder`."""
    download = ["pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([sys.executable, "-m", *download, "--dest", directory, f"transformers=={version}"], check=True)
        (archive,) = Path(directory).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(directory, filter="data")
        (tests,) = Path(directory).glob("transformers-*/tests")
        folder.mkdir()
        for file in tests.glob("*.py"):
            (folder / file.name).write_bytes(file.read_bytes())


if __name__ == "__main__":
    target = Path(sys.prefix) / f"transformers-tests-{transformers.__version__}"
    if not target.exists():
        fetch(target, transformers.__version__)
