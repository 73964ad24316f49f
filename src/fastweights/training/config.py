"""What a training stage, and a run of stages, can be told."""

import math
from dataclasses import dataclass
from typing import Literal

from fastweights.errors import FastWeightsError, check_seed


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
    """Peak learning rate of gates and scales; by default `learning_rate`."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; by default a fiftieth of `steps`."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """Learning rate after the warm-up; linear and cosine end at 0."""
    weight_decay: float = 0.0
    """AdamW's weight decay of the matrices."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation"):
            if getattr(self, name) < 1:
                raise FastWeightsError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "new_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise FastWeightsError(f"{name} is {value}; it must be positive and finite")
        if self.warmup_steps is not None and not 0 <= self.warmup_steps <= self.steps:
            raise FastWeightsError(f"warmup_steps is {self.warmup_steps}; allowed are 0 to steps ({self.steps})")

    @property
    def warmup(self) -> int:
        """Steps of warm-up, given or by default."""
        return self.steps // 50 if self.warmup_steps is None else self.warmup_steps

    def tokens_per_step(self, block_size: int) -> int:
        """Tokens of one optimizer step in one process."""
        return block_size * self.batch_size * self.gradient_accumulation


@dataclass(frozen=True, kw_only=True)
class TransferConfig(StageConfig):
    """Training of the converted layers."""

    new_learning_rate: float | None = 3e-3
    calibrate: bool = True
    """Begin with the scale of each head at which its layer comes nearest to the teacher's output."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(StageConfig):
    """Training of all weights."""

    learning_rate: float = 3e-4
    new_learning_rate: float | None = 1e-3
    kl_weight: float = 1.0
    """Share of the loss that is the divergence from the teacher; the rest is the loss of the text's next token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.kl_weight <= 1:
            raise FastWeightsError(f"kl_weight is {self.kl_weight}; allowed are 0 (text alone) to 1 (teacher alone)")


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
        if self.base_learning_rate is not None and not self.base_learning_rate > 0:
            raise FastWeightsError(f"base_learning_rate is {self.base_learning_rate}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What all stages of a run share."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the forward pass under autocast; weights, states and gates stay fp32."""
    seed: int = 0
    """Seed of the data order."""
    adam_beta2: float = 0.99
    """AdamW's second-moment decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    save_every: int = 500
    """Steps between checkpoints; the last two are kept."""
    log_every: int = 10
    """Steps between entries of the loss history."""
    report_to: str = "none"
    """Where transformers' Trainer reports to: none, tensorboard, trackio, wandb and others."""

    def __post_init__(self) -> None:
        for name in ("save_every", "log_every"):
            if getattr(self, name) < 1:
                raise FastWeightsError(f"{name} is {getattr(self, name)}; it must be at least 1")
        check_seed(self.seed)
        if not 0 <= self.adam_beta2 < 1:
            raise FastWeightsError(f"adam_beta2 is {self.adam_beta2}; allowed are 0 up to, and without, 1")
        if not self.max_grad_norm > 0:
            raise FastWeightsError(f"max_grad_norm is {self.max_grad_norm}; it must be positive")
