"""`fastweights train`"""

from typing import Annotated

from cyclopts import Parameter

from fastweights.cli.console import say
from fastweights.cli.tables import print_parts, print_stages
from fastweights.settings.training import TrainConfig


def train(config: Annotated[TrainConfig, Parameter(name="*")] = TrainConfig()) -> None:  # noqa: B008 (frozen)
    """Convert a model and train it: transfer (layers imitate the teacher's attention), then finetune; or, with --stage
    meta, train a Fast Weight Layer on any model."""
    from fastweights.training.pipeline import train as run
    from fastweights.training.runs import process_state

    results = run(config)
    if process_state().is_main_process:
        print_stages({config.model: results}, "held-out text; retention is the first row's perplexity over the model's")
        print_parts({config.model: results})
        say(f"the trained model and results.json are in {config.output}")
