"""What transformers' Trainer tells about its progress: loss, speed, time left and time taken."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from transformers import TrainerCallback

if TYPE_CHECKING:
    from fastweights.progress import Progress


class ProgressBar(TrainerCallback):
    """Shows each step, with the loss and the speed since the last entry of the loss history."""

    def __init__(self, progress: Progress, tokens_per_step: int) -> None:
        self.progress = progress
        self.tokens_per_step = tokens_per_step

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.note = ""
        self.step, self.time = state.global_step, time.perf_counter()
        self.progress(state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.progress(state.global_step, state.max_steps, self.note)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" not in (logs or {}):
            return
        now = time.perf_counter()
        rate = self.tokens_per_step * (state.global_step - self.step) / (now - self.time)
        self.step, self.time = state.global_step, now
        self.note = f"loss {logs['loss']:.4f}, {rate:,.0f} tokens/s"  # type: ignore[index]
        self.progress(state.global_step, state.max_steps, self.note)


class Clock(TrainerCallback):
    """Time that a stage has been trained for; after a resume it goes on from what the loss history says."""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        before = state.log_history[-1].get("seconds", 0.0) if state.log_history else 0.0
        self._start = time.perf_counter() - before

    @property
    def seconds(self) -> float:
        """Up to now."""
        return time.perf_counter() - self._start
