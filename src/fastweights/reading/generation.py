"""Going on with a text: a prompt of any length is read in pieces, and what comes is told as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation import BaseStreamer

from fastweights.reading.stream import PIECE, Stream, check_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Bool, Float, Int
    from torch import Tensor
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

CONTEXT = 64
"""Tokens before a text that matter to how its own are decoded."""
_BYTES_OF_A_CHARACTER = 4


@torch.no_grad()
def read_prompt(
    model: PreTrainedModel,
    ids: Int[Tensor, " n"],
    cache: Cache | None = None,
    *,
    progress: Callable[[int], object] = lambda read: None,
) -> Cache:
    """The state after all but the last token of a prompt, which is read in pieces.

    Args:
        model: any causal LM.
        ids: the prompt, of one token at least.
        cache: state to go on from, which is changed; by default none.
        progress: called after each piece with the number of tokens read so far.
    """
    stream, read = Stream(model, max(1, len(ids) - 1), cache), 0
    for part in ids[:-1].split(PIECE):
        if len(part):
            stream.read(part[None].to(model.device), logits_to_keep=1)
            progress(read := read + len(part))
    return stream.cache


def go_on(
    model: PreTrainedModel, ids: Int[Tensor, " n"], cache: Cache, **arguments
) -> Int[Tensor, " m"] | Int[Tensor, "rows m"]:
    """What a model goes on with after a prompt, all of which but the last token was read.

    Args:
        model: any causal LM.
        ids: the prompt.
        cache: `read_prompt` gives it; it is changed.
        **arguments: of transformers' `generate`.

    Returns:
        The new token ids, without the prompt's; (rows, m) where several `num_return_sequences` are asked for.
    """
    settings = arguments.get("generation_config") or model.generation_config
    beams, returned = (
        arguments.get(name) or getattr(settings, name, None) or 1 for name in ("num_beams", "num_return_sequences")
    )
    if max(beams, returned) > 1:
        cache.batch_repeat_interleave(max(beams, returned))
    inputs = ids[None].to(model.device)
    output = model.generate(  # type: ignore[operator]
        inputs, attention_mask=torch.ones_like(inputs), cache=cache, **arguments
    )
    return output[0, len(ids) :] if returned == 1 else output[:, len(ids) :]


class FiniteLogits(LogitsProcessor):
    """Refuses logits that predict nothing, which sampling and beams would make tokens of."""

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """The logits as they are."""
        check_logits(scores)
        return scores


class Continuation(BaseStreamer, StoppingCriteria):
    """The text of tokens as they come, told as soon as it is certain, and not from the first stop text on.

    It is decoded together with what stands before it, as there are tokenizers that leave out the first space of a text.
    Given to `generate` both as streamer and as stopping criterion.

    Args:
        tokenizer: the model's.
        before: tokens before it, of which the last few matter.
        stop: texts before which it ends, none of them empty.
        write: called with each bit of text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        before: Sequence[int],
        *,
        stop: Sequence[str] = (),
        write: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.tokenizer, self.stop, self.write = tokenizer, stop, write
        self.text = ""
        """What was told."""
        self.stopped = False
        """Whether a stop text came."""
        self._ids = list(before[-CONTEXT:])
        self._told = len(self._ids)
        self._held = ""
        self._prompt_is_next = True

    def put(self, value: Int[Tensor, "*shape"]) -> None:
        """The prompt's tokens, then those that come after; `generate` calls this."""
        if not self._prompt_is_next:
            self.add(value.tolist())
        self._prompt_is_next = False

    def add(self, ids: list[int]) -> None:
        """Go on with these tokens."""
        self._ids += ids
        new = self._decode(self._ids)[len(self._decode(self._ids[: self._told])) :]
        if new.endswith("\ufffd") and len(self._ids) - self._told < _BYTES_OF_A_CHARACTER:
            return  # not all bytes of a character are there
        if new:
            self._ids, self._told = self._ids[self._told :], len(self._ids) - self._told
            self._tell(new)

    def end(self) -> None:
        """No more tokens come; `generate` calls this."""
        rest = self._decode(self._ids)[len(self._decode(self._ids[: self._told])) :]
        self._tell(rest, last=True)

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: object, **kwargs) -> Bool[Tensor, " B"]:
        """Whether to stop."""
        return torch.full((len(input_ids),), self.stopped, device=input_ids.device)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # type: ignore[return-value]

    def _tell(self, new: str, *, last: bool = False) -> None:
        if self.stopped:
            return
        text = self._held + new
        places = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        self.stopped = bool(places)
        certain = min(places, default=len(text) - (0 if last else self._begun(text)))
        self._held = "" if places else text[certain:]
        self.text += text[:certain]
        self.write(text[:certain])

    def _begun(self, text: str) -> int:
        """Characters at the end of a text that may be the beginning of a stop text."""
        longest = min(len(text), max(map(len, self.stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self.stop)), 0)
