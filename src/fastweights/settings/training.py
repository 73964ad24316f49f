"""What training can be told: a stage, a run of stages, the whole road."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from fastweights.errors import FastWeightsError, check_name, check_seed
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.evaluation import HeldOutConfig
from fastweights.settings.fast_weight_layer import FastWeightLayerSettings
from fastweights.settings.text import DataConfig

STAGES = ("transfer", "finetune", "meta")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Steps, batches and learning rates of one training stage."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 4
    """Blocks per device and forward pass."""
    gradient_accumulation: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 1e-3
    """Peak learning rate of pretrained parameters."""
    new_learning_rate: float | None = None
    """Peak learning rate of what is new; by default `learning_rate`."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; by default a fiftieth of `steps`."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """Learning rate after the warm-up; linear and cosine end at 0."""
    weight_decay: float = 0.0
    """AdamW's weight decay of the matrices, but for those that start as the identity: maps, convolutions."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation"):
            if getattr(self, name) < 1:
                raise FastWeightsError(f"{name} is {getattr(self, name)}; it must be at least 1")
        self._check_rates("learning_rate", "new_learning_rate")
        if not 0 <= self.weight_decay < math.inf:
            raise FastWeightsError(f"weight_decay is {self.weight_decay}; it must be 0 or more, and finite")
        if self.warmup_steps is not None and not 0 <= self.warmup_steps <= self.steps:
            raise FastWeightsError(f"warmup_steps is {self.warmup_steps}; allowed are 0 to steps ({self.steps})")

    def _check_rates(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise FastWeightsError(f"{name} is {value}; it must be positive and finite")

    @property
    def warmup(self) -> int:
        """Steps of warm-up, given or by default."""
        return self.steps // 50 if self.warmup_steps is None else self.warmup_steps

    @property
    def new_rate(self) -> float:
        """Peak learning rate of what is new."""
        return self.learning_rate if self.new_learning_rate is None else self.new_learning_rate

    def tokens_per_step(self, block_size: int) -> int:
        """Tokens of one optimizer step in one process."""
        return block_size * self.batch_size * self.gradient_accumulation


@dataclass(frozen=True, kw_only=True)
class ConversionStageConfig(StageConfig):
    """What the stages that train a conversion share."""

    factor_learning_rate: float | None = None
    """Peak learning rate of the factors of fast weights and window, in units of the size that the teacher's attention
    has; by default `new_learning_rate`, which a gate on the mix has in any case."""
    lora_rank: int = 0
    """Rank of LoRA on the projections of the converted layers, whose own weights then stay as they are, like all others
    of the base model: what was trained is an adapter. 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_rates("factor_learning_rate")
        if self.lora_rank < 0:
            raise FastWeightsError(f"lora_rank is {self.lora_rank}; allowed are 0 (no LoRA) and ranks of 1 up")

    @property
    def factor_rate(self) -> float:
        """Peak learning rate of the factors of fast weights and window."""
        return self.new_rate if self.factor_learning_rate is None else self.factor_learning_rate


