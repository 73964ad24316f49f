"""A progress bar for transformers' Trainer that says loss, speed and time left."""

from __future__ import annotations

import math

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """One line that moves on a terminal; in a log file, one line per tenth of the run."""

    def __init__(self, title: str, tokens_per_step: int) -> None:
        self.title = title
        self.tokens_per_step = tokens_per_step
        self.console = Console(stderr=True)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.progress = Progress(
            TextColumn(f"{self.title:<24}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (state.is_world_process_zero and self.console.is_terminal),
        )
        self.task = self.progress.add_task(self.title, total=state.max_steps, completed=state.global_step, note="")
        self.progress.start()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" not in (logs or {}):
            return
        rate = self.tokens_per_step * (self.progress.tasks[0].speed or math.nan)
        speed = f", {rate:,.0f} tokens/s" if math.isfinite(rate) else ""
        note = f"loss {logs['loss']:.4f}{speed}"  # type: ignore[index]
        self.progress.update(self.task, note=note)
        tenth = max(1, state.max_steps // 10 // args.logging_steps * args.logging_steps)
        if self.progress.disable and state.is_world_process_zero and state.global_step % tenth == 0:
            self.console.print(f"{self.title}: step {state.global_step} of {state.max_steps}, {note}", soft_wrap=True)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.progress.stop()
