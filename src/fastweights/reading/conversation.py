"""A conversation of any length: each turn is read once, and what was said before is known from the state alone."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fastweights.data import first_tokens
from fastweights.errors import FastWeightsError, reason_of
from fastweights.models.cache import state_bytes
from fastweights.reading.generation import CONTEXT, Continuation, end_tokens, go_on, read_prompt, speak
from fastweights.reading.memory import load_memory, new_memory
from fastweights.reading.stream import PIECE, Stream, last_position, reads_without_end
from fastweights.reading.text import tokens_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PLAIN = "{% for m in messages %}{{ m['content'] + ('' if m['role'] == 'user' else '\n') }}{% endfor %}"
"""For tokenizers without a chat template: the model goes on with what is said, as with any text."""
_PLACE = "\ue000"
"""Stands for what was said, and is not known any more: a character that no template cuts off or changes."""


class ChatTemplate:
    """What a tokenizer's chat template puts around a turn, which is all that it is shown.

    Args:
        tokenizer: the model's.
        system: what the first turn is to begin with, where the template has a place for it.

    Raises:
        FastWeightsError: the template cannot be used like this, or takes no system prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.plain = not tokenizer.chat_template
        """Whether the tokenizer has none."""
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.first("a")
        self.next("a")
        if system is not None and _PLACE not in self._rendered([{"role": "system", "content": _PLACE}, _said("a")]):
            raise FastWeightsError(
                "the chat template of this tokenizer has no place for a system prompt: leave it out, or give a model "
                "with another"
            )

    def first(self, said: str) -> str:
        """The text of the first turn, up to where its answer begins."""
        return self._rendered([*self._system, _said(said)])

    def next(self, said: str) -> str:
        """The text between an answer and the next: the end of the one, what is said, and the beginning of the other."""
        before = [_said("a"), {"role": "assistant", "content": _PLACE}]
        return self._around_place(self._rendered([*before, _said(said)]))[1]

    def opening(self) -> str:
        """The text between what is said and its answer."""
        return self._around_place(self._rendered([_said(_PLACE)]))[1]

    def before(self) -> str:
        """The text before what is said first."""
        return self._around_place(self.first(_PLACE))[0]

    def between(self) -> str:
        """The text between an answer and what is said next."""
        return self._around_place(self.next(_PLACE))[0]

    @staticmethod
    def _around_place(text: str) -> tuple[str, str]:
        """The text before and after what was said first."""
        before, place, after = text.partition(_PLACE)
        if not place:
            raise FastWeightsError(
                "the chat template of this tokenizer leaves out what was said, so that no turn can be read by itself: "
                "give a model with another"
            )
        return before, after

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        template = _PLAIN if self.plain else None
        try:
            return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # of jinja, of the template, of what it calls
            without = "leave the system prompt out, or " if self._system else ""
            raise FastWeightsError(
                f"the chat template of this tokenizer takes no such conversation ({reason_of(error)}): {without}give a "
                "model with another"
            ) from error


