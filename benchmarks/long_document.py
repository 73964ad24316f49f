"""A document of ten million bytes, read as a stream: peak memory after each part of it.

    python -m benchmarks.long_document [--model FOLDER] [--file TEXT]

Without a model, a small random one does: a hybrid of fast weights and an exact window, with a Fast Weight Layer; peak
memory does not depend on what weights say. Without a file, the standard library's sources do, as one document.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common import write_csv
from fastweights.data import load_documents, tokenize
from fastweights.embedded import byte_tokenizer
from fastweights.environment import environment
from fastweights.evaluation.peak_memory import PeakMemory
from fastweights.evaluation.perplexity import score
from fastweights.models import add_fast_weight_layer, convert, load_model
from fastweights.models.loading import load_tokenizer
from fastweights.settings.conversion import ConversionConfig
from fastweights.settings.evaluation import EvaluationConfig
from fastweights.settings.text import DataConfig

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--bytes", type=int, default=10_000_000)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/long_document.csv"))
    arguments = parser.parse_args()
    model, tokenizer = _small_model(), byte_tokenizer()
    if arguments.model:
        model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    text = arguments.file.read_text() if arguments.file else "".join(load_documents(DataConfig()))
    while len(text.encode()) < arguments.bytes:
        text += text
    document = tokenize([text.encode()[: arguments.bytes].decode(errors="ignore")], tokenizer)
    del text
    steps = [arguments.bytes // 100, *(arguments.bytes * i // 10 for i in range(1, 11))]
    rows, read, loss, start = [], 0, 0.0, time.perf_counter()
    with PeakMemory(model.device) as peak:
        for positions, losses in score(model, document, config=EvaluationConfig(context="stream")):
            read, loss = int(positions[-1]) + 1, loss + losses.sum().item()
            if steps and (read >= steps[0] or read == len(document.tokens)):
                steps.pop(0)
                peak.update()
                rows.append(
                    {
                        "tokens": read,
                        "peak_MB": "" if peak.bytes is None else round(peak.bytes / 1e6, 1),
                        "tokens_a_second": round(read / (time.perf_counter() - start)),
                        "loss": round(loss / read, 4),
                    }
                )
                console.print(rows[-1])
                write_csv(arguments.output, rows, environment())


def _small_model():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_embd=64, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256)
    base = GPT2LMHeadModel(config).eval()
    model = add_fast_weight_layer(convert(base, ConversionConfig(window=32, positions="drop")))
    assert model.fast_weight_layer is not None
    torch.nn.init.constant_(model.fast_weight_layer.output_scale, 0.1)
    return model.eval()


if __name__ == "__main__":
    main()
