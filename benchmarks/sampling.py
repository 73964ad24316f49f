"""Tokens a second of `sample`, in fp32 and bf16, beside transformers' `generate`, which samples the same distribution.

    python -m benchmarks.sampling MODEL [--length 128] [--batch-sizes 64 128]

Process time of one thread; no document ends early, as `generate` would go on with padding.
"""

from __future__ import annotations

import argparse
import time

import torch

from fastweights import SamplingConfig, load_model
from fastweights.models.loading import load_tokenizer
from fastweights.reading import sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 128])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(arguments.model)
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(arguments.model, dtype=dtype)
        for rows in arguments.batch_sizes:
            config = SamplingConfig(length=arguments.length, batch_size=rows)
            sampler = sampling._Sampler(model, tokenizer, config, ())
            sampler.ends = torch.tensor([], dtype=torch.long)
            start = torch.tensor([sampler.start] * rows)
            length = {"max_new_tokens": arguments.length, "min_new_tokens": arguments.length}
            ways = {
                "sample": lambda sampler=sampler: sampler._batch(0, lambda tokens: None),
                "generate": lambda start=start, model=model, length=length: model.generate(  # type: ignore[operator]
                    start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, pad_token_id=0, **length
                ),
            }
            for name, way in ways.items():
                before = time.process_time()
                way()
                rate = rows * arguments.length / (time.process_time() - before)
                print(f"{name:>8} {str(dtype).removeprefix('torch.')} batch {rows}: {rate:,.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
