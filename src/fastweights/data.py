"""Text -> documents -> tokens -> blocks.

Where text comes from is one string: "stdlib" (embedded: Python's own library), a file (.txt, .jsonl, .parquet, also
compressed), a folder of such files, or the name of a dataset on the Hugging Face hub.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastweights.embedded import ByteIds, stdlib_documents
from fastweights.errors import FastWeightsError, NoSuchSplitError, reason_of
from fastweights.hub import ask_hub, is_hub_name
from fastweights.settings.text import STDLIB, DataConfig

if TYPE_CHECKING:
    import pyarrow as pa
    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_BUILDERS = {".txt": "text", ".text": "text", ".raw": "text", ".md": "text", ".jsonl": "json", ".json": "json"}
_BUILDERS[".parquet"] = "parquet"
_ROWS = 1000
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}


@dataclass(frozen=True)
class TokenizedText:
    """Documents as one run of tokens, each between the start and end tokens that the tokenizer has, if any."""

    tokens: Int[Tensor, " n_tokens"]
    document_lengths: list[int]
    """Tokens in each document, in order; they add up to n_tokens."""
    document_bytes: list[int]
    """UTF-8 bytes of each, for bits per byte."""
    document_words: list[int]
    """Words between white space in each, for word perplexity."""

    def bytes_and_words(self, n_tokens: int) -> tuple[float, float]:
        """Of the first `n_tokens`; a document that they end within counts in proportion."""
        n_bytes = n_words = 0.0
        for length, size, words in zip(self.document_lengths, self.document_bytes, self.document_words, strict=True):
            share = min(1.0, n_tokens / length)
            n_bytes, n_words = n_bytes + share * size, n_words + share * words
            n_tokens -= length
            if n_tokens <= 0:
                break
        return n_bytes, n_words


def load_documents(config: DataConfig) -> list[str]:
    """The texts that `config` names, in order; empty documents are left out.

    Args:
        config: where the text comes from. `block_size` plays no part here.

    Returns:
        One string for each document, or one for all with `join_rows`.

    Raises:
        NoSuchSplitError: the text has no such split.
        FastWeightsError: there is no such text or column, the file is not whole, or it holds no text.
    """
    _check_used(config)
    documents = stdlib_documents(config.split) if config.text == STDLIB else _load_with_datasets(config)
    documents = [text for text in documents if text and not text.isspace()]
    if not documents:
        raise FastWeightsError(f"{config.text} (split {config.split!r}) holds no text: give a file that is not empty")
    return ["".join(documents)] if config.join_rows else documents


def overlap(*splits: str) -> bool:
    """Whether two splits, which may be sums and parts as `datasets` has them, share one of which either has all."""
    first, second = ({part.strip() for part in split.split("+")} for split in splits)
    whole = {part for part in first | second if "[" not in part}
    names = ({part.partition("[")[0] for part in parts} for parts in (first, second))
    return "all" in whole or bool(first & second) or bool(whole & set.intersection(*names))


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> TokenizedText:
    """Token ids of all documents, each between what the tokenizer puts before a text and an end token.

    Args:
        documents: texts, such as `load_documents` gives.
        tokenizer: the model's; one without an end token ends no document, and many put nothing before a text.

    Returns:
        The tokens in one run, and the length in tokens, bytes and words of each document.
    """
    start = torch.tensor(first_tokens(tokenizer), dtype=torch.long)
    end = torch.tensor([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=torch.long)
    ids = _ids_of_bytes(documents, tokenizer) or list(map(torch.tensor, token_ids(documents, tokenizer)))
    return TokenizedText(
        tokens=torch.cat([x.long() for document in ids for x in (start, document, end)]),
        document_lengths=[len(start) + len(document) + len(end) for document in ids],
        document_bytes=[len(text.encode()) for text in documents],
        document_words=[len(text.split()) for text in documents],
    )


def token_ids(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each document, without special tokens."""
    if tokenizer.is_fast:
        # Without the offsets that transformers asks for, this is several times faster.
        backend: Any = tokenizer.backend_tokenizer
        backend.no_truncation()  # what a tokenizer was last used with is saved with it
        backend.no_padding()
        encodings = backend.encode_batch_fast(documents, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
    return tokenizer(documents, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Those that a tokenizer puts before a text, such as a start token."""
    (plain,) = token_ids(["a"], tokenizer)
    marked: list[int] = tokenizer("a")["input_ids"]  # type: ignore[assignment]
    return next((marked[:i] for i in range(len(marked)) if marked[i : i + len(plain)] == plain), [])


def _ids_of_bytes(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> list[Int[Tensor, " _"]] | None:
    """Token ids of each document, if the tokens are bytes: else None."""
    byte_ids = ByteIds.of(tokenizer)
    if byte_ids is None:
        return None
    found = []
    for text in documents:
        ids = byte_ids(text)
        found.append(torch.tensor(token_ids([text], tokenizer)[0], dtype=torch.long) if ids is None else ids)
    return found


def _check_used(config: DataConfig) -> None:
    """Refuse settings that would do nothing."""
    if config.text_config is not None and (config.text == STDLIB or os.path.exists(config.text)):
        raise FastWeightsError(f"text_config was given, but {config.text} is no dataset on the hub: leave it out")
    if config.text == STDLIB and config.text_column != DataConfig.text_column:
        raise FastWeightsError(f"text_column was given, but {STDLIB!r} has no columns: leave it out")


def _load_with_datasets(config: DataConfig) -> list[str]:
    path = config.text
    if os.path.isfile(path):
        rows = _rows_of_files(_builder_of_file(Path(path), config), config, "data_files")
    elif os.path.isdir(path):
        rows = _rows_of_files(_builder_of_folder(Path(path)), config, "data_dir")
    elif _looks_like_a_path(path):
        raise FastWeightsError(f"{path} does not exist: give an existing file or folder, or {STDLIB!r}")
    else:
        rows = _rows_from_hub(config)
    if other := next((row for row in rows if not isinstance(row, str | None)), None):
        raise FastWeightsError(
            f"column {config.text_column!r} of {config.text} holds {type(other).__name__} and not text, such as "
            f"{str(other)[:40]}: name another with text_column"
        )
    return [row or "" for row in rows]


def _looks_like_a_path(text: str) -> bool:
    """Hub names are `name` or `owner/name`, without a suffix that we read."""
    suffixes = set(Path(text).suffixes)
    return text.startswith((".", "~")) or not is_hub_name(text) or bool(suffixes & (_BUILDERS.keys() | _COMPRESSED))


def _builder_of(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED]
    return _BUILDERS.get(suffixes[-1]) if suffixes else None


def _builder_of_file(path: Path, config: DataConfig) -> str:
    builder = _builder_of(path)
    if builder is None:
        allowed = ", ".join(sorted(_BUILDERS))
        raise FastWeightsError(f"{path} has a suffix that is not read; allowed are {allowed} (also compressed)")
    if path.stat().st_size == 0:
        raise FastWeightsError(f"{path} is empty: give a file with text in it")
    if config.split != "train":
        raise NoSuchSplitError(f"{path} is one file and has the split 'train' alone; {config.split!r} was asked for")
    return builder


def _builder_of_folder(path: Path) -> str:
    builders = {_builder_of(file) for file in path.rglob("*") if file.is_file()} - {None}
    if len(builders) != 1:
        found = "no file" if not builders else f"files of several formats ({', '.join(sorted(map(str, builders)))})"
        raise FastWeightsError(f"{path} holds {found} that can be read as text; give files of one format")
    return str(builders.pop())


def _rows_of_files(builder: str, config: DataConfig, argument: str) -> list[Any]:
    """The column of text, read from the files as they are now.

    The cache of `datasets` tells files apart by name, size and time, and is not everywhere to be written to; here it
    stays empty, and goes.
    """
    by_document = {"sample_by": "document"} if builder == "text" else {}
    with tempfile.TemporaryDirectory(prefix="fastweights-") as cache:
        linked = _linked(Path(config.text), Path(cache))
        loaded = _load(builder, config, streaming=True, cache_dir=cache, **{argument: linked}, **by_document)
        try:
            return [row for table in loaded.with_format("arrow").iter(_ROWS) for row in _column(table, config)]
        except FastWeightsError:
            raise
        except Exception as error:
            raise _not_read(config, error) from error


def _not_text(folder: str, names: list[str]) -> list[str]:
    """Files whose suffix is not that of a text, which `datasets` would read as if they were one."""
    return [name for name in names if not Path(folder, name).is_dir() and _builder_of(Path(name)) is None]


def _linked(path: Path, folder: Path) -> str:
    """A name for a file or folder that is no pattern: `datasets` takes notes[1].txt for notes1.txt, a::b for a URL."""
    path, link = path.resolve(), folder / "text"
    if path.is_dir():
        shutil.copytree(path, link, copy_function=os.symlink, ignore=_not_text, ignore_dangling_symlinks=True)
    else:
        link = link.with_suffix("".join(path.suffixes[-2:]))
        link.symlink_to(path)
    return str(link)


def _rows_from_hub(config: DataConfig) -> list[Any]:
    from huggingface_hub import is_offline_mode

    if not is_offline_mode() and (reason := ask_hub(config.text, "dataset").reason):
        raise FastWeightsError(
            f"there is no file or folder {config.text}, and {reason}: give one that exists, {STDLIB!r} or a hub name "
            "(with HF_HUB_OFFLINE=1 what was downloaded earlier is read)"
        )
    return _column(_load(config.text, config, name=config.text_config).with_format("arrow")[:], config)


def _column(table: pa.Table, config: DataConfig) -> list[Any]:
    if config.text_column not in table.column_names:
        columns = ", ".join(table.column_names)
        raise FastWeightsError(f"{config.text} has no column {config.text_column!r}; its columns are {columns}")
    return table[config.text_column].to_pylist()


def _load(builder: str, config: DataConfig, **arguments: Any) -> Any:
    """`datasets.load_dataset`, whose many kinds of failure become one line."""
    import datasets

    try:
        return datasets.load_dataset(builder, split=config.split, **arguments)
    except Exception as error:
        raise _not_read(config, error) from error


def _not_read(config: DataConfig, error: Exception) -> FastWeightsError:
    reason = reason_of(error.__cause__ or error)  # datasets' own line says that there was an error
    if "column names don't match" in str(error.__cause__ or error):  # after many lines
        reason = f"its rows have not all the same fields; give each {config.text_column!r} alone"
    kind = NoSuchSplitError if reason.startswith(("Unknown split", "Bad split")) else FastWeightsError
    return kind(f"cannot read text from {config.text} (split {config.split!r}): {reason}")
