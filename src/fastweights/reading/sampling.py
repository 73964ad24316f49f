"""Texts sampled from a model itself: what a student learns from where there is no corpus.

All documents of a batch are at the same place, so that nothing is padded; those that ended leave it. Each has random
numbers of its own, by the seed and its own number: it does not matter, but for rounding, what it is sampled beside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from fastweights.data import first_tokens, token_ids
from fastweights.errors import FastWeightsError
from fastweights.models.cache import FastWeightsCache
from fastweights.models.modeling import FastWeightsForCausalLM
from fastweights.reading.conversation import ChatTemplate
from fastweights.reading.generation import end_tokens
from fastweights.reading.stream import check_logits, last_position
from fastweights.reading.text import tokens_of
from fastweights.settings.sampling import SamplingConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

_LONGEST = 1024
_GROUP = 256
_STILL_TO_COME = -1
_LEAVE_TOGETHER = 8


@dataclass(frozen=True)
class SampledDocument:
    """A text that a model made."""

    text: str
    tokens: int
    """Its prompt and its end token included."""
    comes_back: bool
    """Whether the text has, tokenized, the very tokens that were sampled: there are other ways to spell a word."""


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
    *,
    prompts: Sequence[str] = (),
    documents: int = 0,
    tokens: int = 0,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Iterator[list[SampledDocument]]:
    """Sample documents, a batch at a time, until there are `config.tokens`.

    A document begins with the tokenizer's start token, which is no part of its text, and then its prompt; it ends with
    an end token, or a start token, or at `config.length`. A conversation begins as the model's chat template has it,
    and goes on with the other's turn where one ends.

    Args:
        model: any causal LM, converted or not; `config.precision` is for whoever loads it.
        tokenizer: the model's.
        config: how to sample.
        prompts: beginnings, which documents take in turn; of conversations what is said first.
        documents: how many were sampled earlier, after which to go on.
        tokens: of these.
        progress: called after each token of the batch with the number of tokens sampled so far.

    Returns:
        One batch after another.

    Raises:
        FastWeightsError: there is nothing to begin with, a prompt fills the length, the length reaches beyond the
            model's absolute positions, or there is no chat template for conversations.
    """
    sampler = _Sampler(model, tokenizer, config, prompts)
    return sampler.batches(documents, tokens, progress)


class _Sampler:
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: SamplingConfig,
        prompts: Sequence[str],
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.length = _length(model, config)
        self.turns = _Turns(tokenizer, prompts) if config.conversations else None
        self.start = first_tokens(tokenizer) if self.turns else _start(tokenizer)
        self.beginnings = self._beginnings(self.turns.beginnings if self.turns else prompts)
        self.ends = torch.tensor(_ends(model, tokenizer), device=model.device)
        self.warp = _warp(config)
        # A few tokens are not sampled by the dozen.
        self.rows = min(config.batch_size, -(-config.tokens // self.length))

    def batches(
        self, documents: int, tokens: int, progress: Callable[[int], object]
    ) -> Iterator[list[SampledDocument]]:
        while tokens < self.config.tokens:
            before = tokens
            batch = self._told(self._batch(documents, lambda more: progress(before + more)))  # noqa: B023 (used at once)
            documents, tokens = documents + len(batch), tokens + sum(document.tokens for document in batch)
            yield batch

    def _beginnings(self, prompts: Sequence[str]) -> list[Int[Tensor, " n"]]:
        found = []
        for prompt, ids in zip(prompts, token_ids(list(prompts), self.tokenizer), strict=True):
            given = ids if self.start and ids[: len(self.start)] == self.start else [*self.start, *ids]
            if len(given) - len(self.start) >= self.length:
                raise FastWeightsError(
                    f"the prompt {prompt[:40]!r} has {len(given) - len(self.start)} tokens, and a document up to "
                    f"{self.length}: give a shorter one, or a greater length"
                )
            found.append(torch.tensor(given, dtype=torch.long, device=self.model.device))
        found = found or [torch.tensor(self.start, dtype=torch.long, device=self.model.device)]
        if not all(map(len, found)):
            raise FastWeightsError("this model has no token to begin a text with: give prompts that are not empty")
        return found

    @torch.inference_mode()
    def _batch(self, first: int, progress: Callable[[int], object]) -> list[list[int]]:
        """Token ids of the next documents, without their start."""
        numbers, start = range(first, first + self.rows), len(self.start)
        begun = [self.beginnings[number % len(self.beginnings)] for number in numbers]
        text = torch.full((self.rows, start + self.length), _STILL_TO_COME, device=self.model.device)
        for row, given in enumerate(begun):
            text[row, : len(given)] = given
        lengths = torch.full((self.rows,), text.shape[1], device=self.model.device)
        uniform = self._uniform(numbers)
        place, tokens = min(map(len, begun)), self.rows * (min(map(len, begun)) - start)
        answering = [bool(self.turns and self.turns.answers_first)] * self.rows
        cache, read = _cache(self.model, text.shape[1]), 0
        rows, going = torch.arange(self.rows, device=self.model.device), torch.ones_like(lengths, dtype=torch.bool)
        while place < text.shape[1] and going.any():
            if (~going).sum() * _LEAVE_TOGETHER >= len(rows):
                cache.batch_select_indices(going.nonzero()[:, 0])
                rows, going = rows[going], going[going]
            ids = text[rows, read:place]
            logits = self.model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            drawn = draw(self.warp(ids, logits.float()), uniform[rows, place - start])  # type: ignore[arg-type]
            given = text[rows, place]
            new = going & (given == _STILL_TO_COME)
            text[rows, place] = torch.where(given == _STILL_TO_COME, drawn, given)
            tokens += int(going.sum())
            read, place = place, place + 1
            ended = new & torch.isin(drawn, self.ends)
            if self.turns:
                ended &= ~self.turns.go_on(text[:, place:], rows, torch.where(new, drawn, _STILL_TO_COME), answering)
            lengths[rows[ended]] = place
            going = going & ~ended
            progress(tokens)
        return [row[start:length].tolist() for row, length in zip(text, lengths.tolist(), strict=True)]

    def _uniform(self, numbers: range) -> Float[Tensor, "rows length"]:
        each = [np.random.default_rng([self.config.seed, number]).random(self.length) for number in numbers]
        return torch.from_numpy(np.stack(each)).to(self.model.device)

    def _told(self, batch: list[list[int]]) -> list[SampledDocument]:
        ends = set(self.ends.tolist())
        # An end token stands between texts and not in them: whoever reads them puts it there.
        without = [ids[:-1] if ids and ids[-1] in ends else ids for ids in batch]
        texts: list[str] = [self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in without]  # type: ignore[misc]
        again = token_ids(texts, self.tokenizer)
        return [
            SampledDocument(text, len(ids), back == plain)
            for text, ids, plain, back in zip(texts, batch, without, again, strict=True)
        ]


class _Turns:
    """The turns of conversations, which a chat template parts.

    Args:
        tokenizer: the model's.
        said: what conversations begin with, if the model is not to say that, too.

    Raises:
        FastWeightsError: there is no template, or it ends turns by no token of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, said: Sequence[str]) -> None:
        template = ChatTemplate(tokenizer)
        if template.plain:
            raise FastWeightsError("this tokenizer has no chat template, which conversations need: leave them out")
        self.beginnings = list(map(template.first, said)) or [template.before()]
        self.answers_first = bool(said)
        after = (template.between(), template.opening())
        self.after_answer, self.after_said = (tokens_of(text, tokenizer, inside=True).tolist() for text in after)
        marks = tokenizer.added_tokens_decoder
        if not all(ids and ids[0] in marks for ids in (self.after_answer, self.after_said)):
            raise FastWeightsError(
                "the chat template of this tokenizer ends turns by no token of its own: leave conversations out"
            )

    def go_on(
        self,
        room: Int[Tensor, "batch n"],
        rows: Int[Tensor, " rows"],
        drawn: Int[Tensor, " rows"],
        answering: list[bool],
    ) -> Bool[Tensor, " rows"]:
        """Where a token ends a turn, write behind it what the template has before the next.

        Args:
            room: tokens that are still to come, of all documents.
            rows: documents that go on.
            drawn: the last token of each.
            answering: whether all documents are in an answer; changed where a turn ends.

        Returns:
            Whose turns ended.
        """
        ended = torch.zeros_like(drawn, dtype=torch.bool)
        for place, (row, token) in enumerate(zip(rows.tolist(), drawn.tolist(), strict=True)):
            end, *following = self.after_answer if answering[row] else self.after_said
            if token == end:
                n = min(len(following), room.shape[1])
                room[row, :n] = torch.tensor(following[:n])
                answering[row], ended[place] = not answering[row], True
        return ended


