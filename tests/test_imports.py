"""`import fastweights` is quick, and brings nothing along that only some of its users need."""

import subprocess
import sys
from statistics import median

import pytest

HEAVY = ("cyclopts", "datasets", "fastweights.training.trainer", "matplotlib", "numba", "peft", "transformers.trainer")
TRANSFORMERS = (
    "import torch, transformers\n"
    "from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel\n"
)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    "code",
    ["import fastweights", "from fastweights import PretrainConfig, TrainConfig, pretrain, train"],
    ids=["the package", "training and its configs"],
)
def test_what_is_heavy_is_imported_where_it_is_used(code):
    assert run(f"import sys\n{code}\nprint(*[name for name in {HEAVY} if name in sys.modules])") == ""


def test_no_variable_of_the_environment_is_read_at_import():
    """Of those that are ours."""
    watch = """
import os
class Watched(type(os.environ)):
    def __getitem__(self, name):
        assert not name.startswith("FASTWEIGHTS"), name
        return super().__getitem__(name)
os.environ.__class__ = Watched
import fastweights, fastweights.cli
"""
    run(watch)


def test_it_takes_little_more_than_transformers_with_torch():
    seconds = "import time\nstart = time.process_time()\n{}\nprint(time.process_time() - start)"
    times: dict[str, list[float]] = {TRANSFORMERS: [], "import fastweights": []}
    for _ in range(3):
        for code, seen in times.items():
            seen.append(float(run(seconds.format(code))))
    without, ours = (median(seen) for seen in times.values())
    assert ours < 1.5 * without


def test_all_public_names_are_there():
    import fastweights

    assert all(hasattr(fastweights, name) for name in fastweights.__all__)
