"""Ways to read a text, side by side on the same tokens: static, dynamic evaluation, a Fast Weight Layer, and the parts
of a hybrid model.

Each method in each context is scored on every token but the first of each document; time and peak memory are given
relative to a static model that reads independent blocks.
"""

from __future__ import annotations

import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from fastweights.errors import FastWeightsError
from fastweights.evaluation.dynamic_evaluation import DynamicEvaluation, gradient_mean_squares
from fastweights.evaluation.parts import PARTS, parts
from fastweights.evaluation.peak_memory import PeakMemory
from fastweights.evaluation.perplexity import Evaluation, RangeLoss, by_position, evaluate, plain, score, summary
from fastweights.models.modeling import FastWeightsForCausalLM
from fastweights.reading.stream import check_block_size
from fastweights.settings.evaluation import ComparisonConfig, DynamicEvaluationConfig, EvaluationConfig, RmsConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PreTrainedModel

    from fastweights.data import TokenizedText

_LEARNING_RATES = {"sgd": (0.003, 0.01, 0.03, 0.1, 0.3), "rms": (3e-6, 1e-5, 3e-5, 1e-4, 3e-4)}
_DECAYS = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
_FACTORS = (0.33, 0.58, 1.0, 1.73, 3.0)


@dataclass(frozen=True)
class MethodResult:
    """One method in one context."""

    method: str
    """Of `METHODS` or, of a hybrid model, of `PARTS`."""
    context: str
    evaluation: Evaluation
    by_position: list[RangeLoss]
    seconds: float
    time_ratio: float
    """Wall time over that of static block evaluation."""
    peak_bytes: int | None
    """Peak memory, above what was in use before."""
    peak_bytes_ratio: float | None
    settings: DynamicEvaluationConfig | None
    """Of dynamic evaluation, after tuning."""
    losses: Float[Tensor, " N"] = field(repr=False, compare=False)
    """Of each token of the text, in nats; NaN where a token is not predicted."""

    @property
    def name(self) -> str:
        """What tables and pictures call it."""
        return f"{self.method}, {self.context}"

    def plain(self) -> dict[str, object]:
        """All but the single losses, as JSON has it."""
        fields = asdict(replace(self, losses=torch.empty(0)))
        return plain({name: value for name, value in fields.items() if name != "losses"})


def compare(
    model: PreTrainedModel,
    text: TokenizedText,
    config: ComparisonConfig,
    *,
    block_size: int = 1024,
    evaluation: EvaluationConfig | None = None,
    validation: TokenizedText | None = None,
    training: TokenizedText | None = None,
    teacher: PreTrainedModel | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] | None = None,
) -> list[MethodResult]:
    """Score `text` by each method in each context; static in blocks, the unit of time and peak memory, comes first.

    Args:
        model: any causal LM; it stays as it is.
        text: what all methods read.
        config: the methods and the contexts.
        block_size: tokens that are read at once.
        evaluation: how much of the text, and whether a stream goes on across documents; its context is left alone.
        validation: text to tune dynamic evaluation on, if `config.tune_tokens` says so.
        training: text that rms takes the sizes of gradients from.
        teacher: the model that a hybrid one was converted from; its parts are then read with, too.
        say: called with a line about each part before it begins.
        progress: called as each part goes with the tokens that are done, and with all that there are.

    Raises:
        FastWeightsError: the model has no Fast Weight Layer and fwl was asked for, it has no parts and a teacher was
            given, or a text that a method needs was not given.
    """
    evaluation = evaluation or EvaluationConfig()
    if evaluation.context != EvaluationConfig.context:
        raise FastWeightsError(f"context {evaluation.context!r} belongs into contexts when methods are compared")
    _check_used(config, evaluation)
    evaluation = replace(evaluation, batch_size=1)  # dynamic evaluation and streams read alone
    methods = config.methods or (("static", "fwl") if _layer(model) else ("static",))
    if "fwl" in methods and not _layer(model):
        raise FastWeightsError("this model has no Fast Weight Layer: leave fwl out, or train one with --stage meta")
    mean_squares = _mean_squares(model, training, config, block_size, say) if "rms" in methods else None
    if teacher is not None:
        methods = (*methods, *parts(model, teacher))
        check_block_size(teacher, block_size)
    runs = [("static", "block"), *((method, context) for context in config.contexts for method in methods)]
    check_block_size(model, block_size)
    _warm_up(model, text, block_size)
    results: list[MethodResult] = []
    for method, context in dict.fromkeys(runs):
        settings = None
        here = replace(evaluation, context=context)
        with reading_as(method, model, teacher) as reader:
            if method in ("sgd", "rms"):
                settings = getattr(config, method)
                if config.tune_tokens:
                    say(f"tuning {method} in context {context}")
                    wide = replace(here, max_tokens=config.tune_tokens)
                    known = _needed(validation, "validation")
                    settings = tune(model, known, settings, block_size, wide, mean_squares, progress)
            say(f"{method} in context {context}")
            results.append(_run(reader, text, method, here, block_size, settings, mean_squares, results, progress))
    return results


