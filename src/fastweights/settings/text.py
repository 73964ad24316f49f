"""Where text comes from, and how it becomes blocks of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from fastweights.errors import FastWeightsError

STDLIB = "stdlib"


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes blocks of tokens."""

    text: str = STDLIB
    """"stdlib" (embedded), a file (.txt, .jsonl, .parquet), a folder of them, or a dataset on the Hugging Face hub."""
    text_config: str | None = None
    """Configuration of a hub dataset, such as "wikitext-2-raw-v1"."""
    text_column: str = "text"
    """Column that holds the text of a .jsonl or .parquet file or of a hub dataset."""
    join_rows: bool = False
    """Rows are consecutive lines of one running text (as in WikiText), not documents of their own."""
    split: str = "train"
    """Split to read. A folder has the splits that its files' names say, else "train" alone, as a file has."""
    block_size: int = 1024
    """Tokens in a block."""

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise FastWeightsError(f"block_size is {self.block_size}; a block needs at least 2 tokens")


@dataclass(frozen=True)
class HeldOutDataConfig(DataConfig):
    """The same, of the split that nothing was trained on."""

    split: str = "test"
    """Split to read; a file has no other than "train", which is all of it."""
