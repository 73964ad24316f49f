"""The whole road in one call: convert, transfer, finetune, with an evaluation on held-out text after each."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import transformers
from transformers import PreTrainedModel

from fastweights.data import TokenizedText, load_documents, overlap, tokenize
from fastweights.errors import FastWeightsError, NoSuchSplitError
from fastweights.evaluation.comparison import without_layer
from fastweights.evaluation.parts import evaluate_parts, is_hybrid
from fastweights.evaluation.perplexity import Evaluation, check_long_enough, check_stride, evaluate, plain
from fastweights.files import save_model, write_text
from fastweights.models import FastWeightsForCausalLM, add_fast_weight_layer, convert, load_model
from fastweights.models.adapters import adapter_config, check_rest, load_adapter, save_adapter
from fastweights.models.conversion import add_mix_gates, convert_beside
from fastweights.models.loading import adapter_folder, load_tokenizer, name_of, resolve_model
from fastweights.models.lora import check_lora, lora_rank
from fastweights.models.quantisation import check_not_quantised
from fastweights.progress import Progress
from fastweights.reading.memory import digest_of, fingerprint
from fastweights.reading.stream import check_block_size
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.fast_weight_layer import FastWeightLayerSettings
from fastweights.settings.text import STDLIB
from fastweights.settings.training import FinetuneConfig, TrainConfig
from fastweights.training.blocks import TokenBlocks
from fastweights.training.checkpoints import FINISHED, damage, last_checkpoint
from fastweights.training.runs import (
    CONVERTED,
    RESULTS_FILE,
    begin_run,
    check_stage,
    check_start,
    process_state,
    seconds_trained,
    tokens_seen,
)
from fastweights.training.teacher import load_teacher

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from fastweights.settings.training import TransferConfig
    from fastweights.training.trainer import StageTrainer

_UNTRAINED = ("teacher", "converted", "static")
_Model = TypeVar("_Model", bound=PreTrainedModel)


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
    parts: dict[str, Evaluation] | None = None
    """Of a hybrid model after the last stage, from `evaluate_parts`: what each part is worth, on a part of the text."""
    seconds: float = 0.0
    """How long was trained up to here."""


def train(config: TrainConfig, teacher: Evaluation | None = None) -> list[StageResult]:
    """Train a model as `config` says, and save it.

    The output folder gets the trained model with its tokenizer, results.json, run.json (the resolved config and the
    versions it ran with), and a folder for each stage with its checkpoints and loss history.

    Args:
        config: what to train, on what and how; with `resume`, a run of the same config in the same folder goes on.
        teacher: what the held-out text costs the model that is converted, where another run has found that out already.

    Returns:
        Quality on held-out text at each point of the road, the teacher's or that of the model without a Fast Weight
        Layer first.

    Raises:
        DivergedError: the loss or a weight is no longer finite, and the last good checkpoint is kept.
        FastWeightsError: a model, a text, a setting or the output folder is refused, before anything of an earlier run
            is touched; or something cannot be written, and the last good checkpoint is kept.
        SystemExit: the process got SIGTERM or Ctrl-C while a stage was trained, and a checkpoint was written first.
    """
    with _Run(config) as run:
        return _train_meta(run) if config.stage == "meta" else _train_conversion(run, teacher)


def _train_conversion(run: _Run, known: Evaluation | None) -> list[StageResult]:
    from fastweights.training.calibration import calibrate, is_fresh  # slow to import, like the stages' trainers

    config = run.config
    student, teacher, was_converted = _load_models(config)
    for stage in config.stages:
        _check_student(student, getattr(config, stage))
    run.begin(config.stages, teacher, student if was_converted else None)
    student, teacher = run.place(student), run.place(teacher)
    if known is None:
        run.evaluate("teacher", teacher)
    else:
        run.add("teacher", known)
    fresh = is_fresh(student)
    # What calibration found is in a checkpoint.
    is_known = "converted" in run.known and run.has_begun(config.stages[0])
    if fresh and not is_known and (config.stage == "finetune" or config.transfer.calibrate):
        calibrate(student, teacher, run.blocks)
    if fresh or config.stage != "finetune":
        run.evaluate("converted", student)
    for stage in run.stages:
        student = run.train(stage, student, teacher)
        run.evaluate(stage, student)
    run.evaluate_parts(student, teacher)
    return run.end(student, teacher)


def _train_meta(run: _Run) -> list[StageResult]:
    config = run.config
    base = load_model(config.model)
    check_not_quantised(base, "training")
    transformers.set_seed(config.run.seed)
    has_layer = isinstance(base, FastWeightsForCausalLM) and base.fast_weight_layer is not None
    if has_layer:
        known = "the model has a Fast Weight Layer already, which keeps its settings"
        _refuse(config.fast_weight_layer, FastWeightLayerSettings(), "fast_weight_layer", known)
    model = base if has_layer else add_fast_weight_layer(base, config.fast_weight_layer)
    run.begin(config.stages, base)
    del base
    model = run.place(model)
    with without_layer(model):
        run.evaluate("static", model)
    model = run.train("meta", model)
    run.evaluate("meta", model)
    run.evaluate("meta, stream", model, context="stream")
    return run.end(model)


class _Run:
    """What every road shares: the text, the stages that are trained one after another, and what came of them so far.

    The folder is the run's alone until the `with` block ends.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.inputs = [resolve_model(config.model), config.teacher, config.data.text]
        self.process = process_state()
        if self.process.is_main_process:
            check_start(config, self.inputs)
        self.tokenizer = load_tokenizer(config.model)
        self.results: list[StageResult] = []
        self.tokens, self.seconds = 0, 0.0
        self._alone = ExitStack()

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._alone.close()

    def begin(
        self, stages: Sequence[str], model: PreTrainedModel, student: FastWeightsForCausalLM | None = None
    ) -> None:
        """Load the text and refuse what could not be trained or evaluated; then write down what the run is.

        Args:
            stages: that are to be trained.
            model: that the run begins with, or that its student is converted from.
            student: one that was converted before.
        """
        config = self.config
        self.stages = stages
        self.blocks, self.held_out = load_data(config, self.tokenizer)
        check_block_size(model, config.data.block_size)
        check_stride(config.evaluation, config.data.block_size)
        for stage in stages:
            check_stage(getattr(config, stage), config.run, self.blocks)
        check_long_enough(self.held_out, config.evaluation)
        inputs = [*self.inputs, name_of(model)]
        if self.process.is_main_process:
            contents = contents_of(model, self.blocks, self.held_out)
            if student is not None:
                contents[CONVERTED] = fingerprint(student)
            self._alone.enter_context(begin_run(config, inputs, contents))
        self.process.wait_for_everyone()  # until results that are not this run's are gone
        self.known = _known_before_training(config.output)
        self.process.wait_for_everyone()  # before the first writes results anew

    def has_begun(self, stage: str) -> bool:
        """Whether a stage goes on from a checkpoint, or has come to its end."""
        folder = self.config.output / stage
        return damage(folder, FINISHED) is None or last_checkpoint(folder) is not None

    def place(self, model: _Model) -> _Model:
        """The model on this process's device."""
        return model.to(self.process.device)  # type: ignore[arg-type]

    def train(self, stage: str, *models: PreTrainedModel) -> PreTrainedModel:
        """The model that a stage makes, or has made in the run that this one goes on with.

        Args:
            models: that the stage's trainer takes: the model to train, and the teacher where there is one.
        """
        config, folder = self.config, self.config.output / stage
        if not (config.resume and damage(folder, FINISHED) is None):
            settings = getattr(config, stage)
            trainer = _trainer_class(stage)(
                *models, settings, config.run, folder, self.blocks, self.tokenizer, title=stage
            )
            trainer.run(resume=config.resume)
        self.tokens += tokens_seen(folder)
        self.seconds += seconds_trained(folder)
        return self.place(_load_trained(folder, *models[1:]))

    def evaluate(self, name: str, model: PreTrainedModel, **changes) -> None:
        """Add a result, and bring results.json up to date; what was evaluated before a resume is known.

        Args:
            changes: of the run's settings for evaluation.
        """
        if name in self.known:
            self.add(name, self.known[name])
            return
        settings = replace(self.config.evaluation, **changes)
        with Progress(f"evaluating {name}", unit="tokens", show=self.process.is_main_process) as progress:
            evaluation = evaluate(
                model, self.held_out, block_size=self.config.data.block_size, config=settings, progress=progress
            )
        self.add(name, evaluation)

    def add(self, name: str, evaluation: Evaluation) -> None:
        """A result, and results.json with it."""
        first = self.results[0].evaluation if self.results else evaluation
        retention = math.exp(first.loss - evaluation.loss)
        self.results.append(StageResult(name, self.tokens, evaluation, retention, seconds=self.seconds))
        self._write()

    def evaluate_parts(self, model: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Add what the parts of a hybrid model are worth to the last result."""
        settings = self.config.evaluation
        if not is_hybrid(model) or not settings.parts_tokens:
            return
        few = replace(settings, max_tokens=min(settings.parts_tokens, settings.max_tokens or settings.parts_tokens))
        with Progress("evaluating its parts", unit="tokens", show=self.process.is_main_process) as progress:
            parts = evaluate_parts(
                model, teacher, self.held_out, block_size=self.config.data.block_size, config=few, progress=progress
            )
        self.results[-1] = replace(self.results[-1], parts=parts)
        self._write()

    def _write(self) -> None:
        if self.process.is_main_process:
            text = json.dumps(plain([asdict(result) for result in self.results]), indent=2)
            write_text(self.config.output / RESULTS_FILE, text + "\n")

    def end(self, model: PreTrainedModel, teacher: PreTrainedModel | None = None) -> list[StageResult]:
        """Save the model in the run's own folder, as an adapter of its teacher if it has LoRA; all results."""
        if self.process.is_main_process:
            if isinstance(model, FastWeightsForCausalLM) and teacher is not None and lora_rank(model):
                save_adapter(model, self.config.output, base=teacher, replace=True)
            else:
                save_model(model, self.tokenizer, self.config.output)
        self.process.wait_for_everyone()
        return self.results


def _known_before_training(folder: Path) -> dict[str, Evaluation]:
    """What the run that goes on in this folder has evaluated of models that no stage has trained."""
    try:
        rows = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
        rows = [row for row in rows if row["stage"] in _UNTRAINED and None not in row["evaluation"].values()]
        return {row["stage"]: Evaluation(**row["evaluation"]) for row in rows}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _trainer_class(stage: str) -> Callable[..., StageTrainer]:
    """Imported where it is used: transformers' Trainer is slow to start, and only training needs it."""
    from fastweights.training.finetune import FinetuneTrainer
    from fastweights.training.meta import MetaTrainer
    from fastweights.training.transfer import TransferTrainer

    return {"transfer": TransferTrainer, "finetune": FinetuneTrainer, "meta": MetaTrainer}[stage]


def _refuse(given: object, default: object, section: str, reason: str) -> None:
    if given != default:
        raise FastWeightsError(f"{section} was given, but {reason}")


def contents_of(model: PreTrainedModel, blocks: TokenBlocks, held_out: TokenizedText) -> dict[str, str]:
    """Digest of each of the things that a run reads, by name."""
    texts = {"text": blocks.blocks, "held-out text": held_out.tokens}
    return {"model": fingerprint(model), **{name: digest_of(tokens) for name, tokens in texts.items()}}


def load_data(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[TokenBlocks, TokenizedText]:
    """Training blocks and held-out text, which never overlap."""
    data, held_out = config.data, config.held_out
    documents = load_documents(data)
    if overlap(held_out, data.split):
        raise FastWeightsError(f"held_out is {held_out}, which is trained on: name another split")
    try:
        rest = load_documents(replace(data, split=held_out))
    except NoSuchSplitError:
        if data.text == STDLIB or held_out != TrainConfig.held_out:
            raise
        documents, rest = _without_the_end(documents)
    text = tokenize(documents, tokenizer)
    return TokenBlocks(text.tokens, data.block_size, text.document_lengths), tokenize(rest, tokenizer)


def _without_the_end(documents: list[str]) -> tuple[list[str], list[str]]:
    """The text, and its last twentieth: of its documents, or of its characters if it is one."""
    if len(documents) == 1:
        cut = len(documents[0]) - max(1, len(documents[0]) // 20)
        return [documents[0][:cut]], [documents[0][cut:]]
    cut = len(documents) - max(1, len(documents) // 20)
    return documents[:cut], documents[cut:]


def _load_trained(folder: Path, base: PreTrainedModel | None = None) -> PreTrainedModel:
    """What a stage has made, to go on from: LoRA stays beside the weights."""
    if adapter_config(folder) is None:
        return load_model(folder)
    return load_adapter(folder, base, merge=False, share=base is not None)


def _check_student(student: FastWeightsForCausalLM, config: TransferConfig | FinetuneConfig) -> None:
    """Refuse what a stage could not train, before anything of an earlier run is touched."""
    if config.lora_rank:
        check_lora(student, config.lora_rank)
    if isinstance(config, FinetuneConfig) and not config.fast_weights:
        from fastweights.training.finetune import check_windows

        check_windows(student)


def _load_models(config: TrainConfig) -> tuple[FastWeightsForCausalLM, PreTrainedModel, bool]:
    """Student and teacher, and whether the student was converted before."""
    is_adapter = adapter_folder(config.model) is not None
    lora = any(getattr(config, stage).lora_rank for stage in config.stages)
    model = load_adapter(config.model, merge=False) if is_adapter and lora else load_model(config.model)
    check_not_quantised(model, "training")
    if isinstance(model, FastWeightsForCausalLM):
        if config.convert == ConversionConfig(mix_gate=True) and model.fast_attentions():
            add_mix_gates(model)
        else:
            added = "convert.mix_gate alone can be added" if model.fast_attentions() else "it has no fast weights"
            _refuse(config.convert, ConversionConfig(), "convert", f"{config.model} is converted already: {added}")
        if config.stage != "finetune" and not model.fast_attentions():
            raise FastWeightsError(
                f"{config.model} has softmax attention only, nothing to transfer to: use --stage finetune or --stage "
                "meta, or convert the model that it was made from"
            )
        teacher = load_teacher(model, config.teacher)
        if lora and not is_adapter:
            advice = "leave lora_rank out, or train the adapter or the original that it was made of"
            check_rest(model, convert_beside(teacher, model.config.settings), advice)
        return model, teacher, lora or not is_adapter  # what is merged may be rounded otherwise on another machine
    if config.stage == "finetune" and config.convert == ConversionConfig():
        raise FastWeightsError(
            f"{config.model} has no fast weights to finetune: say how to convert it (convert.window, for example), "
            "convert it first, or use --stage all"
        )
    _refuse(config.teacher, None, "teacher", f"{config.model} is still to be converted and its own teacher")
    transformers.set_seed(config.run.seed)
    # Beside LoRA the original's weights stay as they are, and one copy of them does.
    student = convert_beside(model, config.convert) if lora else convert(model, config.convert)
    return student, model.requires_grad_(False), False
