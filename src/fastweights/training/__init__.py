"""Training on transformers' Trainer: pretrain, transfer, finetune, meta, and the road through them."""

from fastweights import registration  # noqa: F401
from fastweights.training.pipeline import train
from fastweights.training.pretrain import pretrain

__all__ = ["pretrain", "train"]
