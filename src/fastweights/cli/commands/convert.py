"""`fastweights convert`"""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from fastweights.cli.console import say
from fastweights.settings.conversion import ConversionConfig


def convert(
    source: str,
    output: Path,
    config: Annotated[ConversionConfig, Parameter(name="*")] = ConversionConfig(),  # noqa: B008 (frozen)
    *,
    overwrite: bool = False,
) -> None:
    """Replace a model's softmax attention by fast weights; train the result before use.

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
    from fastweights.models import convert as run
    from fastweights.models.loading import check_apart, load_tokenizer

    check_apart(source, output)
    check_output_folder(output, overwrite=overwrite)
    tokenizer, model = load_tokenizer(source), run(source, config)
    with only_run(output):
        check_output_folder(output, overwrite=overwrite)  # another may have written to it by now
        save_model(model, tokenizer, output)
    new = sum(model.get_parameter(name).numel() for name in model.new_parameter_names())
    say(
        f"{output}: {len(model.fast_attentions())} of {model.config.num_hidden_layers} layers converted, "
        f"{model.num_parameters():,} parameters, {new:,} of them new; next: fastweights train --model {output}"
    )