def _check_used(config: ComparisonConfig, evaluation: EvaluationConfig) -> None:
    """Refuse settings that would do nothing."""
    methods, contexts, usual = config.methods or (), config.contexts, EvaluationConfig()
    dynamic = "sgd" in methods or "rms" in methods
    useless = {
        "batch_size": (evaluation.batch_size != usual.batch_size, "methods that are compared read one row at a time"),
        "stride": (evaluation.stride is not None and "sliding" not in contexts, "sliding is not among the contexts"),
        "carry_documents": (
            evaluation.carry_documents and "stream" not in contexts,
            "stream is not among the contexts",
        ),
        "tune_tokens": (config.tune_tokens and not dynamic, "neither sgd nor rms is among the methods"),
        "sgd": (config.sgd != DynamicEvaluationConfig() and "sgd" not in methods, "sgd is not among the methods"),
        "rms": (config.rms != RmsConfig() and "rms" not in methods, "rms is not among the methods"),
        "statistics_blocks": (
            config.statistics_blocks != ComparisonConfig().statistics_blocks and "rms" not in methods,
            "rms is not among the methods",
        ),
    }
    for name, (given, reason) in useless.items():
        if given:
            raise FastWeightsError(f"{name} was given, but {reason}: leave it out")


def tune(
    model: PreTrainedModel,
    text: TokenizedText,
    config: DynamicEvaluationConfig,
    block_size: int,
    evaluation: EvaluationConfig,
    mean_squares: dict[str, Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DynamicEvaluationConfig:
    """The step size, then the decay, then the step size again, that give the lowest loss on `text`.

    Each is sought downhill among a few values, from one in the middle: the losses on both sides of a valley are not
    asked for.

    Args:
        model: any causal LM; it stays as it is.
        text: validation text.
        config: rule, segment and parameters; step size and decay are sought.
        block_size: tokens that are read at once.
        evaluation: context, and how much of the text.
        mean_squares: from `gradient_mean_squares`, for rms.
        progress: as for `compare`, of each reading of the text anew.
    """
    tried: dict[DynamicEvaluationConfig, float] = {}

    def loss(candidate: DynamicEvaluationConfig) -> float:
        if candidate not in tried:
            with DynamicEvaluation(model, candidate, mean_squares) as dynamic_evaluation:
                tried[candidate] = evaluate(
                    model,
                    text,
                    block_size=block_size,
                    config=evaluation,
                    dynamic_evaluation=dynamic_evaluation,
                    progress=progress,
                ).loss
        return tried[candidate] if math.isfinite(tried[candidate]) else math.inf

    best = replace(config, decay=_DECAYS[len(_DECAYS) // 2])
    best = _downhill([replace(best, learning_rate=rate) for rate in _LEARNING_RATES[config.rule]], loss)
    best = _downhill([replace(best, decay=decay) for decay in _DECAYS], loss)
    return _downhill([replace(best, learning_rate=best.step_size * factor) for factor in _FACTORS], loss)


def _downhill(
    candidates: Sequence[DynamicEvaluationConfig], loss: Callable[[DynamicEvaluationConfig], float]
) -> DynamicEvaluationConfig:
    """The candidate at the bottom of the valley that the one in the middle lies in; the first, if all are infinite."""
    at = len(candidates) // 2
    while True:
        # What diverges does so from some step size up.
        beside = (at, at - 1, at + 1) if math.isfinite(loss(candidates[at])) else (at - 1, at)
        lowest = min((i for i in beside if 0 <= i < len(candidates)), key=lambda i: loss(candidates[i]))
        if lowest == at:
            return candidates[at]
        at = lowest


@contextmanager
def reading_as(
    method: str, model: PreTrainedModel, teacher: PreTrainedModel | None = None
) -> Iterator[PreTrainedModel]:
    """The model that a method reads with; `model` is afterwards what it was.

    Args:
        method: one of `METHODS` or, with a teacher, of `PARTS`.
        model: any causal LM.
        teacher: the model that it was converted from.
    """
    with nullcontext(model) if method == "fwl" else without_layer(model) as reader:
        if method not in PARTS:
            yield reader
            return
        assert teacher is not None
        with parts(model, teacher)[method] as part:
            yield part


@contextmanager
def without_layer(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model without its Fast Weight Layer, if it has one."""
    layer = _layer(model)
    if layer is None:
        yield model
        return
    assert isinstance(model, FastWeightsForCausalLM)
    model.model.fast_weight_layer = None
    try:
        yield model
    finally:
        model.model.fast_weight_layer = layer


def _layer(model: PreTrainedModel):
    return model.fast_weight_layer if isinstance(model, FastWeightsForCausalLM) else None


def _run(
    model: PreTrainedModel,
    text: TokenizedText,
    method: str,
    evaluation: EvaluationConfig,
    block_size: int,
    settings: DynamicEvaluationConfig | None,
    mean_squares: dict[str, Tensor] | None,
    results: list[MethodResult],
    progress: Callable[[int, int], None] | None,
) -> MethodResult:
    losses = torch.full((len(text.tokens[: evaluation.max_tokens]),), float("nan"))
    total, count = 0.0, 0
    with PeakMemory(model.device) as peak:
        start = time.perf_counter()
        dynamic = nullcontext() if settings is None else DynamicEvaluation(model, settings, mean_squares)
        with dynamic as dynamic_evaluation:
            for positions, part in score(
                model,
                text,
                block_size=block_size,
                config=evaluation,
                dynamic_evaluation=dynamic_evaluation,
                progress=progress,
            ):
                losses[positions.cpu()] = part.float().cpu()
                total, count = total + part.cpu().double().sum().item(), count + len(part)
        seconds = time.perf_counter() - start
    unit = results[0] if results else None
    peak_bytes_ratio = None
    if peak.bytes is not None:
        peak_bytes_ratio = 1.0 if unit is None else peak.bytes / unit.peak_bytes if unit.peak_bytes else None
    return MethodResult(
        method=method,
        context=evaluation.context,
        evaluation=summary(total, count, text, evaluation),
        by_position=by_position(losses, text) if math.isfinite(total) else [],  # else it would be of the first tokens
        seconds=seconds,
        time_ratio=1.0 if unit is None else seconds / unit.seconds,
        peak_bytes=peak.bytes,
        peak_bytes_ratio=peak_bytes_ratio,
        settings=settings,
        losses=losses,
    )


def _mean_squares(
    model: PreTrainedModel,
    training: TokenizedText | None,
    config: ComparisonConfig,
    block_size: int,
    say: Callable[[str], None],
) -> dict[str, Tensor]:
    say("gathering the sizes of gradients on training text, for rms")
    tokens = _needed(training, "training").tokens
    count = max(1, min(config.statistics_blocks, (len(tokens) - 1) // block_size))
    starts = [i * (len(tokens) // count) for i in range(count)]
    with without_layer(model):
        blocks: list[Int[Tensor, " T"]] = [tokens[start : start + block_size + 1] for start in starts]
        return gradient_mean_squares(model, blocks, config.rms)


def _needed(text: TokenizedText | None, what: str) -> TokenizedText:
    if text is None:
        raise FastWeightsError(f"dynamic evaluation needs {what} text here; give a text with a {what} split")
    return text


@torch.no_grad()
def _warm_up(model: PreTrainedModel, text: TokenizedText, block_size: int) -> None:
    """Compiled kernels and warm caches, which no method should pay for."""
    block = text.tokens[None, :block_size].to(model.device)
    was_training = model.training
    model.eval()
    for _ in range(2):
        model(input_ids=block, use_cache=False)
    model.train(was_training)
