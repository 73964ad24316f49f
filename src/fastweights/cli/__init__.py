"""The command line: `fastweights COMMAND`; one file per command."""

from __future__ import annotations

import logging
import os
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Annotated

import wrapt
from cyclopts import App, ArgumentCollection, CycloptsError, Parameter
from cyclopts.config import Dict
from rich.console import Console
from rich.text import Text

from fastweights import __version__
from fastweights.cli.commands import (
    chat,
    compare,
    convert,
    demo,
    evaluate,
    generate,
    merge,
    pretrain,
    read,
    sample,
    train,
)
from fastweights.cli.console import note, printable, use_utf8
from fastweights.cli.options import SHOW_ALL, declare_options, take_whole_numbers
from fastweights.errors import FastWeightsError, check_file


class Recipe:
    """A TOML file whose keys are the options of the command that is run.

    cyclopts' own flat files leave out keys that are names of commands, such as train's section [convert].

    Args:
        path: of the file.

    Raises:
        FastWeightsError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        check_file(path, "give the TOML file of a recipe")
        self.path = path
        try:
            self.settings = tomllib.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FastWeightsError(f"{path} is no TOML file that can be read: {error}") from error

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        if commands:
            Dict({commands[0]: self.settings}, source=str(self.path))(app, commands, arguments)


COMMANDS = {
    "pretrain": pretrain.pretrain,
    "convert": convert.convert,
    "merge": merge.merge,
    "train": train.train,
    "compare": compare.compare,
    "eval": evaluate.evaluate,
    "generate": generate.generate,
    "read": read.read,
    "chat": chat.chat,
    "sample": sample.sample,
    "demo": demo.demo,
}


def make_app(*, show_all: bool = False) -> App:
    """The command line.

    Args:
        show_all: have help list every option, also the less common ones.
    """
    declare_options(show_all=show_all)
    app = App(
        name="fastweights",
        help="Language models that remember in fast weights: constant-memory generation from pretrained transformers.",
        help_epilogue=f"Less common options: docs/cli.md, or {SHOW_ALL}=1 fastweights COMMAND --help.",
        version=__version__,
        help_format="plaintext",
        error_formatter=lambda error: _error_line(error),
        error_console=Console(stderr=True, soft_wrap=True),
        default_parameter=Parameter(negative=()),
        suppress_keyboard_interrupt=False,
    )
    for name, command in COMMANDS.items():
        take_whole_numbers(command)
        app.command(command, name=name)
    app.register_install_completion_command(help="Complete commands and options in your shell.")
    app.meta.group_parameters = app.group_parameters
    app.meta.suppress_keyboard_interrupt = False

    @app.meta.default
    def run(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[Path | None, Parameter(name="--config")] = None,
    ) -> None:
        """Run a command.

        Parameters
        ----------
        config
            TOML recipe whose keys are the command's options; options on the command line come before it.
        """
        app.config = () if config is None else Recipe(config)
        app(tokens)

    return app


# What a command that is interrupted leaves behind.
_LEFT: dict[str, str] = dict.fromkeys(
    ("train", "compare", "pretrain", "sample"), "what was saved stays, and --resume goes on from there"
)
_LEFT["demo"] = "what was saved stays, and the next demo starts anew with --overwrite"
_LEFT["chat"] = "what /save has written stays"

TRACEBACK = "FASTWEIGHTS_TRACEBACK"
"""Environment variable that, set to anything, shows where in the code an error comes from that nobody had foreseen."""

_OUT_OF_MEMORY = "OutOfMemoryError"  # torch's, which not every command imports


def main() -> None:
    """Entry point: an error is one line, without a traceback."""
    use_utf8()
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    _quiet_libraries()
    try:
        make_app(show_all=SHOW_ALL in os.environ).meta(sys.argv[1:])
    except KeyboardInterrupt:
        command = next((token for token in sys.argv[1:] if token in COMMANDS), "")
        note(f"stopped; {_LEFT.get(command, 'nothing new was saved')}")
        sys.exit(130)
    except BrokenPipeError:  # whoever reads our output has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if TRACEBACK in os.environ and not isinstance(error, FastWeightsError | OSError):
            raise
        Console(stderr=True, soft_wrap=True).print(_error_line(error), highlight=False)
        sys.exit(1)


def _error_line(error: Exception) -> Text:
    said = printable(" ".join(str(error).split()))
    if isinstance(error, OSError) and not isinstance(error, FastWeightsError):
        said = f"the system refused: {said}"
    elif type(error).__name__ == _OUT_OF_MEMORY:
        said = f"the GPU has too little memory ({said.split('. ')[0]}): take a smaller batch_size or block_size"
    elif not isinstance(error, FastWeightsError | CycloptsError):
        said = f"{type(error).__name__}: {said} (we had not foreseen this; {TRACEBACK}=1 shows where it comes from)"
    return Text("error: ", style="bold red", end="").append(said, style="not bold default")


def _without_bar(module: ModuleType) -> None:
    module.tqdm = lambda iterable, **_: iterable  # type: ignore[attr-defined]


def _quiet_libraries() -> None:
    """Warnings and bars of the libraries below are for their callers, not for our users."""
    for module in ("transformers.utils.logging", "datasets.utils.logging", "huggingface_hub.utils.logging"):
        wrapt.register_post_import_hook(lambda logging: logging.set_verbosity_error(), module)
    wrapt.register_post_import_hook(lambda logging: logging.disable_progress_bar(), "transformers.utils.logging")
    wrapt.register_post_import_hook(lambda bars: bars.disable_progress_bars(), "datasets.utils.tqdm")
    # A bar that cannot be switched off.
    wrapt.register_post_import_hook(_without_bar, "transformers.modeling_gguf_pytorch_utils")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of its cache, where the home folder takes none
