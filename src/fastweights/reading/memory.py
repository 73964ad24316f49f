"""What a model remembers of a text: read it once, at constant memory, and go on from there whenever wanted.

A memory is the fast weights that reading left behind, with the little that goes with them (an exact window's tokens,
the position whose successor is not known yet). Its size does not depend on the length of the text.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastweights.errors import FastWeightsError, check_file, check_new_file, reason_of
from fastweights.models.cache import FastWeightsCache, layer_tensors, state_bytes
from fastweights.models.modeling import FastWeightsForCausalLM
from fastweights.reading.stream import Stream, reads_without_end

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedModel

FORMAT = "fastweights-memory-3"
_PIECE = 1024


@dataclass
class Memory:
    """What a model remembers of a text: its state after `tokens` tokens, of one size whatever their number."""

    model: FastWeightsForCausalLM
    """That made the memory, and alone can use it."""
    cache: FastWeightsCache
    """Its state."""
    tokens: int
    """Tokens that were read."""
    last_token: int | None
    """The last token of the text: known, but read only with what follows it, as its prediction is wanted then."""

    def fork(self) -> Memory:
        """A copy that can go on by itself."""
        return Memory(self.model, copy.deepcopy(self.cache), self.tokens, self.last_token)

    def size(self) -> int:
        """Bytes of the state."""
        return state_bytes(self.cache)

    def read(self, pieces: Iterable[Int[Tensor, " _"]], *, progress: Callable[[int], None] | None = None) -> Memory:
        """Read on, at constant cost per token.

        Args:
            pieces: token ids, in pieces of any size.
            progress: called with the number of tokens of each piece once it is read.

        Returns:
            This memory, which is changed in place.
        """
        stream = Stream(self.model, _PIECE, self.cache)
        for piece in pieces:
            for part in piece.split(_PIECE):
                if len(part):
                    self._read(stream, part)
                    if progress is not None:
                        progress(len(part))
        return self

    @torch.no_grad()
    def _read(self, stream: Stream, part: Int[Tensor, " n"]) -> None:
        before = part.new_tensor([] if self.last_token is None else [self.last_token])
        ready = torch.cat((before, part[:-1]))
        if len(ready):
            stream.read(ready[None].to(self.model.device), logits_to_keep=1)
        self.last_token, self.tokens = int(part[-1]), self.tokens + len(part)

    @torch.no_grad()
    def generate(self, prompt: Int[Tensor, " n"] | None = None, **arguments) -> Int[Tensor, " m"]:
        """What the model goes on with; the memory stays as it is.

        Args:
            prompt: token ids that come after the text that was read.
            **arguments: of transformers' `generate`.

        Returns:
            The new token ids, without the prompt's; (rows, m) where several `num_return_sequences` are asked for.

        Raises:
            FastWeightsError: nothing was read and there is no prompt.
        """
        parts = [] if self.last_token is None else [torch.tensor([self.last_token])]
        ids = torch.cat([*parts, torch.tensor([], dtype=torch.long) if prompt is None else prompt.cpu()])
        if not len(ids):
            raise FastWeightsError("there is nothing to go on from: the memory is empty, and so is the prompt")
        cache = copy.deepcopy(self.cache)
        settings = arguments.get("generation_config") or self.model.generation_config
        beams, returned = (
            arguments.get(name) or getattr(settings, name, None) or 1 for name in ("num_beams", "num_return_sequences")
        )
        rows = max(beams, returned)
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        cache.begin_here()
        inputs = ids[None].to(self.model.device)
        output = self.model.generate(  # type: ignore[operator]
            inputs, attention_mask=torch.ones_like(inputs), cache=cache, **arguments
        )
        return output[0, len(ids) :] if returned == 1 else output[:, len(ids) :]

    def save(self, path: str | Path) -> Path:
        """Write the memory, or leave what is at `path` as it was: a file cut off half way never takes its place.

        Args:
            path: of the file, in a folder that exists.

        Returns:
            The path.

        Raises:
            FastWeightsError: the memory is not finite, or there is no writing to that place.
        """
        path = Path(path)
        tensors = {
            f"{i}.{name}": tensor.detach().cpu().contiguous()
            for i, layer in enumerate(self.cache.layers)
            for name, tensor in layer_tensors(layer).items()
            if tensor.numel()
        }
        about = {
            "format": FORMAT,
            "model": fingerprint(self.model),
            "tokens": str(self.tokens),
            "last_token": json.dumps(self.last_token),
            "lengths": json.dumps(self.cache.lengths()),
        }
        if bad := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
            raise FastWeightsError(f"{bad} of the memory is not finite, and nothing was saved: does the model predict?")
        check_new_file(path, "save the memory elsewhere")
        handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".partial", dir=path.parent)
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata=about)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())  # a temporary file is its maker's alone
            os.replace(temporary, path)
        except BaseException as error:
            Path(temporary).unlink(missing_ok=True)
            if isinstance(error, OSError | SafetensorError):
                raise FastWeightsError(f"cannot save the memory to {path}: {reason_of(error)}") from error
            raise
        return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def new_memory(model: PreTrainedModel) -> Memory:
    """The memory of a model that has read nothing.

    Args:
        model: one whose state has a constant size: fast weights in all layers, and no absolute positions.

    Returns:
        A memory of no tokens, which can read.

    Raises:
        FastWeightsError: the model is not such a one.
    """
    if not isinstance(model, FastWeightsForCausalLM) or not reads_without_end(model):
        raise FastWeightsError(
            "this model's attention keeps all it reads, so it has no memory of constant size: convert it "
            '(with positions="drop" where its positions are absolute)'
        )
    return Memory(model, FastWeightsCache(model.config), 0, None)


def load_memory(model: PreTrainedModel, path: str | Path) -> Memory:
    """The memory in a file that this same model made.

    Args:
        model: that made it; its weights and its config must be the same, wherever it was loaded from.
        path: of the file.

    Returns:
        The memory, as it was saved.

    Raises:
        FastWeightsError: there is no such file, it is not whole, or another model made it.
    """
    path = Path(path)
    check_file(path, "give a file that `fastweights read MODEL FILE -o MEMORY` made")
    memory = new_memory(model)
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError) as error:
        raise FastWeightsError(f"{path} is no whole memory file ({error}): read the text again") from error
    if about.get("format") != FORMAT:
        raise FastWeightsError(f"{path} is no memory file of this version ({FORMAT}): read the text again")
    if about["model"] != fingerprint(memory.model):
        raise FastWeightsError(
            f"{path} was made by another model than the one given; a memory is of use to its own model alone: "
            "give that model, or read the text again with this one"
        )
    for i, layer in enumerate(memory.cache.layers):
        prefix = f"{i}."
        own = {name.removeprefix(prefix): x.to(model.device) for name, x in tensors.items() if name.startswith(prefix)}
        _restore(layer, own)
    memory.cache.set_lengths(json.loads(about["lengths"]))
    memory.tokens, memory.last_token = int(about["tokens"]), json.loads(about["last_token"])
    return memory


def fingerprint(model: PreTrainedModel) -> str:
    """What tells a model from another: its config, and all its weights."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat.numpy().tobytes())
    digest.update(json.dumps(_lasting(model.config.to_dict()), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _lasting(config: dict) -> dict:
    """What of a config says how the model computes, and not where it came from."""
    passing = {"_name_or_path", "base_model", "transformers_version", "dtype", "torch_dtype", "architectures"}
    passing |= {"pad_token_id", "bos_token_id", "eos_token_id"}
    passing |= {"use_cache", "return_dict", "output_hidden_states", "output_attentions"}
    return {
        name: _lasting(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in passing
    }


def _restore(layer, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if name.startswith("state"):
            layer.put(tensor, int(name.removeprefix("state")))
    if "keys" in tensors:
        layer.update(tensors["keys"], tensors["values"])
    if "real" in tensors:
        layer.real = tensors["real"]
