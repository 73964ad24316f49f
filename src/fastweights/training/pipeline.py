"""The whole road in one call: convert, transfer, finetune, with an evaluation on held-out text after each."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import transformers

from fastweights.data import STDLIB, DataConfig, TokenBlocks, TokenizedText, load_documents, tokenize
from fastweights.errors import FastWeightsError
from fastweights.evaluation.perplexity import Evaluation, HeldOutConfig, check_stride, evaluate, plain
from fastweights.layers import FastWeightLayerSettings
from fastweights.models import ConversionConfig, FastWeightsForCausalLM, add_fast_weight_layer, convert, load_model
from fastweights.models.loading import check_apart, load_tokenizer, resolve_model
from fastweights.reading.stream import check_block_size
from fastweights.training.config import FinetuneConfig, MetaConfig, RunConfig, StageConfig, TransferConfig
from fastweights.training.finetune import FinetuneTrainer
from fastweights.training.meta import MetaTrainer
from fastweights.training.teacher import load_teacher
from fastweights.training.trainer import check_stage, is_finished, process_state, save_run, tokens_seen
from fastweights.training.transfer import TransferTrainer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accelerate import PartialState
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RESULTS_FILE = "results.json"
TRAINERS = {"transfer": TransferTrainer, "finetune": FinetuneTrainer}
STAGES = ("all", *TRAINERS, "meta")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Convert a model and train it until it speaks like the original."""

    model: str = "embedded"
    """Model to start from: a folder, a .gguf file, a hub name or "embedded"; converted already, or still to convert."""
    output: Path = Path("runs/train")
    """Folder for the trained model, its checkpoints, the run's resolved config and results.json."""
    stage: Literal["all", "transfer", "finetune", "meta"] = "all"
    """all: transfer (layers imitate the teacher's attention), then finetune (all weights); either of them; or meta: a
    Fast Weight Layer, on a model that is converted or not."""
    teacher: str | None = None
    """The model that was converted, where `model` is converted already and does not name it."""
    resume: bool = False
    """Go on where a killed run of the same config stopped."""
    held_out: str = "validation"
    """Split of the same text to evaluate on; a text without such a split gives up its last twentieth."""
    convert: ConversionConfig = field(default_factory=ConversionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    fast_weight_layer: FastWeightLayerSettings = field(default_factory=FastWeightLayerSettings)
    meta: MetaConfig = field(default_factory=MetaConfig)
    evaluation: HeldOutConfig = field(default_factory=HeldOutConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))
        if self.stage not in STAGES:
            raise FastWeightsError(f"stage {self.stage!r} is unknown; known are {', '.join(STAGES)}")


@dataclass(frozen=True)
class StageResult:
    """Held-out quality at one point of the road."""

    stage: str
    """teacher, converted, transfer or finetune; of a Fast Weight Layer static, meta or meta, stream."""
    tokens: int
    """Tokens trained on up to here."""
    evaluation: Evaluation
    retention: float
    """Perplexity of the first row over this one's: the teacher's, or that of the model without the layer."""


def train(config: TrainConfig) -> list[StageResult]:
    """Run the stages of `config`, save the model and results.json in its output folder, and return the results."""
    if config.stage == "meta":
        return _train_meta(config)
    tokenizer = load_tokenizer(config.model)
    process = process_state()
    student, teacher = (model.to(process.device) for model in _load_models(config))  # type: ignore[arg-type]
    train_blocks, held_out = _load_data(config.data, config.held_out, config.model)
    names = ("transfer", "finetune") if config.stage == "all" else (config.stage,)
    _begin(config, names, teacher, train_blocks, process)

    results = _Results(config, held_out)
    results.add("teacher", 0, teacher)
    if config.stage != "finetune":
        results.add("converted", 0, student)
    tokens = 0
    for name in names:
        stage: StageConfig = getattr(config, name)
        folder = config.output / name
        if not (config.resume and is_finished(folder)):
            trainer = TRAINERS[name](student, teacher, stage, config.run, folder, train_blocks, tokenizer, title=name)
            trainer.run(resume=config.resume)
        student = load_model(folder).to(process.device)  # type: ignore[arg-type]
        tokens += tokens_seen(folder)
        results.add(name, tokens, student)

    _save(student, tokenizer, config.output, process)
    return results.list


