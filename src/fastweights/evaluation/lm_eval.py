"""Our models in lm-eval (EleutherAI's evaluation harness), under the name "fastweights".

lm-eval cuts a document that it reads whole (`loglikelihood_rolling`: wikitext, pile) into windows, of which each knows
only one token of the one before. A model that reads without end has no such windows: here it reads a document as one
stream, at constant memory. All else is lm-eval's own class for models of transformers.

Whoever imports this file needs lm-eval, which then knows the model; lm-eval looks for no models in other packages, so
its command line is that of `fastweights/lm_eval.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm

from fastweights.errors import FastWeightsError, check_name
from fastweights.layers.quantised import FEW
from fastweights.models.loading import load_model, load_tokenizer, on_device
from fastweights.reading.stream import PIECE, Stream, last_position, reads_without_end

try:
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise FastWeightsError(
        f"lm-eval, or what it needs ({error.name}), is not installed: pip install 'fastweights[lm-eval]'"
    ) from error

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float, Int
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
    from torch import Tensor

LONGEST = 16384
"""Tokens that a model without end reads of a request by default: more than tasks ask for that are not about length.

It has no limit of its own, but lm-eval keeps the logits of all tokens of a request (3 GB here for a vocabulary of
49,152), and tries out automatic batch sizes for generation at full length.
"""
DTYPES = ("float32", "bfloat16", "float16")
_OF_LM_EVAL = (
    "add_bos_token",
    "batch_size",
    "chat_template_args",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "max_length",
    "mixed_precision_dtype",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)


@register_model("fastweights")
class FastWeightsLM(HFLM):
    """A causal language model, converted or not, as lm-eval asks for one.

    Args:
        pretrained: a `save_pretrained` folder, an adapter's, a .gguf file, a hub name, "embedded", "smollm2" or
            "smollm2-base".
        tokenizer: where the tokenizer is, if not with the model.
        weights: "bf16", "int8" or "int4" to keep the matrices so.
        dtype: of the weights: "float32", "bfloat16" or "float16".
        device: by default a GPU where there is one.
        trust_remote_code: taken, as lm-eval's option of that name gives it to every model, and of no effect: no code
            that comes with a model is ever run.
        **kwargs: for lm-eval's class, such as `batch_size` and `max_length`.

    Raises:
        FastWeightsError: there is no such model, argument or device, or `max_length` is beyond the model's absolute
            positions.
    """

    def __init__(
        self,
        pretrained: str | Path,
        *,
        tokenizer: str | Path | None = None,
        weights: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        for name in kwargs:  # which lm-eval's class would ignore for a model that is loaded already
            check_name("argument", name, ("pretrained", "tokenizer", "weights", "dtype", "device", *_OF_LM_EVAL))
        check_name("dtype", dtype, DTYPES)
        model = load_model(pretrained, dtype=getattr(torch, dtype), weights=weights)
        limit, given = last_position(model), kwargs.get("max_length")
        if limit is not None and given is not None and given > limit:
            raise FastWeightsError(
                f"max_length is {given}; this model's absolute positions end at {limit}: give a max_length up to that"
            )
        tokens = load_tokenizer(tokenizer or pretrained)
        model = on_device(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        super().__init__(pretrained=model, backend="causal", tokenizer=tokens, **kwargs)
        self.pretrained = str(pretrained)

    @property
    def max_length(self) -> int:
        """Tokens of a request that are read, the last ones of those that are longer.

        As given; else where the positions of the model end, or of the one that it was converted from. Without end, at
        least `LONGEST`.
        """
        usual = super().max_length
        return usual if self._max_length or not reads_without_end(self.model) else max(usual, LONGEST)

    def _model_call(self, inps: Int[Tensor, "B T"], *_: Any, **__: Any) -> Float[Tensor, "B T V"]:
        """Logits of requests with padding after them, which no token before it sees.

        Matrices in few bits are multiplied by few tokens with other roundings than by many, and how few there are would
        depend on the batch.
        """
        missing = max(0, FEW + 1 - inps.numel())
        return super()._model_call(pad(inps, (0, missing)))[:, : inps.shape[1]]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each document, read as one stream by models without end, and by others in windows.

        Args:
            requests: a text each.
            disable_tqdm: whether to show no progress.

        Returns:
            One number for each text: of all its tokens, after the prefix that lm-eval puts before them.
        """
        if not reads_without_end(self.model):
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        found = []
        for request in tqdm(requests, disable=disable_tqdm or self.rank != 0, desc="Reading documents"):
            (text,) = request.args
            found.append(self._stream_loglikelihood(self.tok_encode(text)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    @torch.no_grad()
    def _stream_loglikelihood(self, tokens: list[int]) -> float:
        stream, total = Stream(self.model, PIECE), 0.0
        ids = torch.tensor([self.prefix_token_id, *tokens], device=self.device)
        for start in range(0, len(tokens), PIECE):
            read, targets = ids[:-1][start : start + PIECE], ids[1:][start : start + PIECE]
            with torch.autocast(
                self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
            ):
                logits = stream.read(read[None])[0]
            total -= cross_entropy(logits.float(), targets, reduction="none").double().sum().item()
        return total
