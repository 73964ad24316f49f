"""Training on transformers' Trainer: pretrain, transfer, finetune, meta, and the road through them."""

from fastweights.training.config import FinetuneConfig, MetaConfig, RunConfig, StageConfig, TransferConfig
from fastweights.training.pipeline import TrainConfig, train
from fastweights.training.pretrain import PretrainConfig, pretrain

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
