"""The pictures that commands draw."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from fastweights.files import written_whole

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from fastweights.evaluation.comparison import MethodResult
    from fastweights.evaluation.cost import DecodeCost
    from fastweights.evaluation.gains import Gain
    from fastweights.training.grid import Row

_COLORS = {"teacher": "#444444", "pure": "#d1495b", "hybrid": "#00798c"}
_COLORS |= {"smollm2-base": "#444444", "smollm2": "#00798c", "smollm2, int4": "#d1495b"}
_METHOD_COLORS = {"static": "#444444", "fwl": "#00798c", "sgd": "#d1495b", "rms": "#edae49"}
_METHOD_COLORS |= {"window alone": "#8d6a9f", "fast weights alone": "#66a182", "untrained window": "#b08968"}
_METHOD_COLORS |= {"teacher": "#999999"}
_MAP_COLORS = ("#00798c", "#d1495b", "#edae49", "#66a182", "#8d6a9f", "#b08968")
_PART_MARKERS = {"window alone": "_", "fast weights alone": "x", "untrained window": "."}
_STAGES = {
    "transfer": "transfer: error of attention outputs\nrelative to their variance",
    "finetune": "finetune: divergence from the teacher\n(nats per token)",
}


def plot_training(folders: dict[str, Path], output: Path) -> None:
    """Training loss of each stage against tokens, one line per model.

    Args:
        folders: a training run's output folder per model name.
        output: PNG file to write.
    """
    stages = [stage for stage in _STAGES if any((folder / stage).is_dir() for folder in folders.values())]
    figure, panels = _figure(len(stages), width=5 * len(stages))
    for panel, stage in zip(panels, stages, strict=True):
        for name, folder in folders.items():
            if not (state := folder / stage / "trainer_state.json").exists():
                continue
            history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
            points = [(entry["num_input_tokens_seen"] / 1000, entry["loss"]) for entry in history if "loss" in entry]
            tokens, losses = zip(*points, strict=True) if points else ((), ())
            panel.plot(tokens, losses, color=_COLORS[name], label=name, marker="o", markersize=3)
        _label(panel, x="tokens (thousands)", y=_STAGES[stage])
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
        style["linestyle"] = "--" if "," in name else "-"  # its state is that of another line
        panels[0].plot(contexts, [cost.ms_per_token for cost in points], **style)
        panels[1].plot(contexts, [cost.state_bytes / 1e6 for cost in points], **style)
    for panel, label in zip(panels, ("time per token (ms)", "state between tokens (MB)"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.axvline(trained_length, color="#bbbbbb", linestyle=":", label="trained length")
        ticks = [cost.context for cost in max(costs.values(), key=len)]
        panel.set_xticks(ticks, [f"{tick // 1024}k" if tick >= 1024 else str(tick) for tick in ticks])
        _label(panel, x="context (tokens)", y=label)
    _save(figure, output)


def plot_comparison(results: list[MethodResult], output: Path) -> None:
    """Bits per byte and cost of each method in each context.

    Args:
        output: PNG file to write.
    """
    figure, panels = _figure(2, width=10)
    names = [result.name for result in results]
    values = (
        ("bits per byte", [result.evaluation.bits_per_byte for result in results], "{:.3f}"),
        ("time, relative to static blocks", [result.time_ratio for result in results], "{:.2f}"),
    )
    for panel, (label, numbers, form) in zip(panels, values, strict=True):
        bars = panel.barh(names, numbers, color=[_METHOD_COLORS[result.method] for result in results])
        panel.bar_label(bars, [form.format(number) for number in numbers], padding=3)
        panel.invert_yaxis()
        panel.set_xlim(0, 1.15 * max(number for number in numbers if number < float("inf")))
        panel.set_xlabel(label)
        panel.spines[["top", "right"]].set_visible(False)
    _save(figure, output)


def plot_gains(gains: dict[str, dict[str, list[Gain]]], methods: dict[str, str], output: Path) -> None:
    """Where each method gains on the static model: one panel for each way to group tokens, one line for each method.

    Args:
        gains: for each way to group, for each row's name, the gain of each group.
        methods: of each row, by its name, for its colour.
        output: PNG file to write.
    """
    styles = {"stream": "--", "sliding": ":"}
    figure, panels = _figure(len(gains), width=5 * len(gains))
    for panel, (grouping, rows) in zip(panels, gains.items(), strict=True):
        for name, points in rows.items():
            style = styles.get(name.rsplit(", ", 1)[-1], "-")
            line = [point.bits for point in points]
            panel.plot(line, style, color=_METHOD_COLORS[methods[name]], label=name, marker="o", markersize=4)
        groups = [point.group for point in next(iter(rows.values()), [])]
        panel.set_xticks(range(len(groups)), groups, rotation=45, ha="right")
        panel.axhline(0, color="#bbbbbb", linewidth=1)
        _label(panel, x=grouping, y="gain over static blocks (bits per token)")
    _save(figure, output)


def plot_grid(rows: list[Row], output: Path) -> None:
    """Retention of each rule with each feature map, one panel for each window, and that of the parts of hybrid models.

    Args:
        rows: of `Grid.ranking`.
        output: PNG file to write.
    """
    rules, maps = list(dict.fromkeys(row.rule for row in rows)), sorted({row.feature_map for row in rows})
    windows = sorted({row.window for row in rows})
    figure, panels = _figure(len(windows), width=max(6, 1.5 * len(rules)) * len(windows))
    thickness = 0.8 / len(maps)
    for panel, window in zip(panels, windows, strict=True):
        places = {}
        for i, feature_map in enumerate(maps):
            mine = [row for row in rows if (row.window, row.feature_map) == (window, feature_map) and row.seeds]
            if not mine:
                continue
            here = [rules.index(row.rule) + thickness * (i - (len(maps) - 1) / 2) for row in mine]
            style = {"color": _MAP_COLORS[i % len(_MAP_COLORS)], "label": feature_map, "error_kw": {"linewidth": 1}}
            panel.bar(
                here,
                [row.parts.get("all", row.retention) for row in mine],
                thickness,
                yerr=[row.retention_spread or 0.0 for row in mine],
                **style,
            )
            places |= dict(zip(here, mine, strict=True))
        for part, marker in _PART_MARKERS.items():
            found = {place: row.parts[part] for place, row in places.items() if part in row.parts}
            if found:
                panel.plot(list(found), list(found.values()), marker, color="#222222", markersize=4, label=part)
        panel.set_xticks(range(len(rules)), rules)
        panel.set_xlim(-0.5, len(rules) - 0.5)
        panel.set_title(f"window of {window}" if window else "no window")
        panel.set_ylim(bottom=0)
        on = ", on the text that parts are read on" if any("all" in row.parts for row in places.values()) else ""
        _label(panel, x="update rule, best first", y=f"retention of perplexity{on}", beside=True)
    _save(figure, output)


def _figure(panels: int, width: float):
    # matplotlib is imported here and without pyplot: it is slow to start, and a figure of its own needs no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _label(panel: Axes, x: str, y: str, *, beside: bool = False) -> None:
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.grid(alpha=0.25, which="both")
    panel.spines[["top", "right"]].set_visible(False)
    if panel.get_legend_handles_labels()[1]:
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if beside else {}
        panel.legend(frameon=False, **place)


def _save(figure, output: Path) -> None:
    with written_whole(output) as partial:
        figure.savefig(partial, format="png", dpi=120)
