"""Training on transformers' Trainer: pretrain, transfer, finetune, meta, and the road through them."""

from fastweights.training.config import (
    FinetuneConfig,
    MetaConfig,
    PretrainConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
    TransferConfig,
)
from fastweights.training.pipeline import train
from fastweights.training.pretrain import pretrain

__all__ = [
    "FinetuneConfig",
    "MetaConfig",
    "PretrainConfig",
    "RunConfig",
    "StageConfig",
    "TrainConfig",
    "TransferConfig",
    "pretrain",
    "train",
]
