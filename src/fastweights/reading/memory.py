"""What a model remembers of a text: read it once, at constant memory, and go on from there whenever wanted.

A memory is the fast weights that reading left behind, with the little that goes with them (an exact window's tokens,
the position whose successor is not known yet). Its size does not depend on the length of the text.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from fastweights.errors import FastWeightsError, check_file, check_new_file, reason_of
from fastweights.files import written_whole
from fastweights.layers.attention import UNIT
from fastweights.layers.eight_bits import EightBits
from fastweights.layers.window import KeysAndValues
from fastweights.models.cache import CODES, EXPONENTS, FastWeightsCache, layer_tensors, state_bytes
from fastweights.models.loading import not_finite
from fastweights.models.modeling import FastWeightsForCausalLM
from fastweights.reading.generation import go_on, read_prompt
from fastweights.reading.stream import PIECE, Stream, check_logits, reads_without_end
from fastweights.settings.conversion import ADDED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedModel

FORMAT = "fastweights-memory-7"
_KEYS_TWICE = "fastweights-memory-6"
"""Its windows had keys with their rotary embedding, and behind these without where fast weights are written such."""
_MOST_TOKENS = 2**62


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
    turns: int = 0
    """Of the conversation that the text ends with; 0 for a text that is none."""
    broken: bool = False
    """Whether reading ended by an error, so that the state may be of other tokens than those that were read."""

    def fork(self) -> Memory:
        """A copy that can go on by itself."""
        return replace(self, cache=copy.deepcopy(self.cache))

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

        Raises:
            FastWeightsError: the model's logits are not finite; the memory is of no use from there on.
        """
        stream = Stream(self.model, PIECE, self.cache)
        for piece in pieces:
            for part in piece.split(PIECE):
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
            was, self.broken = self.broken, True
            check_logits(stream.read(ready[None].to(self.model.device), logits_to_keep=1))
            self.broken = was
        self.last_token, self.tokens, self.turns = int(part[-1]), self.tokens + len(part), 0

    def generate(
        self, prompt: Int[Tensor, " n"] | None = None, **arguments
    ) -> Int[Tensor, " m"] | Int[Tensor, "rows m"]:
        """What the model goes on with; the memory stays as it is.

        Args:
            prompt: token ids that come after the text that was read; they are read in pieces.
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
        cache.begin_here()
        return go_on(self.model, ids, read_prompt(self.model, ids, cache), **arguments)

    def save(self, path: str | Path) -> Path:
        """Write the memory, or leave what is at `path` as it was: a file cut off half way never takes its place.

        Args:
            path: of the file, in a folder that exists.

        Returns:
            The path.

        Raises:
            FastWeightsError: the memory is not finite or broken, or there is no writing to that place.
        """
        path = Path(path)
        check_new_file(path, "save the memory elsewhere")
        if self.broken:
            raise FastWeightsError("reading ended by an error, and nothing was saved: go on from an earlier memory")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(self.cache).items()}
        if bad := _not_finite(tensors):
            raise FastWeightsError(f"{bad} of the memory is not finite, and nothing was saved: does the model predict?")
        about = {
            "format": FORMAT,
            "model": fingerprint(self.model),
            "tokens": json.dumps(self.tokens),
            "last_token": json.dumps(self.last_token),
            "turns": json.dumps(self.turns),
        }
        whole = save(tensors, about | {"checksum": _checksum(tensors, about)})
        with written_whole(path) as partial:
            partial.write_bytes(whole)
        return path


def new_memory(model: PreTrainedModel) -> Memory:
    """The memory of a model that has read nothing.

    Args:
        model: one whose state has a constant size: fast weights, or a window of its own, in all layers, and no absolute
            positions.

    Returns:
        A memory of no tokens, which can read.

    Raises:
        FastWeightsError: the model is not such a one.
    """
    if not isinstance(model, FastWeightsForCausalLM) or not reads_without_end(model):
        learns = isinstance(model, FastWeightsForCausalLM) and model.fast_weight_layer is not None
        first = (
            "convert the model that its Fast Weight Layer was put on, and train a layer on that"
            if learns
            else "convert it"
        )
        raise FastWeightsError(
            f"this model's attention keeps all it reads, so it has no memory of constant size: {first} "
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
        FastWeightsError: there is no such file, it is damaged, or another model made it.
    """
    path = Path(path)
    check_file(path, "give a file that `fastweights read MODEL FILE -o MEMORY` made")
    memory = new_memory(model)
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except Exception as error:  # of safetensors, of torch, of the system
        raise FastWeightsError(f"{path} is no whole memory file ({reason_of(error)}): read the text again") from error
    if about.get("format") not in (FORMAT, _KEYS_TWICE):
        raise FastWeightsError(f"{path} is no memory file of this version ({FORMAT}): read the text again")
    checksum = about.pop("checksum", None)
    if checksum != _checksum(tensors, about):
        raise FastWeightsError(f"{path} is damaged (its checksum is another): read the text again")
    if about.get("model") != fingerprint(memory.model):
        raise FastWeightsError(
            f"{path} was made by another model than the one given; a memory is of use to its own model alone: "
            "give that model, or read the text again with this one"
        )
    memory.tokens, memory.last_token, memory.turns = _place_in_text(path, about, model)
    expected = _tensors_after(memory.model, memory.tokens)
    if about["format"] == _KEYS_TWICE:
        for name in (name for name in tensors.keys() & expected.keys() if name.endswith(".keys")):
            tensors[name] = tensors[name][..., : expected[name][0][-1]]
    _check_tensors(path, tensors, expected)
    for i, layer in enumerate(memory.cache.layers):
        prefix = f"{i}."
        own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        # A copy: the file's own pages would change with the file.
        _restore(layer, {name: tensor.to(model.device, copy=True) for name, tensor in own.items()}, model.dtype)
    memory.cache.set_lengths([_tokens_in_cache(memory.tokens)] * len(memory.cache.counting))
    return memory


