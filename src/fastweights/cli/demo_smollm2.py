"""The demo's second half: SmolLM2-135M, a real model of English, with the adapter that ships with the package.

The base model, and the window that it has for nothing, read and answer the same beside it. The text is Python's manual,
which every Python has and no adapter was trained on.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from fastweights.cli.plots import plot_decoding
from fastweights.cli.sampling import sampling_settings
from fastweights.data import TokenizedText, tokenize
from fastweights.embedded.stdlib import manual
from fastweights.errors import FastWeightsError
from fastweights.evaluation.cost import DecodeCost, decode_costs, longest_that_fits
from fastweights.evaluation.parts import evaluate_parts, untrained_window
from fastweights.evaluation.perplexity import Evaluation, plain
from fastweights.models.adapters import load_adapter
from fastweights.models.loading import load_model, load_tokenizer
from fastweights.models.names import SMOLLM2, SMOLLM2_BASE
from fastweights.models.quantisation import quantise
from fastweights.progress import Progress
from fastweights.reading.conversation import Conversation
from fastweights.settings.evaluation import EvaluationConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastweights.models.modeling import FastWeightsForCausalLM
    from fastweights.settings.demo import DemoConfig

LETTER = """\
Dear Tom,

We leave for Lisbon on Friday morning, and I am so glad that you will look after the house. The key is under the blue \
flower pot beside the back door. Please take it inside with you, as the children next door like to move the pots.

The garden needs little in May. Water the tomatoes in the evening, when the sun is off them, and leave the roses \
alone, as they have all the rain they need. If there is a storm, bring in the two chairs from the terrace. The lawn \
can wait until we are back; the mower is old and starts only when it wants to.

The cat eats twice a day, half a tin each time, and drinks from the bowl by the window. She sleeps on the sofa, \
whatever we say. If she does not come home for a night, do not worry. She has friends all along the street, and she \
has always been back by breakfast.

The baker comes past on Tuesdays and Saturdays at about nine. His dark bread is the best in town, and he will let you \
pay at the end of the month. For anything else there is the shop at the station, which is open until eight. The bus \
into town stops at the church every half hour, and the last one back leaves at eleven.

Take whatever you like from the shelves. You will find the novels in the hall, and my father's old maps in the study. \
The piano is out of tune, but you are welcome to play it. We are back on the last Sunday of the month, late in the \
evening, and hope to find you still there, with a pot of tea on the table.

