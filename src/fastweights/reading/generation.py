"""Going on with a text: a prompt of any length is read in pieces, and what comes is told as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor, StoppingCriteria
from transformers.generation import BaseStreamer

from fastweights.errors import FastWeightsError
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
    before = 0 if cache is None else cache.get_seq_length()
    stream, read = Stream(model, max(1, before + len(ids) - 1), cache), 0
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
        ids: the prompt, or the end of it.
        cache: `read_prompt` gives it; it is changed, and has then read all but the last of the new tokens.
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
    mask = inputs.new_ones(
        1, cache.get_seq_length() + 1
    )  # of all tokens so far, by which `generate` finds the new ones
    arguments["use_cache"] = True  # a model may say otherwise of itself, and would read on what the cache has read
    output = model.generate(inputs, attention_mask=mask, cache=cache, **arguments)  # type: ignore[operator]
    return output[0, len(ids) :] if returned == 1 else output[:, len(ids) :]


def speak(generate: Callable[..., Tensor], settings: dict[str, Any], told: Continuation, given: int) -> list[int]:
    """The tokens that a model goes on with, told as they come; those of a beam search at its end.

    Args:
        generate: goes on with a prompt, as `go_on` and a memory's `generate` do.
        settings: for transformers' `generate`, repetition_penalty, temperature and num_beams among them.
        told: what tells them.
        given: tokens that `generate` is given.

    Raises:
        FastWeightsError: the model predicts nothing, or nothing can be drawn from what it predicts.
    """
    # Of what was generated alone: a memory does not know the tokens before.
    penalty = RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"], prompt_ignore_length=given)
    arguments = settings | {"repetition_penalty": 1.0, "logits_processor": [FiniteLogits(), penalty]}
    if settings["num_beams"] == 1:
        arguments |= {"streamer": told, "stopping_criteria": [told]}
    try:
        output = generate(**arguments).tolist()
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise FastWeightsError(
            f"no token can be drawn at temperature {settings['temperature']}: divided by so low a temperature the "
            "model's logits are not finite; take 0 for the likeliest token"
        ) from error
    if settings["num_beams"] > 1:
        told.add(output)
        told.end()
    return output


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Those that end what a model says, by its generation_config."""
    ends: int | list[int] | None = model.generation_config.eos_token_id  # type: ignore[union-attr]
    return set(ends) if isinstance(ends, list) else {ends} - {None}  # type: ignore[return-value]


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
        interrupted: asked after each token whether somebody wants no more.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        before: Sequence[int],
        *,
        stop: Sequence[str] = (),
        write: Callable[[str], object] = lambda text: None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.tokenizer, self.stop, self.write, self.interrupted = tokenizer, stop, write, interrupted
        self.text = ""
        """What was told."""
        self.stopped = False
        """Whether a stop text came."""
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}  # no text
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
        self._ids += [token for token in ids if token not in self._special]
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
        return torch.full((len(input_ids),), self.stopped or self.interrupted(), device=input_ids.device)

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
