"""A step of stage finetune on SmolLM2-135M's shape: all weights or LoRA, in full precision or under bf16 autocast.

    python -m benchmarks.training

Beside the conversion stands the same step of the softmax model in full precision, trained on text alone, without a
teacher. Random weights do: time does not depend on what they say. Each round takes all in turn.

With `--device cuda` all run under bf16 autocast, on batches, and the recurrence in Triton as well as in PyTorch, which
takes many times as long and which `--without-chunked` leaves out; the softmax model is trained with flash attention.
`--compile` compiles what stands around the attention, in all of them. `--profile` then says what a step of the hybrid
with LoRA spends its time on, and where it waits for the GPU.
"""

import argparse
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import time_side_by_side, write_csv
from benchmarks.decode import smollm2_shape
from fastweights.environment import environment
from fastweights.layers.linear import use_onednn
from fastweights.models import convert
from fastweights.models.lora import add_lora
from fastweights.settings.conversion import ConversionConfig
from fastweights.training.next_token import Targets, read_out_loss
from fastweights.training.trainer import compile_around_attention

HYBRID = ConversionConfig(window=128, gate_rank=16)
PURE = ConversionConfig(gate_rank=16)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/training.csv"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a block")
    parser.add_argument("--batch-size", type=int, default=1, help="blocks in a step")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="on a GPU: norms and feed-forward parts, as run.compile")
    parser.add_argument("--without-chunked", action="store_true", help="on a GPU: no recurrence in PyTorch")
    parser.add_argument("--profile", action="store_true", help="operators of a step, and where it waits for the GPU")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    if arguments.profile and arguments.device == "cpu":
        parser().error("--profile says what a step does on a GPU: give --device cuda with it")

    torch.manual_seed(0)
    teacher = smollm2_shape().requires_grad_(False)
    ids = torch.randint(teacher.config.vocab_size, (arguments.batch_size, arguments.tokens), device=arguments.device)
    if ids.is_cuda:
        steps = _on_gpu(teacher, ids, arguments.rank, compiled=arguments.compile)
        if arguments.without_chunked:
            steps = {name: step for name, step in steps.items() if not name.endswith("PyTorch")}
    else:
        steps = _on_cpu(teacher, ids, arguments.rank)
    times = time_side_by_side(steps, arguments.repeats, seconds=300.0)
    rows = [
        {"step": name, "tokens": ids.numel(), "tokens_per_second": 1e3 * ids.numel() / ms["p50"], **ms}
        for name, ms in times.items()
    ]
    _print(rows)
    card = {"gpu": torch.cuda.get_device_name()} if ids.is_cuda else {}
    write_csv(arguments.output, rows, {**environment(), **card})
    Console().print(f"written to {arguments.output}")
    if arguments.profile:
        for name in ("LoRA", "pure, LoRA"):
            profile(name, steps[name])


def _on_cpu(teacher, ids, rank: int) -> dict[str, Callable[[], None]]:
    use_onednn(teacher)
    softmax = smollm2_shape().train()
    use_onednn(softmax)
    all_weights, lora = convert(teacher, HYBRID).requires_grad_(True).train(), convert(teacher, HYBRID).train()
    add_lora(lora, rank)
    return {
        "softmax, text alone, fp32": _step(softmax, None, ids, bf16=False),
        "all weights, fp32": _step(all_weights, teacher, ids, bf16=False),
        "all weights, bf16": _step(all_weights, teacher, ids, bf16=True),
        "LoRA, fp32": _step(lora, teacher, ids, bf16=False),
        "LoRA, bf16": _step(lora, teacher, ids, bf16=True),
    }


def _on_gpu(teacher, ids, rank: int, *, compiled: bool) -> dict[str, Callable[[], None]]:
    configs = {"hybrid": HYBRID, "pure": PURE, "LoRA": HYBRID, "pure, LoRA": PURE}
    models = {name: convert(teacher, config) for name, config in configs.items()}
    softmax = smollm2_shape().train().to(ids.device)
    teacher.to(ids.device)
    for name, model in models.items():
        model.to(ids.device).train()
        if "LoRA" in name:
            add_lora(model, rank)
        else:
            model.requires_grad_(True)
    for model in (teacher, softmax, *models.values()) if compiled else ():
        compile_around_attention(model)
    return {
        "softmax, text alone": _step(softmax, None, ids, bf16=True),
        "hybrid, text alone": _step(models["hybrid"], None, ids, bf16=True),
        "hybrid, text alone, PyTorch": _step(models["hybrid"], None, ids, bf16=True, triton=False),
        "pure, text alone": _step(models["pure"], None, ids, bf16=True),
        "pure, text alone, PyTorch": _step(models["pure"], None, ids, bf16=True, triton=False),
        "all weights": _step(models["hybrid"], teacher, ids, bf16=True),
        "LoRA": _step(models["LoRA"], teacher, ids, bf16=True),
        "pure, LoRA": _step(models["pure, LoRA"], teacher, ids, bf16=True),
    }


def profile(name: str, step: Callable[[], None], rows: int = 30) -> None:
    """Print the operators of a step by their time on the GPU, and each line of code that waits for it."""
    console = Console(soft_wrap=True)
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(wait.filename).name}:{wait.lineno}" for wait in waits if "synchroniz" in str(wait.message)]
    found = ", ".join(f"{place} ({places.count(place)} times)" for place in dict.fromkeys(places))
    console.print(f"{name}: waits for the GPU at {found or 'no line'}")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as record:
        step()
    console.print(record.key_averages().table(sort_by="self_cuda_time_total", row_limit=rows, max_name_column_width=60))


def _step(model, teacher, ids, *, bf16: bool, triton: bool = True) -> Callable[[], None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    device = ids.device.type

    def step() -> None:
        os.environ["FASTWEIGHTS_TRITON"] = str(int(triton))
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            states = head = None
            if teacher is not None:
                head = teacher.get_output_embeddings()
                with torch.no_grad():
                    states = teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            loss = read_out_loss(
                hidden, model.lm_head, Targets(ids, states), teacher_head=head, kl_weight=float(teacher is not None)
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def _print(rows: list[dict]) -> None:
    table = Table(title="a training step")
    for column in ("step", "tokens a second", "ms (p20, p50, p80)", "of plain training"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in rows:
        spread = ", ".join(f"{row[name]:.0f}" for name in ("p20", "p50", "p80"))
        of_plain = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        table.add_row(row["step"], f"{row['tokens_per_second']:.0f}", spread, f"{of_plain:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
