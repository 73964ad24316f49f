"""`fastweights convert`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from fastweights.cli.console import say
from fastweights.errors import FastWeightsError
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.text import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def convert(
    source: str,
    output: Path,
    config: Annotated[ConversionConfig, Parameter(name="*")] = ConversionConfig(),  # noqa: B008 (frozen)
    *,
    data: DataConfig = DataConfig(),  # noqa: B008 (frozen)
    overwrite: bool = False,
) -> None:
    """Replace a model's softmax attention by fast weights; train the result before use.

    Until then, layers with a window go by that alone, and without one they say nothing of use.

    Parameters
    ----------
    source
        Model to convert: a folder, a .gguf file, a hub name, "embedded" or "smollm2-base".
    output
        Folder for the converted model.
    overwrite
        Replace the model that is in that folder.
    """
    from fastweights.files import check_output_folder, only_run, save_model
    from fastweights.models.conversion import convert_beside, rest_on_windows
    from fastweights.models.loading import check_apart, load_model, load_tokenizer
    from fastweights.models.names import as_argument

    if data != DataConfig() and config.layers_kept is None:
        raise FastWeightsError("data was given, which only layers auto:N read: leave it out")
    check_apart(source, output)
    check_output_folder(output, overwrite=overwrite)
    tokenizer, base = load_tokenizer(source), load_model(source)
    if config.layers_kept is not None:
        config = _choose_layers(base, tokenizer, config, data)
    model = convert_beside(base, config)
    del base
    rests = rest_on_windows(model)
    with only_run(output):
        check_output_folder(output, overwrite=overwrite)  # another may have written to it by now
        save_model(model, tokenizer, output)
    new = sum(model.get_parameter(name).numel() for name in model.new_parameter_names())
    then = f"train --model {as_argument(output)}" if new else f"generate {as_argument(output)}"
    say(
        f"{output}: {len(model.fast_attentions())} of {model.config.num_hidden_layers} layers converted, "
        f"{model.num_parameters():,} parameters, {new:,} of them new; next: fastweights {then}"
        + (", and until then its windows say all" if rests else "")
    )


def _choose_layers(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ConversionConfig, data: DataConfig
) -> ConversionConfig:
    from fastweights.cli.tables import print_layers
    from fastweights.data import load_documents, tokenize
    from fastweights.progress import Progress
    from fastweights.training.blocks import TokenBlocks
    from fastweights.training.layer_choice import choose_layers

    text = tokenize(load_documents(data), tokenizer)
    blocks = TokenBlocks(text.tokens, data.block_size, text.document_lengths)
    with Progress("looking for the layers that are missed most", unit="trials") as progress:
        chosen, worth = choose_layers(base, config, blocks, progress)
    print_layers(worth, chosen)
    return chosen
