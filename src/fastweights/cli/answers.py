"""What `fastweights generate` says to a prompt."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fastweights.data import first_tokens
from fastweights.errors import FastWeightsError
from fastweights.progress import BYTES, Progress
from fastweights.reading.generation import CONTEXT, Continuation, end_tokens, go_on, read_prompt, speak
from fastweights.reading.memory import new_memory
from fastweights.reading.stream import last_position, reads_without_end
from fastweights.reading.text import tokens_in_pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastweights.reading.memory import Memory

_SIZE = 2**13


@dataclass(frozen=True)
class Answer:
    """What came after a prompt."""

    text: str
    tokens: int
    seconds: float
    """Reading the prompt included."""
    stop: str
    """ "end" of the text, "length", or "stop": a stop text came."""


@dataclass(frozen=True)
class Speaker:
    """A model that goes on with prompts, which it reads in pieces: at constant memory if it reads without end."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    memory: Memory | None
    """Of a text that prompts go on from; it stays as it is."""
    settings: dict[str, Any]
    """For transformers' `generate`."""
    stop: tuple[str, ...]
    """Texts before which to end."""
    write: Callable[[str], object]
    """Called with each bit of the prompt and of what comes after it."""

    def answer(self, prompt: str) -> Answer:
        """Go on with a prompt.

        Raises:
            FastWeightsError: there is nothing to begin with, or no room for it, or the model predicts nothing.
        """
        start = time.perf_counter()
        generate, tail, given = self._read(prompt)
        self.write(prompt)  # not before, as what reading says of itself would stand in the same line
        told = Continuation(self.tokenizer, tail, stop=self.stop, write=self.write)
        output = speak(generate, self.settings, told, given)
        stop = "stop" if told.stopped else "end" if output[-1] in end_tokens(self.model) else "length"
        return Answer(told.text, len(output), time.perf_counter() - start, stop)

    def _read(self, prompt: str) -> tuple[Callable[..., Tensor], list[int], int]:
        """What goes on from the prompt; its last tokens; how many of its tokens `generate` is given."""
        size = len(prompt.encode())
        with Progress("reading the prompt", unit=BYTES, quick=True) as progress:
            if reads_without_end(self.model):
                return self._read_in_pieces(prompt, size, progress)
            pieces = [ids for ids, _ in self._pieces(prompt)]
            if not pieces:
                raise FastWeightsError(
                    "the prompt is empty and this model has no token to begin with: give --prompt TEXT"
                )
            ids = torch.cat(pieces)
            self._check_room(len(ids))
            cache = read_prompt(self.model, ids, progress=lambda read: progress(size * read // len(ids), size))
        return partial(go_on, self.model, ids, cache), ids[-CONTEXT:].tolist(), len(ids)

    def _read_in_pieces(
        self, prompt: str, total: int, progress: Progress
    ) -> tuple[Callable[..., Tensor], list[int], int]:
        memory = new_memory(self.model) if self.memory is None else self.memory.fork()
        tail, done = [] if memory.last_token is None else [memory.last_token], 0
        for ids, size in self._pieces(prompt):
            memory.read([ids])
            tail, done = [*tail, *ids[-CONTEXT:].tolist()][-CONTEXT:], done + size
            progress(done, total)
        return memory.generate, tail, 1

    def _pieces(self, prompt: str) -> Iterator[tuple[Int[Tensor, " n"], int]]:
        """(token ids, bytes) of a prompt, a start token first where no text came before."""
        last = None if self.memory is None else self.memory.last_token
        start = first_tokens(self.tokenizer)
        if not start and not prompt and self.tokenizer.bos_token_id is not None:
            start = [self.tokenizer.bos_token_id]
        if last is None and start:
            yield torch.tensor(start), 0
        chunks = (prompt[i : i + _SIZE] for i in range(0, len(prompt), _SIZE))
        inside = last not in (None, self.tokenizer.eos_token_id)
        for text, ids in tokens_in_pieces(chunks, self.tokenizer, inside=inside):
            yield ids, len(text.encode())

    def _check_room(self, prompt: int) -> None:
        limit, new = last_position(self.model), self.settings["max_new_tokens"]
        if limit is not None and prompt + new > limit + 1:  # the last token is not read
            raise FastWeightsError(
                f"the prompt has {prompt} tokens, max_new_tokens is {new}, and this model's absolute positions end at "
                f"{limit}: take fewer, or a model that was converted with --positions drop"
            )
