"""When there is a checkpoint, beside those after every so many steps: after some minutes, and before a signal's end."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastweights.training.trainer import StageTrainer


class Saving(TrainerCallback):
    """Has the Trainer save when it is time, and stop once it was told to and has saved.

    Args:
        trainer: whose `may_save` says whether training could go on from here as if it had not been cut off.
        minutes: between checkpoints; 0: there is no such limit.
    """

    def __init__(self, trainer: StageTrainer, minutes: float) -> None:
        self.trainer = trainer
        self.minutes = minutes
        self.told_to_stop = threading.Event()
        self.signal = signal.SIGTERM
        """That told it to."""
        self._wanted = False
        self._saved = time.monotonic()

    @contextmanager
    def until_told(self) -> Iterator[None]:
        """Within the block, SIGTERM and Ctrl-C are noted and not obeyed, but for a Ctrl-C after another signal.

        Threads other than the main one have no say in signals.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: object) -> None:
        if self.told_to_stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        self.told_to_stop.set()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._saved = time.monotonic()
        state.compute_steps(args, state.max_steps)  # how often to save and to log: not as a checkpoint says

    def on_save(self, args, state, control, **kwargs) -> None:
        self._saved = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        late = self.minutes > 0 and time.monotonic() - self._saved >= 60 * self.minutes
        stop, late = self._anywhere(self.told_to_stop.is_set(), late)
        if stop:
            self.told_to_stop.set()
        if state.global_step >= state.max_steps:
            return  # the Trainer saves and stops by itself
        self._wanted |= stop or late or control.should_save
        control.should_save = self._wanted and self.trainer.may_save
        if control.should_save:
            self._wanted = False
            control.should_training_stop = stop

    def _anywhere(self, *flags: bool) -> list[bool]:
        """Whether each holds in any process, as all must save and stop at the same step."""
        mine = torch.tensor([flags], device=self.trainer.args.device)
        return self.trainer.accelerator.gather(mine).any(0).tolist()  # type: ignore[union-attr]