def _said(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


class Conversation:
    """A model in conversation, at constant memory if it reads without end: no turn is kept but in its state.

    Args:
        model: any causal LM.
        tokenizer: the model's.
        settings: for transformers' `generate`; max_new_tokens, temperature, repetition_penalty and num_beams=1 are
            among them.
        system: what it begins with.

    Raises:
        FastWeightsError: the tokenizer's chat template cannot be used, or takes no system prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: dict[str, Any],
        *,
        system: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.template = ChatTemplate(tokenizer, system)
        self.cache = Stream(model, 1).cache
        self.tokens = self.turns = 0
        """Of the conversation so far, answers included."""
        self.generated, self.seconds = 0, 0.0
        """Tokens of answers, and how long these took."""
        self._last: list[int] = []  # the last token: known, but read only with what follows it
        self._before: list[int] = []  # those before an answer, by which it is decoded
        # A model may not say of itself how the template ends a turn.
        end = tokens_of(self.template.next("a"), tokenizer, inside=True)[:1].tolist()
        self._ends = end_tokens(model) | (set(end) & tokenizer.added_tokens_decoder.keys())

    @torch.no_grad()
    def read(
        self,
        said: str,
        *,
        interrupted: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], object] = lambda read, total: None,
    ) -> None:
        """Read a turn, up to where its answer begins.

        Args:
            said: what is said to the model.
            interrupted: asked before each piece of a long turn but the first whether to leave out the rest.
            progress: called after each piece with the tokens that were read, and their number.

        Raises:
            FastWeightsError: it is no text, or there is no room for it; nothing was read.
        """
        turn = self._turn(said)
        if self._has_ended():  # the template ends it in its own way
            self.tokens, self._last = self.tokens - 1, []
        self.turns += 1
        read = 0
        for piece in turn.split(PIECE):
            if interrupted() and read:
                self._read(tokens_of(self.template.opening(), self.tokenizer, inside=True))
                return
            self._read(piece)
            progress(read := read + len(piece), len(turn))

    @torch.no_grad()
    def answer(
        self, *, write: Callable[[str], object] = lambda text: None, interrupted: Callable[[], bool] = lambda: False
    ) -> str:
        """What the model says to the turn that was read; the next one goes on after it, however it ended.

        Args:
            write: called with each bit of the answer.
            interrupted: asked after each token whether to leave it at that.

        Raises:
            FastWeightsError: the model predicts nothing; the conversation is over then.
        """
        if interrupted():
            return ""
        if reads_without_end(self.model):
            self.cache.begin_here()  # type: ignore[attr-defined]
        told = Continuation(self.tokenizer, self._before, write=write, interrupted=interrupted)
        new = {"max_new_tokens": min(self.settings["max_new_tokens"], self._room())}
        new["eos_token_id"] = sorted(self._ends) or None
        start = time.perf_counter()
        ids = speak(partial(go_on, self.model, torch.tensor(self._last), self.cache), self.settings | new, told, 1)
        self.seconds, self.generated = self.seconds + time.perf_counter() - start, self.generated + len(ids)
        self.tokens, self._last = self.tokens + len(ids), ids[-1:]
        return told.text

    def size(self) -> int:
        """Bytes of the state."""
        return state_bytes(self.cache)

    def save(self, path: str | Path) -> Path:
        """Write what the model remembers of the conversation to a file, as a memory.

        Args:
            path: of the file, in a folder that exists.

        Returns:
            The path.

        Raises:
            FastWeightsError: the model's state has no constant size, or there is no writing to that place.
        """
        last = self._last[0] if self._last else None
        state = {"cache": self.cache, "tokens": self.tokens, "last_token": last, "turns": self.turns}
        return replace(new_memory(self.model), **state).save(path)

    def load(self, path: str | Path) -> None:
        """Go on from a memory, of a conversation or of a text, in the place of what was said so far.

        Args:
            path: of the file.

        Raises:
            FastWeightsError: there is no such memory of this model; all is as it was.
        """
        memory = load_memory(self.model, path)
        self.cache, self.tokens, self.turns = memory.cache, memory.tokens, memory.turns
        self._last = [] if memory.last_token is None else [memory.last_token]

    def _has_ended(self) -> bool:
        """Whether the last token of all says that the answer ends with it."""
        return bool(self.turns and self._last and self._last[0] in self._ends)

    def _room(self) -> float:
        """Tokens for which there are positions."""
        limit = last_position(self.model)
        return float("inf") if limit is None else limit + 1 - self.tokens  # the last token is not read

    def _turn(self, said: str) -> Int[Tensor, " n"]:
        """The tokens of a turn."""
        try:
            said.encode()
        except UnicodeError as error:
            raise FastWeightsError(f"this is no UTF-8 text ({error}): say it in other characters") from error
        text = self.template.next(said) if self.turns else self.template.first(said)
        ids = tokens_of(text, self.tokenizer, inside=self.tokens > 0)
        if self.template.plain and not self.tokens:
            ids = torch.cat((torch.tensor(first_tokens(self.tokenizer), dtype=torch.long), ids))
        if self._room() + self._has_ended() <= len(ids):
            raise FastWeightsError(
                f"the conversation has {self.tokens} tokens, this turn {len(ids)}, and this model's absolute positions "
                f"end at {last_position(self.model)}: say less, begin anew, or take a model that was converted with "
                "--positions drop"
            )
        return ids

    def _read(self, ids: Int[Tensor, " n"]) -> None:
        self.tokens += len(ids)
        ids = torch.cat((torch.tensor(self._last, dtype=torch.long), ids))
        self.cache, self._last = read_prompt(self.model, ids, self.cache), ids[-1:].tolist()
        self._before = ids[-CONTEXT:].tolist()
