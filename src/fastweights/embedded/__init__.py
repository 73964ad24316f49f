"""What ships with the package: text that every Python carries, a tokenizer of bytes, a small trained transformer."""

from fastweights.embedded.stdlib import SPLITS, stdlib_documents
from fastweights.embedded.tokenizer import ByteIds, byte_tokenizer

MODEL_NAME = "stdlib-gpt2"

__all__ = ["MODEL_NAME", "SPLITS", "ByteIds", "byte_tokenizer", "stdlib_documents"]
