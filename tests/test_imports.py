"""`import fastweights` is quick, and brings nothing along that only some of its users need."""

import subprocess
import sys

import pytest

from tests.forks import Forks

HEAVY = ("cyclopts", "datasets", "fastweights.training.trainer", "matplotlib", "numba", "peft", "transformers.trainer")
VERY_HEAVY = ("numpy", "torch", "transformers")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import fastweights", HEAVY + VERY_HEAVY),
        ("from fastweights import PretrainConfig, TrainConfig, pretrain, train", HEAVY),
        ("import fastweights.cli", HEAVY[1:] + VERY_HEAVY),
    ],
    ids=["the package", "training and its configs", "the command line"],
)
def test_what_is_heavy_is_imported_where_it_is_used(code, heavy):
    assert run(f"import sys\n{code}\nprint(*[name for name in {heavy} if name in sys.modules])") == ""


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


def test_ctrl_c_while_the_command_line_is_imported_is_one_line():
    code = """import sys
class Interrupts:
    def find_spec(self, name, *_):
        if name == "fastweights.cli":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
from fastweights.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "stopped; nothing new was saved\n")


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["train", "--help"]], ids=" ".join)
def test_help_needs_nothing_that_is_slow_to_import(arguments):
    code = "import os\nfrom fastweights.cli import main\n{}\nprint(sum(os.times()[:2]))"
    run_it = f"import sys\nsys.argv[1:] = {arguments}\ntry:\n    main()\nexcept SystemExit:\n    pass"
    seconds = [float(run(code.format(run_it)).splitlines()[-1]) for _ in range(3)]
    assert min(seconds) < 2.0  # 0.3 to 0.6 on a machine at rest, twice that on a busy one, 5 with torch


@pytest.fixture(scope="module")
def with_torch():
    """Where processes begin that have what is heavy of others, and nothing of transformers or ours."""
    with Forks("import torch.distributed.tensor, torch._dynamo") as forks:
        yield forks


@pytest.mark.parametrize(
    "first",
    [
        "import fastweights",
        "import transformers, fastweights, transformers.modeling_utils",
        "from transformers import AutoModelForCausalLM; import fastweights",
        "import fastweights.layers.attention",
        "import fastweights.layers",
        "import fastweights.models.architectures",
        "import fastweights, transformers.modeling_layers",
        "from fastweights import train",
    ],
)
def test_auto_classes_know_our_models_whatever_is_imported_first(with_torch, first):
    code = f"{first}\nfrom transformers import AutoConfig, AutoModelForCausalLM\n"
    code += "config = AutoConfig.for_model('fastweights')\n"
    done = with_torch.run(code=f"{code}print(AutoModelForCausalLM._model_mapping[type(config)].__name__)")
    assert (done.returncode, done.stdout) == (0, "FastWeightsForCausalLM\n"), done.stderr


def test_all_public_names_are_there():
    import fastweights

    assert all(hasattr(fastweights, name) for name in fastweights.__all__)
