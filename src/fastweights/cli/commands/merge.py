"""`fastweights merge`"""

from pathlib import Path

from fastweights.cli.console import say
from fastweights.settings.conversion import KeptDtype
from fastweights.settings.weights import Weights


def merge(
    adapter: str,
    output: Path,
    *,
    base: str | None = None,
    window: int | None = None,
    wide_window: int | None = None,
    window_dtype: KeptDtype | None = None,
    state_dtype: KeptDtype | None = None,
    softmax_dtype: KeptDtype | None = None,
    weights: Weights | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter and its base model as one model, which needs neither any more.

    Parameters
    ----------
    adapter
        Folder of an adapter with fast weights, or "smollm2".
    output
        Folder for the model.
    base
        Model that the adapter was trained on; by default where the adapter says.
    window
        Another window than the adapter's: a longer one takes more memory and keeps more, without any training.
    wide_window
        The same for the layers that have a longer window than the others: 1,024 tokens in smollm2.
    window_dtype
        Keep the windows' keys and values in another form: "int8", a quarter of the memory, or "auto", as the model's.
    state_dtype
        The same of the fast weights that are kept from token to token; "auto" is float32.
    softmax_dtype
        The same of keys and values in layers that keep their softmax attention.
    weights
        Save matrices as "bf16", "int8" or "int4", for inference: the model is then loaded so.
    overwrite
        Replace the model that is in that folder.
    """
    from fastweights.files import check_output_folder, only_run, save_model
    from fastweights.models.adapters import load_adapter
    from fastweights.models.loading import check_apart, load_tokenizer
    from fastweights.models.names import as_argument
    from fastweights.models.quantisation import quantise

    for source in (adapter, *([] if base is None else [base])):
        check_apart(source, output)
    check_output_folder(output, overwrite=overwrite)
    model = load_adapter(
        adapter,
        base,
        window=window,
        wide_window=wide_window,
        window_dtype=window_dtype,
        state_dtype=state_dtype,
        softmax_dtype=softmax_dtype,
    )
    tokenizer = load_tokenizer(base or adapter)
    model = quantise(model, weights or "fp32")
    with only_run(output):
        check_output_folder(output, overwrite=overwrite)  # another may have written to it by now
        save_model(model, tokenizer, output)
    say(f"{output}: {model.num_parameters():,} parameters; next: fastweights generate {as_argument(output)}")
