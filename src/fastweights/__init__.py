"""Language models that remember in fast weights.

Importing this package also registers its models with transformers, so that `AutoModelForCausalLM.from_pretrained`
loads them.
"""

__version__ = "0.1.0"

from fastweights.data import DataConfig, load_documents, tokenize
from fastweights.errors import FastWeightsError
from fastweights.evaluation.dynamic_evaluation import DynamicEvaluation, DynamicEvaluationConfig
from fastweights.evaluation.perplexity import Evaluation, EvaluationConfig, HeldOutConfig, evaluate
from fastweights.layers import FastWeightLayer, FastWeightLayerSettings
from fastweights.models import (
    ConversionConfig,
    FastWeightsConfig,
    FastWeightsForCausalLM,
    add_fast_weight_layer,
    convert,
    load_model,
)
from fastweights.reading.memory import Memory, load_memory, new_memory
from fastweights.training import (
    FinetuneConfig,
    MetaConfig,
    PretrainConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
    TransferConfig,
    pretrain,
    train,
)

__all__ = [
    "ConversionConfig",
    "DataConfig",
    "DynamicEvaluation",
    "DynamicEvaluationConfig",
    "Evaluation",
    "EvaluationConfig",
    "FastWeightLayer",
    "FastWeightLayerSettings",
    "FastWeightsConfig",
    "FastWeightsError",
    "FastWeightsForCausalLM",
    "FinetuneConfig",
    "HeldOutConfig",
    "Memory",
    "MetaConfig",
    "PretrainConfig",
    "RunConfig",
    "StageConfig",
    "TrainConfig",
    "TransferConfig",
    "add_fast_weight_layer",
    "convert",
    "evaluate",
    "load_documents",
    "load_memory",
    "load_model",
    "new_memory",
    "pretrain",
    "tokenize",
    "train",
]
