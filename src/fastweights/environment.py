"""What a figure was measured with: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastweights import __version__

_PACKAGE = Path(__file__).parent


def environment() -> dict[str, object]:
    """Machine, versions and commit, to stand beside every figure."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "cpu": _cpu_model(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": _version("numba"),
        "commit": _commit(),
        "transformers": _version("transformers"),
        "fastweights": __version__,
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Of the checkout that this package runs from, which a repository around an installed one is not."""
    root = _git("rev-parse", "--show-toplevel")
    if root is None or Path(root).resolve() != _PACKAGE.resolve().parents[1]:
        return "unknown"
    return _git("describe", "--always", "--dirty", "--abbrev=10") or "unknown"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=_PACKAGE)
    except OSError:  # no git here
        return None
    return done.stdout.strip() if done.returncode == 0 else None
