"""`fastweights compare`"""

from typing import Annotated

from cyclopts import Parameter

from fastweights.cli.console import note, say
from fastweights.cli.tables import print_grid
from fastweights.settings.grid import GridConfig

_PICTURE = "comparison.png"


def compare(config: Annotated[GridConfig, Parameter(name="*")] = GridConfig()) -> None:  # noqa: B008 (frozen)
    """Convert and train a model with each update rule, feature map, window and seed alike, and rank what comes out."""
    from fastweights.cli.plots import plot_grid
    from fastweights.training.grid import train_grid

    grid = None
    for grid in train_grid(config, note):
        plot_grid(grid.ranking, config.output / _PICTURE)
    assert grid is not None  # a grid has a cell, or is refused
    print_grid(grid.ranking, f"{config.model} on {config.data.text}, best first")
    say(f"comparison.json and {_PICTURE} are in {config.output}")
