"""The demo's two pictures."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from fastweights.timing import DecodeCost

_COLORS = {"teacher": "#444444", "pure": "#d1495b", "hybrid": "#00798c"}
_STAGES = {
    "transfer": "transfer: error of attention outputs\nrelative to their variance",
    "finetune": "finetune: divergence from the teacher\n(nats per token)",
}


def plot_training(folders: dict[str, Path], tokens_per_step: dict[str, int], output: Path) -> None:
    """Training loss of both stages against tokens, one line per model.

    Args:
        folders: a training run's output folder per model name.
        tokens_per_step: of each model.
        output: PNG file to write.
    """
    figure, panels = _figure(2, width=10)
    for panel, (stage, label) in zip(panels, _STAGES.items(), strict=True):
        for name, folder in folders.items():
            history = json.loads((folder / stage / "trainer_state.json").read_text())["log_history"]
            points = [
                (entry["step"] * tokens_per_step[name] / 1000, entry["loss"]) for entry in history if "loss" in entry
            ]
            tokens, losses = zip(*points, strict=True) if points else ((), ())
            panel.plot(tokens, losses, color=_COLORS[name], label=name, marker="o", markersize=3)
        _label(panel, x="tokens (thousands)", y=label)
        panel.set_yscale("log")
    _save(figure, output)


def plot_decoding(costs: dict[str, list[DecodeCost]], trained_length: int, output: Path) -> None:
    """Time per token and state size against context, one line per model.

    Args:
        trained_length: context beyond which the teacher is timed only.
        output: PNG file to write.
    """
    figure, panels = _figure(2, width=10)
    for name, points in costs.items():
        contexts = [cost.context for cost in points]
        style = {"color": _COLORS[name], "label": name, "marker": "o", "markersize": 4}
        panels[0].plot(contexts, [cost.ms_per_token for cost in points], **style)
        panels[1].plot(contexts, [cost.state_bytes / 1e6 for cost in points], **style)
    for panel, label in zip(panels, ("time per token (ms)", "state between tokens (MB)"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.axvline(trained_length, color="#bbbbbb", linestyle=":", label="trained length")
        ticks = [cost.context for cost in next(iter(costs.values()))]
        panel.set_xticks(ticks, [f"{tick // 1024}k" if tick >= 1024 else str(tick) for tick in ticks])
        _label(panel, x="context (tokens)", y=label)
    _save(figure, output)


def _figure(panels: int, width: float):
    # matplotlib is imported here and without pyplot: it is slow to start, and a figure of its own needs no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4), layout="constrained")
    return figure, figure.subplots(1, panels)


def _label(panel: Axes, x: str, y: str) -> None:
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.grid(alpha=0.25, which="both")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)


def _save(figure, output: Path) -> None:
    figure.savefig(output, dpi=120)
