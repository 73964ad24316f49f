"""`fastweights pretrain`"""

from typing import Annotated

from cyclopts import Parameter

from fastweights.cli.console import say
from fastweights.settings.training import PretrainConfig


def pretrain(config: Annotated[PretrainConfig, Parameter(name="*")] = PretrainConfig()) -> None:  # noqa: B008 (frozen)
    """Train a byte-level GPT-2 from random weights: how the embedded model came to be."""
    from fastweights.training.pretrain import pretrain as run
    from fastweights.training.runs import process_state

    folder = run(config)
    if process_state().is_main_process:
        say(f"the trained model is in {folder}")