def _in_eight_bits(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, EightBits]:
    """Those whose codes and exponents are among these, by name."""
    names = [name.removesuffix(CODES) for name in tensors if name.endswith(CODES)]
    return {name: EightBits(tensors[name + CODES], tensors[name + EXPONENTS], dtype) for name in names}


def _not_finite(tensors: dict[str, Tensor]) -> str | None:
    bad = (name for name, x in _in_eight_bits(tensors, torch.float32).items() if not x.is_finite())
    return not_finite(tensors) or next(bad, None)


def _tensors(cache: FastWeightsCache) -> dict[str, Tensor]:
    """All that a cache holds, by the number of the layer and the name in it."""
    return {f"{i}.{name}": x for i, layer in enumerate(cache.layers) for name, x in layer_tensors(layer).items()}


def _tokens_in_cache(tokens: int) -> int:
    return max(0, tokens - 1)  # the last is read with what follows it


def _place_in_text(path: Path, about: dict[str, str], model: PreTrainedModel) -> tuple[int, int | None, int]:
    """How many tokens were read, the last of them, and how many turns they end with."""
    try:
        tokens, last = json.loads(about["tokens"]), json.loads(about["last_token"])
        turns = json.loads(about.get("turns", "0"))
    except (KeyError, ValueError, RecursionError) as error:
        raise FastWeightsError(f"{path} does not say what was read: read the text again") from error
    if type(tokens) is not int or not 0 <= tokens < _MOST_TOKENS:
        raise FastWeightsError(f"{path} is of no number of tokens that can be: read the text again")
    known = last is None if tokens == 0 else type(last) is int and 0 <= last < model.config.vocab_size
    if not known:
        raise FastWeightsError(f"{path} ends with a token that its model does not have: read the text again")
    if type(turns) is not int or not 0 <= turns <= tokens:
        raise FastWeightsError(f"{path} is of no number of turns that can be: read the text again")
    return tokens, last, turns


def _tensors_after(model: FastWeightsForCausalLM, tokens: int) -> dict[str, Any]:
    """What the memory of a text of so many tokens is made of: the shape and type of each tensor."""
    if tokens < 2:
        return {}
    cache = new_memory(model).read([torch.zeros(2, dtype=torch.long)]).cache
    made = {name: ([*tensor.shape], tensor.dtype) for name, tensor in _tensors(cache).items()}
    for i, layer in enumerate(cache.layers):
        for name in ("keys", "values"):
            for part in (name, name + CODES, name + EXPONENTS):
                if f"{i}.{part}" in made:
                    made[f"{i}.{part}"][0][2] = min(_tokens_in_cache(tokens), layer.sliding_window - 1)  # type: ignore[attr-defined]
    return made


def _check_tensors(path: Path, tensors: dict[str, Tensor], expected: dict[str, Any]) -> None:
    if others := sorted(tensors.keys() ^ expected.keys()):
        raise FastWeightsError(f"{path} has not what its model remembers, such as {others[0]}: read the text again")
    for name, tensor in tensors.items():
        if ([*tensor.shape], tensor.dtype) != expected[name]:
            raise FastWeightsError(f"{name} in {path} is not of the shape and type of its model: read the text again")
    if bad := _not_finite(tensors):
        raise FastWeightsError(f"{bad} in {path} is not finite: read the text again")


def _checksum(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    _add(digest, tensors)
    return digest.hexdigest()


def fingerprint(model: PreTrainedModel) -> str:
    """What tells a model from another: its config, and all its weights."""
    digest = hashlib.sha256(type(model).__name__.encode())
    weights = model.state_dict().items()
    _add(digest, {name: x for name, x in weights if not (name.endswith(UNIT) and x.eq(1).all())})
    digest.update(json.dumps(_lasting(model.config.to_dict()), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def digest_of(tensor: Tensor) -> str:
    """What tells a tensor from another."""
    digest = hashlib.sha256()
    _add(digest, {"": tensor})
    return digest.hexdigest()


def _add(digest: hashlib._Hash, tensors: dict[str, Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _lasting(config: dict) -> dict:
    """What of a config says how the model computes, and not where it came from."""
    passing = {"_name_or_path", "base_model", "transformers_version", "dtype", "torch_dtype", "architectures"}
    passing |= {"auto_map", "pad_token_id", "bos_token_id", "eos_token_id"}
    passing |= {"use_cache", "return_dict", "output_hidden_states", "output_attentions"}
    return {
        name: _lasting(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in passing and not (name in ADDED and value == ADDED[name])
    }


def _restore(layer, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    in_bits = _in_eight_bits(tensors, dtype)
    if "state0" in in_bits:
        state = in_bits.pop("state0")._replace(dtype=torch.promote_types(dtype, torch.float32))
        layer.restore_state(state)
        tensors = {name: x for name, x in tensors.items() if not name.startswith("state0")}
    tensors |= {name: x.numbers() for name, x in in_bits.items()}
    for name, tensor in tensors.items():
        if name.startswith("state"):
            layer.put(tensor, int(name.removeprefix("state")))
    if "tail" in tensors:
        layer.put_tail(tensors["tail"])
    if "keys" in tensors:
        layer.update(tensors["keys"], tensors["values"])
    if "sink_keys" in tensors:
        layer.sinks = KeysAndValues(tensors["sink_keys"], tensors["sink_values"])
