"""`fastweights train`"""

from typing import Annotated

from cyclopts import Parameter

from fastweights.cli.tables import print_stages
from fastweights.training.pipeline import TrainConfig
from fastweights.training.pipeline import train as run


def train(config: Annotated[TrainConfig, Parameter(name="*")] = TrainConfig()) -> None:  # noqa: B008 (frozen)
    """Convert a model and train it: transfer (layers imitate the teacher's attention), then finetune."""
    results = run(config)
    print_stages({config.model: results}, "held-out text; retention is teacher perplexity / model perplexity")
    print(f"the trained model and results.json are in {config.output}")
