"""Pretraining of a small GPT-2: how the embedded model came to be."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import transformers  # its names one by one below: some are slow to import, and only pretraining needs them

from fastweights.data import load_documents, tokenize
from fastweights.embedded.tokenizer import byte_tokenizer
from fastweights.files import save_model
from fastweights.models.loading import load_model
from fastweights.reading.memory import digest_of
from fastweights.training.blocks import TokenBlocks
from fastweights.training.checkpoints import FINISHED, damage
from fastweights.training.runs import begin_run, check_stage, check_start, process_state

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

    from fastweights.settings.training import PretrainConfig


def pretrain(config: PretrainConfig) -> Path:
    """Train a byte-level GPT-2 from random weights.

    Args:
        config: its sizes, its text, and how to train.

    Returns:
        The folder with the trained model and its tokenizer: `config.output`.

    Raises:
        FastWeightsError: the text, a setting or the output folder is refused, before anything of an earlier run is
            touched; or the loss or a weight is no longer finite, or something cannot be written, and the last good
            checkpoint is kept.
        SystemExit: the process got SIGTERM or Ctrl-C, and a checkpoint was written first.
    """
    # transformers' Trainer is slow to start.
    from fastweights.training.pretrain_trainer import PretrainTrainer

    main = process_state().is_main_process
    if main:
        check_start(config, [config.data.text])
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = config.data.block_size
    text = tokenize(load_documents(config.data), tokenizer)
    transformers.set_seed(config.run.seed)
    model = _new_model(config, tokenizer)
    stages = (("short", config.short, config.short_block_size), ("long", config.long, config.data.block_size))
    blocks = {name: TokenBlocks(text.tokens, size, text.document_lengths) for name, _, size in stages}
    for name, stage, _ in stages:
        check_stage(stage, config.run, blocks[name])
    contents = {"text": digest_of(text.tokens)}
    with begin_run(config, [config.data.text], contents) if main else nullcontext():
        for name, stage, _ in stages:
            folder = config.output / name
            if config.resume and damage(folder, FINISHED) is None:
                model = load_model(folder)
                continue
            title = f"pretrain, {name} blocks"
            trainer = PretrainTrainer(model, stage, config.run, folder, blocks[name], tokenizer, title=title)
            trainer.run(resume=config.resume)
        if main:
            save_model(model, tokenizer, config.output)
    return config.output


def _new_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    width, context = config.shape.hidden_size, config.data.block_size
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
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
