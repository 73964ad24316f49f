"""A grid of trainings that differ in update rule, feature map, window and seed, and in nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from fastweights.errors import FastWeightsError, check_name, check_seed
from fastweights.settings.conversion import OF_GATES, ConversionConfig, SharedConversion
from fastweights.settings.evaluation import HeldOutConfig
from fastweights.settings.text import DataConfig
from fastweights.settings.training import FinetuneConfig, RunConfig, TrainConfig, TransferConfig

_OF_WINDOWS = ("sinks", "write", "window_dtype")


class Cell(NamedTuple):
    """One training of a grid: what is particular to it."""

    rule: str
    feature_map: str
    window: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.rule}-{self.feature_map}-w{self.window}-s{self.seed}"


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Train the same model with each update rule, feature map, window and seed alike, and rank them."""

    model: str = "embedded"
    """Model to convert: a folder, a .gguf file, a hub name or "embedded"."""
    output: Path = Path("runs/compare")
    """Folder for comparison.json, comparison.png, run.json (the resolved config), and a folder for each training."""
    resume: bool = False
    """Go on where a killed comparison stopped, also with more rules, feature maps, windows or seeds; what is finished
    is not trained again."""
    overwrite: bool = False
    """Start anew in a folder that has a comparison, or anything else, in it."""
    held_out: str = "validation"
    """Split of the same text to evaluate on; a text without such a split gives up its last twentieth."""
    rules: tuple[str, ...] | None = None
    """Update rules to compare; by default all of docs/methods.md."""
    feature_maps: tuple[str, ...] | None = None
    """Feature maps of queries and keys, each with each rule; by default all."""
    windows: tuple[int, ...] = (0,)
    """Tokens that an exact softmax sees beside the fast weights, each with each of these; 0 for none."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the data order and of new weights; all else is trained with the first before the second begins."""
    convert: SharedConversion = field(default_factory=SharedConversion)
    data: DataConfig = field(default_factory=DataConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evaluation: HeldOutConfig = field(default_factory=HeldOutConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))
        for name in ("rules", "feature_maps", "windows", "seeds"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, tuple(given))
                _check_distinct(name, given)
        if self.rules is not None or self.feature_maps is not None:
            self._check_names()
        for window in self.windows:
            if window < 0 or window == 1:
                raise FastWeightsError(f"windows has {window}; allowed are 0 (none) and 2 or more tokens")
        for seed in self.seeds:
            check_seed(seed)
        if self.run.seed != RunConfig.seed:
            raise FastWeightsError("run.seed was given, but seeds says which: leave it out")
        self._training(ConversionConfig())

    def _check_names(self) -> None:
        from fastweights.layers.feature_maps import FEATURE_MAPS
        from fastweights.layers.rules import RULES

        for name, known in (("rules", RULES), ("feature_maps", FEATURE_MAPS)):
            for given in getattr(self, name) or ():
                check_name(name, given, known)

    def cells(self) -> list[Cell]:
        """All combinations, those of the first seed first."""
        from fastweights.layers.feature_maps import FEATURE_MAPS
        from fastweights.layers.rules import RULES

        return [
            Cell(rule, feature_map, window, seed)
            for seed in self.seeds
            for window in self.windows
            for rule in self.rules or RULES
            for feature_map in self.feature_maps or FEATURE_MAPS
        ]

    def training(self, cell: Cell) -> TrainConfig:
        """The run of `fastweights train` that is this cell.

        Of the settings of gates and windows, each rule and window is given those that it has.

        Raises:
            FastWeightsError: there is no such conversion.
        """
        from fastweights.layers.rules import RULES

        unused = [name for name in OF_GATES if name not in RULES[cell.rule].settings]
        unused += () if cell.window else _OF_WINDOWS
        shared = {name: value for name, value in asdict(self.convert).items() if name not in unused}
        convert = ConversionConfig(**shared, rule=cell.rule, feature_map=cell.feature_map, window=cell.window)
        return self._training(convert, cell.name, cell.seed)

    def _training(self, convert: ConversionConfig, name: str = "", seed: int = 0) -> TrainConfig:
        shared = {name: getattr(self, name) for name in ("model", "resume", "overwrite", "held_out", "data")}
        shared |= {name: getattr(self, name) for name in ("transfer", "finetune", "evaluation")}
        run = replace(self.run, seed=seed)
        return TrainConfig(**shared, output=self.output / name, convert=convert, run=run)


def _check_distinct(name: str, given: tuple) -> None:
    if not given:
        raise FastWeightsError(f"{name} is empty: name at least one, or leave it out")
    if twice := [str(value) for value in dict.fromkeys(given) if given.count(value) > 1]:
        raise FastWeightsError(f"{name} has {', '.join(twice)} twice: name each once")