@dataclass(frozen=True, kw_only=True)
class TransferConfig(ConversionStageConfig):
    """Training of the converted layers."""

    new_learning_rate: float | None = 1e-2
    calibrate: bool = True
    """Begin a fresh conversion with the factors at which its own loss is lowest, from the window alone to those that
    bring each layer nearest to the teacher's output; else with those it has: 1, or 0 beside a window by `convert`."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(ConversionStageConfig):
    """Training of the whole model's output."""

    weights: Literal["all", "attention"] = "all"
    """What is trained without LoRA: all weights, or those of the converted layers alone."""

    learning_rate: float = 3e-4
    new_learning_rate: float | None = 1e-2
    kl_weight: float = 1.0
    """Share of the loss that is the divergence from the teacher; the rest is the loss of the text's next token."""
    vocabulary: Literal["all", "seen"] = "all"
    """Tokens between which student and teacher choose: all, or those that the training text has, which takes less."""
    fast_weights: bool = True
    """Train the fast weights; without them, at factors held at 0, windows are trained alone: the control of hybrids."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.kl_weight <= 1:
            raise FastWeightsError(f"kl_weight is {self.kl_weight}; allowed are 0 (text alone) to 1 (teacher alone)")
        check_name("weights", self.weights, ("all", "attention"))
        check_name("vocabulary", self.vocabulary, ("all", "seen"))


@dataclass(frozen=True, kw_only=True)
class MetaConfig(StageConfig):
    """Training of a Fast Weight Layer: `learning_rate` for its matrices, `new_learning_rate` for its scales, step sizes
    and decays."""

    batch_size: int = 1
    learning_rate: float = 2e-3
    new_learning_rate: float | None = 3e-2
    base_learning_rate: float | None = None
    """Peak learning rate of the model below; by default it stays frozen."""
    blocks: int = 8
    """Blocks in a row, one to a forward pass, through which the fast weights go on; 1: they start anew with each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks < 1:
            raise FastWeightsError(f"blocks is {self.blocks}; it must be at least 1")
        self._check_rates("base_learning_rate")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What all stages of a run share."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the forward pass under autocast; weights, states and gates stay fp32."""
    compile: bool = False
    """Compile what stands around the attention, norms and feed-forward parts (torch.compile): pays off on a GPU, after
    a minute or less."""
    activation_checkpointing: bool = False
    """Compute each layer anew in the backward pass, in pretraining and stage finetune: much less memory, a quarter more
    time."""
    seed: int = 0
    """Seed of the data order."""
    adam_beta2: float = 0.99
    """AdamW's second-moment decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    save_every: int = 500
    """Steps between checkpoints; the last two are kept."""
    save_minutes: float = 10.0
    """Minutes after which there is a checkpoint in any case; 0 for none but those of `save_every`."""
    log_every: int = 10
    """Steps between entries of the loss history."""
    report_to: str = "none"
    """Where transformers' Trainer reports to: none, tensorboard, trackio, wandb and others."""

    def __post_init__(self) -> None:
        for name in ("save_every", "log_every"):
            if getattr(self, name) < 1:
                raise FastWeightsError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.save_minutes < math.inf:
            raise FastWeightsError(f"save_minutes is {self.save_minutes}; it must be 0 or more, and finite")
        check_seed(self.seed)
        if not 0 <= self.adam_beta2 < 1:
            raise FastWeightsError(f"adam_beta2 is {self.adam_beta2}; allowed are 0 up to, and without, 1")
        if not self.max_grad_norm > 0:
            raise FastWeightsError(f"max_grad_norm is {self.max_grad_norm}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Convert a model and train it until it speaks like the original."""

    model: str = "embedded"
    """Model to start from: a folder, a .gguf file, a hub name or "embedded"; converted already, or still to convert."""
    output: Path = Path("runs/train")
    """Folder for the trained model, its checkpoints, the run's resolved config and results.json."""
    stage: Literal["all", "transfer", "finetune", "meta"] = "all"
    """all: transfer (layers imitate the teacher's attention), then finetune (all weights); either of them; or meta: a
    Fast Weight Layer, on a model that is converted or not."""
    teacher: str | None = None
    """The model that was converted, where `model` is converted already and does not name it."""
    resume: bool = False
    """Go on where a killed run of the same config stopped; in an empty folder, begin."""
    overwrite: bool = False
    """Start anew in a folder that has a run, or anything else, in it."""
    held_out: str = "validation"
    """Split of the same text to evaluate on; a text without such a split gives up its last twentieth."""
    convert: ConversionConfig = field(default_factory=ConversionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    fast_weight_layer: FastWeightLayerSettings = field(default_factory=FastWeightLayerSettings)
    meta: MetaConfig = field(default_factory=MetaConfig)
    evaluation: HeldOutConfig = field(default_factory=HeldOutConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))
        _check_either(self)
        check_name("stage", self.stage, ("all", *STAGES))
        unused = [name for name in STAGES if name not in self.stages]
        unused += ["convert", "teacher"] if self.stage == "meta" else ["fast_weight_layer"]
        defaults = {field.name: field for field in fields(self)}
        for name in unused:
            default = defaults[name].default_factory() if name != "teacher" else None  # type: ignore[misc]
            if getattr(self, name) != default:
                raise FastWeightsError(f"{name} was given, but stage {self.stage} has no use for it: leave it out")

        if "finetune" not in self.stages and self.run.activation_checkpointing:
            raise FastWeightsError(
                f"run.activation_checkpointing was given, but stage {self.stage} has no use for it: leave it out"
            )
        if self.stage == "all" and not self.finetune.fast_weights:
            raise FastWeightsError(
                "finetune.fast_weights is off and stage is all, whose first part trains them: give stage finetune"
            )
        ranks = {name: getattr(self, name).lora_rank for name in self.stages if name != "meta"}
        if len(set(ranks.values())) > 1:
            given = " and ".join(f"{name}.lora_rank {rank}" for name, rank in ranks.items())
            raise FastWeightsError(f"{given} were given, and one adapter goes through both stages: give both the same")

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that are trained, one after another."""
        return STAGES[:2] if self.stage == "all" else (self.stage,)


@dataclass(frozen=True)
class GPT2Shape:
    """Sizes of the transformer to pretrain."""

    hidden_size: int = 192
    """Width of the residual stream."""
    layers: int = 6
    """Number of blocks."""
    heads: int = 3
    """Attention heads per block."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "layers", "heads"):
            if getattr(self, name) < 1:
                raise FastWeightsError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden_size % self.heads or self.hidden_size % 2:
            raise FastWeightsError(
                f"hidden_size is {self.hidden_size}; it must be even and a multiple of heads ({self.heads})"
            )


@dataclass(frozen=True, kw_only=True)
class ShortStageConfig(StageConfig):
    """Training on short blocks."""

    steps: int = 1800
    batch_size: int = 8
    learning_rate: float = 2e-3
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "constant_with_warmup"
    weight_decay: float = 0.1


@dataclass(frozen=True, kw_only=True)
class LongStageConfig(StageConfig):
    """Training on blocks of the whole context."""

    steps: int = 300
    learning_rate: float = 2e-3
    weight_decay: float = 0.1


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Train a byte-level GPT-2 from random weights, on short blocks first and then on blocks of its full context."""

    output: Path = Path("runs/pretrain")
    """Folder for the trained model and its checkpoints."""
    resume: bool = False
    """Go on where a killed run of the same config stopped; in an empty folder, begin."""
    overwrite: bool = False
    """Start anew in a folder that has a run, or anything else, in it."""
    shape: GPT2Shape = field(default_factory=GPT2Shape)
    data: DataConfig = field(default_factory=DataConfig)
    short_block_size: int = 256
    """Tokens in a block of the first stage; each block lies at a random place among the positions."""
    short: ShortStageConfig = field(default_factory=ShortStageConfig)
    long: LongStageConfig = field(default_factory=LongStageConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))
        _check_either(self)
        if not 2 <= self.short_block_size <= self.data.block_size:
            raise FastWeightsError(
                f"short_block_size is {self.short_block_size}; allowed are 2 to block_size ({self.data.block_size})"
            )


def _check_either(config: TrainConfig | PretrainConfig) -> None:
    if config.resume and config.overwrite:
        raise FastWeightsError("resume goes on with a run and overwrite starts it anew: give one of them")
