"""`fastweights chat`"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from fastweights.cli.console import Line, note, say
from fastweights.cli.sampling import check_sampling, sampling_settings
from fastweights.errors import FastWeightsError, check_seed
from fastweights.files import check_output_file
from fastweights.progress import Progress
from fastweights.settings.conversion import KeptDtype
from fastweights.settings.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastweights.reading.conversation import Conversation

_PROMPT = "> "
_HISTORY = 1000
"""Lines that the line editor remembers."""
_COMMANDS = {
    "/save FILE": "keep what the model remembers of the conversation",
    "/load FILE": "go on from there, or from what `fastweights read` saved, instead",
    "/stats": "tokens so far, size of the state, time a token",
    "/help": "this; a line that is to begin with / begins with a space",
    "/quit": "end, as Ctrl-D does; Ctrl-C ends an answer",
}


def chat(
    model: str,
    *,
    system: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    max_new_tokens: int = 512,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    weights: Weights | None = None,
    softmax_dtype: KeptDtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Talk to a model; a converted one remembers at constant memory, however long the conversation.

    Each line is a turn, also of a pipe. /help lists what else there is; Ctrl-C ends an answer, Ctrl-D the conversation.

    Parameters
    ----------
    model
        A folder, a .gguf file, a hub name or "embedded"; without a chat template it goes on with what you type as text.
    system
        System prompt that the conversation begins with.
    max_new_tokens
        Tokens of an answer at most.
    temperature
        0 takes the likeliest token, higher values sample; by default as the model's generation_config says, or 0.8 if
        that does not sample.
    top_k
        Tokens to sample from; by default as that says, or 50.
    top_p
        Sample from the likeliest tokens that together have this probability; by default as that says, or 0.95 if it
        does not sample.
    repetition_penalty
        Makes tokens that an answer has less likely; by default as that says, or 1.1 if it does not sample, 1 if it
        does or at temperature 0.
    weights
        Keep matrices as "bf16", "int8" or "int4": less memory, more tokens a second, a little less exact.
    softmax_dtype
        "int8" keeps keys and values of softmax attention in eight bits: a quarter of the memory, and faster steps.
    device
        Where to compute: "cpu", whose steps have kernels of their own, or a GPU, such as "cuda".
    seed
        Seed of sampling.
    """
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
    check_sampling(asked, max_new_tokens=max_new_tokens)
    check_seed(seed)
    typed = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()

    from transformers import set_seed

    from fastweights.models.conversion import load_for_decoding
    from fastweights.models.loading import load_tokenizer, on_device, resolve_model
    from fastweights.reading.conversation import Conversation
    from fastweights.reading.text import STANDARD_INPUT, check_text, text_lines

    check_text(STANDARD_INPUT)
    tokenizer, loaded = load_tokenizer(model), on_device(load_for_decoding(model, weights, softmax_dtype), device)
    settings = sampling_settings(loaded.generation_config, asked, max_new_tokens=max_new_tokens)
    conversation = Conversation(loaded, tokenizer, settings, system=system)
    if conversation.template.plain:
        note(f"{model} has no chat template: the model goes on with each line as text")
    if typed:
        note("/help lists what there is beside talking; Ctrl-C ends an answer, Ctrl-D the conversation")
    set_seed(seed)
    talk = _Talk(conversation, Path(resolve_model(model)))
    for line in _typed() if typed else text_lines(STANDARD_INPUT):
        try:
            if not talk.take(line):
                break
        except KeyboardInterrupt:
            if not typed:
                raise
    if talk.refused and not typed:
        raise FastWeightsError(
            f"lines that were refused: {talk.refused}, each with a line above; the others were answered"
        )


class _Talk:
    """What is done with each line."""

    def __init__(self, conversation: Conversation, source: Path) -> None:
        self.conversation, self.source = conversation, source
        self.refused = 0
        self._files: set[Path] = set()  # memories of this conversation, which may be replaced

    def take(self, line: str) -> bool:
        """Answer a line, or do what it says; False at the end."""
        if not line.strip():
            return True
        with _interrupts() as interrupted:
            try:
                if line.startswith("/"):
                    return self._do(*line.split(maxsplit=1))
                with Progress("reading", unit="tokens", quick=True) as progress:
                    self.conversation.read(line, interrupted=interrupted, progress=progress)
            except (ValueError, OSError) as error:  # names of files may be of all kinds
                note(str(error))
                self.refused += 1
                return True
            printed = Line()
            try:
                self.conversation.answer(write=printed.write, interrupted=interrupted)
            except BaseException:
                printed.end()
                raise
        print(flush=True)
        return True

    def _do(self, command: str, rest: str = "") -> bool:
        known = {line.split()[0]: line for line in _COMMANDS}
        if command not in known:
            raise FastWeightsError(f"there is no {command}; there are {', '.join(_COMMANDS)}")
        takes_file = known[command] != command
        if takes_file != bool(rest.strip()):
            raise FastWeightsError(f"{command} takes {'the name of a' if takes_file else 'no'} file: {known[command]}")
        file = Path(os.path.expanduser(rest.strip()))
        if command == "/save":
            self._save(file)
        elif command == "/load":
            self.conversation.load(file)
            self._files.add(file.resolve())
            say(f"{file} remembers {self.conversation.tokens:,} tokens; the conversation goes on from there")
        elif command == "/stats":
            say(self._stats())
        elif command == "/help":
            say("\n".join(f"{name:<12}{what}" for name, what in _COMMANDS.items()))
        return command != "/quit"

    def _save(self, file: Path) -> None:
        inputs = [self.source] if self.source.exists() else []
        check_output_file(file, overwrite=True, inputs=inputs, advice="give another name")
        if file.exists() and file.resolve() not in self._files:
            raise FastWeightsError(f"{file} exists, and is no memory of this conversation: give another name")
        self.conversation.save(file)
        self._files.add(file.resolve())
        say(f"{file} has {file.stat().st_size / 1e6:.1f} MB")

    def _stats(self) -> str:
        talk = self.conversation
        speed = f", ms a token: {1000 * talk.seconds / talk.generated:.1f}" if talk.generated else ""
        return f"tokens so far: {talk.tokens:,}, turns: {talk.turns:,}, state: {talk.size() / 1e6:.2f} MB{speed}"


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C breaks nothing off, but can be asked for."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # others cannot be told of signals
        yield came.is_set
        return
    before = signal.signal(signal.SIGINT, lambda *_: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _typed() -> Iterator[str]:
    """The lines that are typed at a terminal."""
    readline = None
    with suppress(ImportError):
        import readline
    while True:
        try:
            line = input(_PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        except UnicodeError as error:
            note(f"this is no UTF-8 text ({error})")
            continue
        if readline is not None and readline.get_current_history_length() > _HISTORY:
            readline.remove_history_item(0)
        yield line