def draw(logits: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Tokens by the inverse of their cumulated probabilities, at one random number in [0, 1) a row.

    Over groups of tokens first, and then within one: `torch.multinomial` takes longer than a small model itself.

    Raises:
        FastWeightsError: the logits predict nothing.
    """
    probabilities = pad(logits.softmax(-1), (0, -logits.shape[-1] % _GROUP)).unflatten(-1, (-1, _GROUP))
    groups = probabilities.sum(-1, dtype=torch.float64)
    if not groups.isfinite().all():
        check_logits(logits)
    cumulated = groups.cumsum(-1)
    target = uniform[:, None] * cumulated[:, -1:]
    group = _first_above(cumulated, target)
    target = target - (cumulated - groups).gather(1, group)
    within = probabilities[torch.arange(len(group), device=group.device), group[:, 0]].cumsum(-1, dtype=torch.float64)
    return (group * _GROUP + _first_above(within, target))[:, 0]


def _first_above(cumulated: Float[Tensor, "B n"], target: Float[Tensor, "B 1"]) -> Int[Tensor, "B 1"]:
    """Where a sum first exceeds its target, which is brought between 0 and the last sum: rounding may take it out.

    What adds nothing is never found.
    """
    last = torch.nextafter(cumulated[:, -1:], torch.zeros_like(target))
    return torch.searchsorted(cumulated, torch.minimum(target.clamp(min=0), last), right=True)


class _RoomyLayer(DynamicLayer):
    """Keys and values in a room for the longest text; transformers' own layer copies all of them for each token.

    Args:
        room: tokens of the longest text.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._all: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """The next keys and values, (B, G, n, D) -> all of them."""
        if not self._all:
            self.lazy_initialization(key_states, value_states)
            self._all = [new.new_empty(*new.shape[:2], self.room, new.shape[-1]) for new in (key_states, value_states)]
        past = self.get_seq_length()
        end = past + key_states.shape[-2]
        for kept, new in zip(self._all, (key_states, value_states), strict=True):
            kept[:, :, past:end] = new
        self._show(end)
        return self.keys, self.values  # type: ignore[return-value]

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows alone."""
        self._all = [kept[indices] for kept in self._all]
        self._show(self.get_seq_length())

    def _show(self, length: int) -> None:
        self.keys, self.values = (kept[:, :, :length] for kept in self._all)


def _cache(model: PreTrainedModel, room: int) -> Cache:
    if isinstance(model, FastWeightsForCausalLM):
        return FastWeightsCache(model.config)
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _length(model: PreTrainedModel, config: SamplingConfig) -> int:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _LONGEST
    length, limit = config.length or min(context, _LONGEST), last_position(model)
    if limit is not None and length > limit:
        raise FastWeightsError(
            f"length is {length}; this model's absolute positions end at {limit}: give a length up to that"
        )
    return length


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a text begins with: what the tokenizer puts there, else its start token, if any.

    Of models that part documents by one token, such as GPT-2 and the embedded one, this is that token.
    """
    start: int | None = tokenizer.bos_token_id  # type: ignore[assignment]
    return first_tokens(tokenizer) or ([] if start is None else [start])


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a document. A start token does, too: some models know no other end."""
    return sorted(end_tokens(model) | ({tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}))  # type: ignore[arg-type]


def _warp(config: SamplingConfig) -> LogitsProcessorList:
    steps = LogitsProcessorList()
    if config.temperature != 1:
        steps.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k is not None:
        steps.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1:
        steps.append(TopPLogitsWarper(config.top_p))
    return steps
