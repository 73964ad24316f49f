"""Language models that remember in fast weights.

Importing this package also registers its models with transformers, so that `AutoModelForCausalLM.from_pretrained`
loads them.
"""

__version__ = "0.1.0"

from fastweights.data import DataConfig, load_documents, tokenize
from fastweights.errors import FastWeightsError
from fastweights.evaluation import Evaluation, EvaluationConfig, evaluate
from fastweights.models import ConversionConfig, FastWeightsConfig, FastWeightsForCausalLM, convert, load_model
from fastweights.training import FinetuneConfig, PretrainConfig, RunConfig, StageConfig, TrainConfig, pretrain, train

__all__ = [
    "ConversionConfig",
    "DataConfig",
    "Evaluation",
    "EvaluationConfig",
    "FastWeightsConfig",
    "FastWeightsError",
    "FastWeightsForCausalLM",
    "FinetuneConfig",
    "PretrainConfig",
    "RunConfig",
    "StageConfig",
    "TrainConfig",
    "convert",
    "evaluate",
    "load_documents",
    "load_model",
    "pretrain",
    "tokenize",
    "train",
]