def _train_meta(config: TrainConfig) -> list[StageResult]:
    _refuse(config.convert, ConversionConfig(), "convert", "stage meta converts nothing: convert the model first")
    tokenizer, process = load_tokenizer(config.model), process_state()
    base = load_model(resolve_model(config.model))
    transformers.set_seed(config.run.seed)
    has_layer = isinstance(base, FastWeightsForCausalLM) and base.fast_weight_layer is not None
    if has_layer:
        known = "the model has a Fast Weight Layer already, which keeps its settings"
        _refuse(config.fast_weight_layer, FastWeightLayerSettings(), "fast_weight_layer", known)
    model: FastWeightsForCausalLM = base if has_layer else add_fast_weight_layer(base, config.fast_weight_layer)  # type: ignore[assignment]
    model.to(process.device)  # type: ignore[arg-type]
    train_blocks, held_out = _load_data(config.data, config.held_out, config.model)
    _begin(config, ("meta",), base, train_blocks, process)

    del base
    results, folder = _Results(config, held_out), config.output / "meta"
    if not has_layer:
        results.add("static", 0, model)  # the layer is still the identity
    if not (config.resume and is_finished(folder)):
        trainer = MetaTrainer(model, config.meta, config.run, folder, train_blocks, tokenizer, title="meta")
        trainer.run(resume=config.resume)
    model = load_model(folder).to(process.device)  # type: ignore[arg-type,assignment]
    tokens = tokens_seen(folder)
    results.add("meta", tokens, model)
    results.add("meta, stream", tokens, model, context="stream")
    _save(model, tokenizer, config.output, process)
    return results.list


def _begin(
    config: TrainConfig, names: Sequence[str], model: PreTrainedModel, blocks: TokenBlocks, process: PartialState
) -> None:
    """Refuse what could not be trained or evaluated; then write down what the run is."""
    check_block_size(model, config.data.block_size)
    check_stride(config.evaluation, config.data.block_size)
    for name in names:
        check_stage(getattr(config, name), config.run, blocks)
    check_apart(config.model, config.output)
    if process.is_main_process:
        save_run(config, config.output, stages=STAGES, resume=config.resume)


def _refuse(given: object, default: object, section: str, reason: str) -> None:
    if given != default:
        raise FastWeightsError(f"{section} was given, but {reason}")


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path, process: PartialState) -> None:
    if process.is_main_process:
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    process.wait_for_everyone()


class _Results:
    """Evaluates as the road goes on, and keeps results.json up to date."""

    def __init__(self, config: TrainConfig, held_out: TokenizedText) -> None:
        self.config = config
        self.held_out = held_out
        self.list: list[StageResult] = []

    def add(self, stage: str, tokens: int, model: PreTrainedModel, **changes) -> None:
        settings = replace(self.config.evaluation, **changes)
        evaluation = evaluate(model, self.held_out, block_size=self.config.data.block_size, config=settings)
        teacher = self.list[0].evaluation if self.list else evaluation
        result = StageResult(stage, tokens, evaluation, math.exp(teacher.loss - evaluation.loss))
        self.list.append(result)
        if process_state().is_main_process:
            text = json.dumps(plain([asdict(result) for result in self.list]), indent=2)
            (self.config.output / RESULTS_FILE).write_text(text + "\n")


@lru_cache(maxsize=1)
def _load_data(data: DataConfig, held_out: str, model: str) -> tuple[TokenBlocks, TokenizedText]:
    """Training blocks and held-out text, which never overlap.

    Kept, as runs that are compared share them.
    """
    tokenizer = load_tokenizer(model)
    documents = load_documents(data)
    if held_out == data.split:
        raise FastWeightsError(f"held_out is {held_out}, which is trained on: name another split")
    try:
        rest = load_documents(replace(data, split=held_out))
    except FastWeightsError:
        if data.text == STDLIB or held_out != TrainConfig.held_out:
            raise
        documents, rest = _without_the_end(documents)
    return TokenBlocks(tokenize(documents, tokenizer).tokens, data.block_size), tokenize(rest, tokenizer)


def _without_the_end(documents: list[str]) -> tuple[list[str], list[str]]:
    """The text, and its last twentieth: of its documents, or of its characters if it is one."""
    if len(documents) == 1:
        cut = len(documents[0]) - max(1, len(documents[0]) // 20)
        return [documents[0][:cut]], [documents[0][cut:]]
    cut = len(documents) - max(1, len(documents) // 20)
    return documents[:cut], documents[cut:]


def _load_models(config: TrainConfig) -> tuple[FastWeightsForCausalLM, PreTrainedModel]:
    model = load_model(resolve_model(config.model))
    if isinstance(model, FastWeightsForCausalLM):
        _refuse(config.convert, ConversionConfig(), "convert", f"{config.model} is converted already")
        if config.stage != "finetune" and not model.fast_attentions():
            raise FastWeightsError(
                f"{config.model} has softmax attention only, nothing to transfer to: use --stage finetune or --stage "
                "meta, or convert the model that it was made from"
            )
        return model, load_teacher(model, config.teacher)
    if config.stage == "finetune":
        raise FastWeightsError(f"{config.model} has no fast weights to finetune: convert it first, or use --stage all")
    _refuse(config.teacher, None, "teacher", f"{config.model} is still to be converted and its own teacher")
    transformers.set_seed(config.run.seed)
    student = convert(model, config.convert)
    return student, model.requires_grad_(False)
