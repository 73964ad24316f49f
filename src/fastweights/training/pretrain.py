"""Pretraining of a small GPT-2: how the embedded model came to be."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from fastweights.data import DataConfig, TokenBlocks, load_documents, tokenize
from fastweights.embedded.tokenizer import byte_tokenizer
from fastweights.errors import FastWeightsError
from fastweights.training.config import RunConfig, StageConfig
from fastweights.training.finetune import next_token_loss
from fastweights.training.trainer import StageTrainer, check_stage, is_finished, save_run

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


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
        if self.hidden_size % self.heads:
            raise FastWeightsError(f"hidden_size {self.hidden_size} is not a multiple of heads ({self.heads})")


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
    """Go on where a killed run of the same config stopped."""
    shape: GPT2Shape = field(default_factory=GPT2Shape)
    data: DataConfig = field(default_factory=DataConfig)
    short_block_size: int = 256
    """Tokens in a block of the first stage; each block lies at a random place among the positions."""
    short: ShortStageConfig = field(default_factory=ShortStageConfig)
    long: LongStageConfig = field(default_factory=LongStageConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))
        if not 2 <= self.short_block_size <= self.data.block_size:
            raise FastWeightsError(
                f"short_block_size is {self.short_block_size}; allowed are 2 to block_size ({self.data.block_size})"
            )


class PretrainTrainer(StageTrainer):
    """Next-token loss; blocks shorter than the context start at random positions, so that all are trained."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        input_ids = inputs["input_ids"]
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        room: int = self.model.config.max_position_embeddings - len(positions)  # type: ignore
        starts = torch.randint(0, room + 1, (len(input_ids), 1), device=input_ids.device)
        outputs = model(input_ids=input_ids, position_ids=starts + positions, use_cache=False)
        self.loss_is_scaled_for_ga = False
        loss = next_token_loss(outputs.logits, input_ids)
        return (loss, outputs) if return_outputs else loss


def pretrain(config: PretrainConfig) -> Path:
    """Train from random weights and return the folder of the trained model."""
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = config.data.block_size
    tokens = tokenize(load_documents(config.data), tokenizer).tokens
    set_seed(config.run.seed)
    model = _new_model(config, tokenizer)
    stages = (("short", config.short, config.short_block_size), ("long", config.long, config.data.block_size))
    for _, stage, block_size in stages:
        check_stage(stage, config.run, TokenBlocks(tokens, block_size))
    save_run(config, config.output, stages=("short", "long"), resume=config.resume)
    for name, stage, block_size in stages:
        folder = config.output / name
        if config.resume and is_finished(folder):
            model = GPT2LMHeadModel.from_pretrained(folder)
            continue
        blocks = TokenBlocks(tokens, block_size)
        trainer = PretrainTrainer(model, stage, config.run, folder, blocks, tokenizer, title=f"pretrain, {name} blocks")
        trainer.run(resume=config.resume)
    model.save_pretrained(config.output)
    tokenizer.save_pretrained(config.output)
    return config.output


def _new_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    width, context = config.shape.hidden_size, config.data.block_size
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=context,
            n_embd=width,
            n_layer=config.shape.layers,
            n_head=config.shape.heads,
            # One pass over the text: nothing to regularise.
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            # About 1 / sqrt(width), as GPT-2's 0.02 is for a width of 1,600.
            initializer_range=0.06,
            bos_token_id=tokenizer.bos_token_id,  # type: ignore[arg-type]
            eos_token_id=tokenizer.eos_token_id,  # type: ignore[arg-type]
        )
    )
    with torch.no_grad():
        # Random positions must each learn on their own what comes just before them; from sinusoids that is one
        # rotation for all, and the loss leaves the plateau of letter pairs several times sooner.
        model.transformer.wpe.weight.copy_(0.1 * _sinusoids(context, width))
    return model


def _sinusoids(length: int, width: int) -> Float[Tensor, "length width"]:
    """Sine and cosine positions of Vaswani et al. (2017)."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