With love from all of us,
Anna
"""
LETTER_QUESTION = "Where is the key?"
MANUAL_QUESTION = "What is this manual about?"
_NEW_TOKENS = 60
WEIGHTS = "int4"
"""In how many bits the model reads the long text."""
_BLOCK = 2048
_READ_AT_MOST = 256
_STEPS = 9


class RealModels(NamedTuple):
    """The real model, in full precision and in few bits, its base, and their tokenizer."""

    ours: FastWeightsForCausalLM
    small: PreTrainedModel
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Reading:
    """What it took to read a long text, and what was said of it."""

    tokens: int
    seconds: float
    state_bytes: int
    """Of what is kept of all of it."""
    answer: str
    """To `MANUAL_QUESTION`."""
    memory: Path
    """File from which the conversation goes on."""


@dataclass(frozen=True)
class Judged:
    """How well it reads and answers."""

    parts: dict[str, Evaluation]
    samples: dict[str, str]
    """Answers to `LETTER_QUESTION`."""


@dataclass(frozen=True)
class RealResult:
    """All that the second half measured."""

    judged: Judged
    reading: Reading | None = None
    """None if that failed."""
    decode: dict[str, list[DecodeCost]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """For results.json."""
        reading = self.reading and {**asdict(self.reading), "memory": self.reading.memory.name}
        decode = {name: [asdict(cost) for cost in costs] for name, costs in self.decode.items()}
        return plain({**asdict(self.judged), "decode": decode, "reading": reading})


def read_long_text(config: DemoConfig) -> Reading:
    """Python's manual, or the beginning of it, read in few bits, and a question.

    Args:
        config: its output folder exists.

    Raises:
        FastWeightsError: the model or the manual cannot be had.
    """
    models = load_real()
    text = _manual(models.tokenizer)
    # Read as the first turn of a conversation, which is kept in a file.
    conversation = _conversation(models.small, models.tokenizer)
    said = models.tokenizer.decode(text.tokens[: config.read_tokens], skip_special_tokens=True)
    start = time.perf_counter()
    with Progress("reading", unit="tokens", quick=True) as progress:
        conversation.read(f"{said}\n\n{MANUAL_QUESTION}", progress=progress)
    seconds, tokens = time.perf_counter() - start, conversation.tokens
    answer = conversation.answer()
    memory = conversation.save(config.output / "manual.memory")
    return Reading(tokens, seconds, conversation.size(), answer, memory)


def judge(config: DemoConfig) -> dict[str, Evaluation]:
    """The real model's quality with each of its parts, beside that of its base.

    Args:
        config: says how much of Python's manual is read.

    Raises:
        FastWeightsError: the model or the manual cannot be had.
    """
    models = load_real()
    text = _manual(models.tokenizer)
    settings = EvaluationConfig(batch_size=1, max_tokens=config.real_held_out_tokens)
    with Progress("Python's manual", unit="tokens", quick=True) as progress:
        return evaluate_parts(models.ours, models.base, text, block_size=_BLOCK, config=settings, progress=progress)


@lru_cache(maxsize=1)
def load_real() -> RealModels:
    """The models of this half, loaded once in a process.

    Raises:
        FastWeightsError: they cannot be had.
    """
    base = load_model(SMOLLM2_BASE)
    small = quantise(load_adapter(SMOLLM2, base), WEIGHTS)
    return RealModels(load_adapter(SMOLLM2, base), small, base, load_tokenizer(SMOLLM2_BASE))


def answers(models: RealModels) -> dict[str, str]:
    """To `LETTER_QUESTION`, by the base model, its window untrained, and ours.

    Args:
        models: of `load_real`.
    """
    with untrained_window(models.ours, models.base) as window:
        asked = {SMOLLM2_BASE: models.base, "untrained window": window, SMOLLM2: models.ours}
        return {name: _answer(each, models.tokenizer) for name, each in asked.items()}


def time_smollm2(models: RealModels, found: RealResult, config: DemoConfig, say: Callable[[str], None]) -> RealResult:
    """Add what a token costs by base model and adapter, and a picture of it.

    Args:
        models: of `load_real`.
        found: what is known of them.
        config: its output folder exists.
        say: called with a line about each part before it begins.
    """
    decode = _decode({SMOLLM2: models.ours, f"{SMOLLM2}, {WEIGHTS}": models.small}, models.base, config, say)
    picture = config.output / "smollm2.png"
    plot_decoding(decode, models.base.config.max_position_embeddings, picture)
    return replace(found, decode=decode, files=[picture, *found.files])


def _manual(tokenizer: PreTrainedTokenizerBase) -> TokenizedText:
    """Python's."""
    if not (topics := manual()):
        raise FastWeightsError("this Python has no manual (pydoc_data): install it, or take a Python from python.org")
    return tokenize(["\n\n".join(topics.values())], tokenizer)


def _decode(
    ours: Mapping[str, PreTrainedModel], base: PreTrainedModel, config: DemoConfig, say: Callable[[str], None]
) -> dict[str, list[DecodeCost]]:
    fits = longest_that_fits(base, config.contexts)
    say(f"SmolLM2's time per token and size of the state at contexts up to {config.contexts[-1]:,}")
    if fits < config.contexts[-1]:
        say(f"{SMOLLM2_BASE} is left out beyond {fits:,}: this machine has no memory for its keys and values")
    models = {SMOLLM2_BASE: base, **ours}
    return decode_costs(models, config.contexts, tokens=_STEPS, read_at_most=_READ_AT_MOST, softmax_up_to=fits)


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    conversation = _conversation(model, tokenizer)
    conversation.read(f"{LETTER}\n{LETTER_QUESTION}")
    return conversation.answer()


def _conversation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Conversation:
    greedy = {"temperature": 0.0, "top_k": None, "top_p": None, "repetition_penalty": None}
    settings = sampling_settings(model.generation_config, greedy, max_new_tokens=_NEW_TOKENS)  # type: ignore[arg-type]
    return Conversation(model, tokenizer, settings)
