"""A tokenizer whose tokens are bytes, in Hugging Face's format; and what it does to a text, forty times as fast."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's byte-level BPE without merges: ids 0 to 255 are the bytes, 256 ends a document."""
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


class ByteIds:
    """Token ids of texts by a tokenizer whose tokens are single bytes.

    Args:
        ids: id of each of the 256 bytes.
        added: what the tokenizer has besides, such as an end token: a text with one of them in it is not for this.
    """

    def __init__(self, ids: list[int], added: list[str]) -> None:
        self.ids, self.added = torch.tensor(ids), added

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> ByteIds | None:
        """Those of a tokenizer, or None where its tokens are more than bytes."""
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or backend.get_vocab_size(with_added_tokens=False) != 256:
            return None
        state = json.loads(backend.to_str())
        model, split, characters = state["model"], state["pre_tokenizer"] or {}, bytes_to_unicode()
        if state["normalizer"] or (split.get("type"), split.get("add_prefix_space")) != ("ByteLevel", False):
            return None
        marks = (model.get(name) for name in ("merges", "continuing_subword_prefix", "end_of_word_suffix"))
        if model["type"] != "BPE" or any(marks) or model["vocab"].keys() != set(characters.values()):
            return None
        ids = [model["vocab"][characters[byte]] for byte in range(256)]
        return ByteIds(ids, [token["content"] for token in state["added_tokens"]])

    def __call__(self, text: str) -> Int[Tensor, " n_bytes"] | None:
        """Ids of the text's UTF-8 bytes; None if the tokenizer would find more than these in it."""
        if not text or any(token in text for token in self.added):
            return None
        return self.ids[torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()]
