from .data import load_documents, tokenize
from .errors import FastWeightsError
from .evaluation.divergence import Divergence, divergence
from .evaluation.dynamic_evaluation import DynamicEvaluation
from .evaluation.parts import evaluate_parts, without_fast_weights, without_window
from .evaluation.perplexity import Evaluation, evaluate
from .evaluation.recall import Recall, recall
from .layers.fast_weight_layer import FastWeightLayer
from .models.adapters import load_adapter, save_adapter
from .models.configuration import FastWeightsConfig
from .models.conversion import add_fast_weight_layer, convert
from .models.loading import load_model
from .models.modeling import FastWeightsForCausalLM
from .reading.memory import Memory, load_memory, new_memory
from .reading.sampling import sample
from .settings.conversion import ConversionConfig
from .settings.evaluation import DynamicEvaluationConfig, EvaluationConfig, HeldOutConfig, RecallConfig
from .settings.fast_weight_layer import FastWeightLayerSettings
from .settings.sampling import SamplingConfig
from .settings.text import DataConfig
from .settings.training import (
    FinetuneConfig,
    MetaConfig,
    PretrainConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
    TransferConfig,
)
from .training.pipeline import train
from .training.pretrain import pretrain

__version__: str
__all__ = [
    "ConversionConfig",
    "DataConfig",
    "Divergence",
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
    "Recall",
    "RecallConfig",
    "RunConfig",
    "SamplingConfig",
    "StageConfig",
    "TrainConfig",
    "TransferConfig",
    "add_fast_weight_layer",
    "convert",
    "divergence",
    "evaluate",
    "evaluate_parts",
    "load_adapter",
    "load_documents",
    "load_memory",
    "load_model",
    "new_memory",
    "pretrain",
    "recall",
    "sample",
    "save_adapter",
    "tokenize",
    "train",
    "without_fast_weights",
    "without_window",
]
