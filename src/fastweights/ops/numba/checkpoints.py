"""Where the CPU kernels keep copies of the state for the backward pass: once every SEGMENT tokens of a sequence.

A packed sequence may start anywhere, so each is left room for one checkpoint more than segments begin in it.

Notation
    T        tokens in a row
    N        sequences: rows or, if `packed`, parts of one row
"""

SEGMENT = 128
"""Tokens between checkpoints."""


def checkpoint_count(N: int, T: int, packed: bool) -> int:
    """Checkpoints of all sequences."""
    return T // SEGMENT + N if packed else N * -(-T // SEGMENT)


def first_checkpoint(n, start, T, packed):
    """The index of the first checkpoint of sequence n, which starts at token `start` of its row."""
    return start // SEGMENT + n if packed else n * -(-T // SEGMENT)
