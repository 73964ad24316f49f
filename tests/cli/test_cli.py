import json
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fastweights.cli import Recipe, main, make_app
from fastweights.evaluation.parts import PARTS

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
COMMANDS = ("pretrain", "convert", "train", "compare", "eval", "generate", "read", "chat", "demo")


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["fastweights", *map(str, arguments)])
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_each_option_is(monkeypatch, capsys, command):
    code, out, _ = run(monkeypatch, capsys, command, "--help")
    assert code == 0
    assert "Usage: fastweights" in out
    assert "--config" in out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_all_that_a_recipe_says_arrives(recipe):
    """Sections, too, that are called like a command: [convert]."""
    command = recipe.stem.split("-")[0] if recipe.stem.startswith(("pretrain", "compare")) else "train"
    config = asdict(parsed(command, recipe=recipe)["config"])
    said = tomllib.loads(recipe.read_text())
    assert flat(said).items() <= flat(config).items()


def parsed(*tokens, recipe: Path | None = None) -> dict:
    app = make_app()
    app.config = () if recipe is None else (Recipe(recipe),)
    _, bound, _ = app.parse_args([str(token) for token in tokens], print_error=False, exit_on_error=False)
    return bound.arguments


def flat(settings: dict, prefix: str = "") -> dict[str, str]:
    items = {}
    for key, value in settings.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: plain(value)}
    return items


def plain(value) -> str:
    return str(list(value) if isinstance(value, tuple) else value)


def test_the_road(monkeypatch, capsys, model_folder, text_file, tmp_path):
    """Convert, train both stages from a recipe, evaluate, generate."""
    converted, trained = tmp_path / "converted", tmp_path / "trained"
    code, out, err = run(monkeypatch, capsys, "convert", model_folder, converted, "--window", "8")
    assert (code, err) == (0, "")
    assert "3 of 3 layers converted" in out
    assert "until then its windows say all" in out

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"""
        model = "{converted}"
        output = "{trained}"
        [data]
        text = "{text_file}"
        block_size = 32
        [transfer]
        steps = 6
        warmup_steps = 1
        [finetune]
        steps = 6
        warmup_steps = 1
        [evaluation]
        max_tokens = 256
    """)
    code, out, _ = run(monkeypatch, capsys, "--config", recipe, "train")
    assert code == 0
    for stage in ("teacher", "converted", "transfer", "finetune"):
        assert stage in out
    results = {row["stage"]: row for row in json.loads((trained / "results.json").read_text())}
    assert results["finetune"]["tokens"] == 12 * 4 * 32
    assert results["teacher"]["retention"] == 1.0
    assert results["converted"]["retention"] > 0.9
    assert list(results["finetune"]["parts"]) == ["all", *PARTS]
    assert results["transfer"]["parts"] is None
    assert all(part in out for part in PARTS)

    arguments = (
        "--text",
        text_file,
        "--split",
        "train",
        "--block-size",
        "64",
        "--evaluation.max-tokens",
        "256",
        "--json",
    )
    code, out, _ = run(monkeypatch, capsys, "eval", model_folder, trained, *arguments)
    assert code == 0
    assert set(json.loads(out)) == {str(model_folder), str(trained)}

    code, out, _ = run(monkeypatch, capsys, "generate", trained, "--prompt", "99 bottles", "--max-new-tokens", "8")
    assert code == 0
    assert out.startswith("99 bottles")


def test_eval_tells_parts_positions_and_recall(monkeypatch, capsys, model_folder, text_file, tmp_path):
    converted = tmp_path / "converted"
    run(monkeypatch, capsys, "convert", model_folder, converted, "--window", "8")
    what = ("--text", text_file, "--block-size", "64", "--evaluation.max-tokens", "400", "--contexts", "stream")
    what += ("--parts", "--recall", "--recall-test.distances", "40", "64", "--recall-test.repeats", "1", "--divergence")
    code, out, _ = run(monkeypatch, capsys, "eval", converted, *what, "--output", tmp_path / "out")
    assert code == 0
    for table in ("bits/byte", "to 128", "names recalled", "divergence from the original"):
        assert table in out
    assert out.count("fast weights alone") == 4  # methods, positions, recall, divergence
    written = json.loads((tmp_path / "out" / "results.json").read_text())["models"][str(converted)]
    assert [row["method"] for row in written] == ["static", "static", *PARTS]
    losses = {row["method"]: row["evaluation"]["loss"] for row in written}
    # Nothing was trained, and until then the windows say all.
    assert losses["static"] == losses["window alone"] == losses["untrained window"]
    assert len(set(losses.values())) == 3
    diverged = {row["method"]: row["divergence"] for row in written if "divergence" in row}
    assert set(diverged) == {"static", *PARTS[:-1]}
    assert 0 < diverged["static"]["divergence"] == diverged["untrained window"]["divergence"]
    assert diverged["static"]["tokens"] == written[0]["evaluation"]["tokens"]
    for row in written:
        assert [place["stop"] for place in row["by_position"]] == [128, 1024]
        assert [(recall["distance"], recall["documents"]) for recall in row["recall"]] == [(40, 10), (64, 10)]
    code, out, _ = run(monkeypatch, capsys, "eval", converted, *what, "--json", "--teacher", model_folder)
    again = json.loads(out)[str(converted)]
    assert [row["by_position"] for row in again] == [row["by_position"] for row in written]
    assert {row["method"]: row["divergence"] for row in again if "divergence" in row} == diverged
    assert [row["recall"] for row in again] == [row["recall"] for row in written]


def test_eval_tells_what_it_measured_before_a_model_that_it_refuses(
    monkeypatch, capsys, model_folder, text_file, tmp_path
):
    converted = tmp_path / "converted"
    run(monkeypatch, capsys, "convert", model_folder, converted, "--window", "8")
    what = ("--text", text_file, "--block-size", "64", "--evaluation.max-tokens", "200", "--parts")
    code, out, err = run(monkeypatch, capsys, "eval", converted, model_folder, *what, "--output", tmp_path / "out")
    assert code == 1
    assert "no layers with both fast weights and a window" in err.splitlines()[-1]
    assert "fast weights alone" in out
    assert list(json.loads((tmp_path / "out" / "results.json").read_text())["models"]) == [str(converted)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ("--methods", "sgd", "--tune-tokens", "100", "--split", "validation"),
            "step sizes are tuned on split validation",
        ),
        (("--methods", "sgd", "--tune-tokens", "100", "--split", "test+validation"), "tuned on split validation"),
        (("--methods", "rms", "--split", "train"), "rms has sizes from split train"),
    ],
)
def test_dynamic_evaluation_is_not_judged_by_what_it_was_tuned_on(monkeypatch, capsys, model_folder, options, expected):
    code, _, err = run(monkeypatch, capsys, "eval", model_folder, *options)
    assert (code, err.count("\n")) == (1, 1)
    assert expected in err


def test_learning_while_reading(monkeypatch, capsys, model_folder, text_file, tmp_path):
    """Meta-train a Fast Weight Layer on a converted model, compare ways to read, read a text, generate from it."""
    converted, trained, memory = tmp_path / "converted", tmp_path / "trained", tmp_path / "x.memory"
    run(monkeypatch, capsys, "convert", model_folder, converted, "--window", "8", "--positions", "drop")
    settings = ("--meta.steps", "5", "--meta.warmup-steps", "1", "--evaluation.max-tokens", "200")
    text = ("--data.text", text_file, "--data.block-size", "32")
    where = ("--model", converted, "--output", trained)
    code, out, _ = run(monkeypatch, capsys, "train", "--stage", "meta", *where, *text, *settings)
    assert code == 0
    assert "meta, stream" in out
    results = json.loads((trained / "results.json").read_text())
    assert results[1]["tokens"] == 5 * 32

    ways = ("--methods", "static", "fwl", "sgd", "--contexts", "block", "stream", "--output", tmp_path / "eval")
    limits = ("--text", text_file, "--block-size", "64", "--evaluation.max-tokens", "400")
    code, out, _ = run(monkeypatch, capsys, "eval", trained, *limits, *ways)
    assert code == 0
    assert "fwl" in out
    written = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert len(written["models"][str(trained)]) == 6
    assert {file.name for file in (tmp_path / "eval").iterdir()} == {"results.json", "evaluation.png", "gains.png"}

    code, out, _ = run(monkeypatch, capsys, "read", trained, text_file, "-o", memory)
    assert code == 0
    assert "MB" in out
    first = memory.read_bytes()
    prompt = ("--prompt", "99 bottles", "--max-new-tokens", "8", "--memory", memory)
    code, out, _ = run(monkeypatch, capsys, "generate", trained, *prompt)
    assert code == 0
    assert out.startswith("99 bottles")
    code, _, err = run(monkeypatch, capsys, "generate", converted, *prompt)
    assert code == 1
    assert "another model" in err
    code, _, err = run(monkeypatch, capsys, "read", trained, tmp_path / "none.txt", "-o", memory)
    assert code == 1
    assert "does not exist" in err
    assert memory.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("convert", "./nowhere", "out"), "nowhere does not exist"),
        (("convert", "MODEL", "out", "--rule", "deltas"), "rule 'deltas' is unknown; known are decay"),
        (("convert", "MODEL", "out", "--window", "1"), "window is 1"),
        (("train", "--model", "./nowhere"), "nowhere does not exist"),
        (("eval", "./nowhere/model"), "model does not exist"),
        (("generate", "some/where/else"), "some/where/else does not exist"),
        (("generate", "no-such-model"), "there is no folder no-such-model, and the Hugging Face hub"),
        (("generate", "MODEL", "--prompt", "\udcff"), "no UTF-8 text"),
        (("generate", "MODEL", "--device", "nowhere"), "device 'nowhere' cannot be used"),
        (("chat", "MODEL", "--device", "meta"), "device 'meta' cannot be used"),
        (("read", "MODEL", "TEXT", "-o", "x.memory", "--device", "cuda:99"), "device 'cuda:99' cannot be used"),
        (("generate", "MODEL", "--seed", "-1"), "seed is -1; allowed are 0 to 4294967295"),
        (("train", "--run.seed", "99999999999"), "seed is 99999999999"),
        (("train", "--run.adam-beta2", "5"), "adam_beta2 is 5"),
        (("train", "--meta.learning-rate", "inf"), "learning_rate is inf"),
        (
            ("generate", "MODEL", "--prompt", "a", "--max-new-tokens", "4", "--temperature", "1e-45"),
            "no token can be drawn",
        ),
        (("convert", "MODEL", "MODEL"), "own folder"),
        (
            ("train", "--model", "MODEL", "--output", "MODEL", "--data.text", "TEXT", "--overwrite"),
            "which is read: give another folder",
        ),
        (("train", "--model", "MODEL", "--data.text", "binary.txt"), "utf-8"),
        (("train", "--model", "MODEL", "--data.text", "cut.jsonl"), "cut.jsonl"),
        (("read", "MODEL", "."), "output|is a folder"),
        (("read", "MODEL", ".", "-o", "x.memory"), "is a folder"),
        (("eval", "MODEL", "--rms.epsilon", "-1"), "epsilon is -1"),
        (("--config", "binary.txt", "train"), "binary.txt is no TOML file"),
        (("--config", "short.txt", "train"), "short.txt is no TOML file"),
        (("train", "--model", "MODEL", "--data.text", "./nothing.txt"), "does not exist"),
        (
            ("train", "--model", "MODEL", "--stage", "finetune", "--data.text", "TEXT", "--data.block-size", "32"),
            "convert it first",
        ),
        (
            ("train", "--model", "MODEL", "--data.text", "./short.txt", "--data.block-size", "64"),
            "fewer than one block",
        ),
        (("train", "--transfer.steps", "0"), "steps is 0"),
        (("train", "--model", "MODEL", "--data.text", "TEXT", "--held-out", "train"), "trained on"),
        (("train", "--model", "MODEL", "--data.text", "TEXT", "--held-out", "nosuch"), "nosuch"),
        (("train", "--model", "MODEL", "--teacher", "embedded"), "its own teacher"),
        (("train", "--model", "MODEL", "--stage", "meta", "--convert.window", "8"), "has no use for it"),
        (
            (
                "train",
                "--model",
                "MODEL",
                "--data.text",
                "TEXT",
                "--data.block-size",
                "64",
                "--transfer.batch-size",
                "999",
            ),
            "a batch takes 999",
        ),
        (
            ("train", "--model", "MODEL", "--data.text", "TEXT", "--data.block-size", "64", "--output", "short.txt"),
            "is a file",
        ),
        (
            ("train", "--model", "MODEL", "--data.text", "TEXT", "--data.block-size", "64", "--run.report-to", "odd"),
            "report_to is 'odd'",
        ),
        (("convert", "MODEL", "out", "--window", "8", "--layer-types", *["linear_attention"] * 3), "no hybrid_sliding"),
        (("convert", "MODEL", "out", "--gate-bias", "nan", "1"), "finite"),
        (
            ("train", "--model", "MODEL", "--output", "texts/out", "--data.text", "texts", "--overwrite"),
            "lies in, texts",
        ),
        (("train", "--output", "used"), "has a run in it: .* with --resume, .* --overwrite"),
        (("train", "--output", "texts"), "has book.txt in it.*--overwrite"),
        (("train", "--output", "texts", "--resume"), "no run.json"),
        (("train", "--output", "used", "--resume"), "run.json cannot be read"),
        (("train", "--output", "used", "--resume", "--overwrite"), "give one of them"),
        (("pretrain", "--output", "texts"), "has book.txt in it.*--overwrite"),
        (("demo", "--output", "texts"), "has book.txt in it.*--overwrite"),
        (("eval", "MODEL", "--output", "MODEL"), "folder of a model"),
        (("eval", "MODEL", "--output", "used"), "has results.json in it.*--overwrite"),
        (("train", "--run.save-minutes", "nan"), "save_minutes is nan"),
        (("demo", "--contexts", "1024", "256"), "rising order"),
        (("eval", "MODEL", "--text", "TEXT"), "block_size is 1024; this model's absolute positions end at 128"),
        (("eval", "MODEL", "--contexts", "all"), "stream"),
        (("eval", "MODEL", "--text", "TEXT", "--block-size", "64", "--methods", "fwl"), "no Fast Weight Layer"),
        (("train", "--model", "MODEL", "--stage", "meta", "--fast-weight-layer.decay", "odd"), "scalar"),
        (("read", "MODEL", "TEXT", "-o", "x.memory"), "convert it"),
        (("read", "MODEL", "TEXT", "-o", "."), "is a folder"),
        (("eval", "MODEL", "--text", "TEXT", "--block-size", "64", "--methods", "rms"), "is one file"),
        (("eval", "MODEL", "--text", "TEXT", "--output", "short.txt"), "is a file"),
        (("convert", "MODEL", "short.txt/folder"), "short.txt is a file"),
        (("demo", "--output", "short.txt"), "is a file"),
        (("--config", "none.toml", "eval"), "models is empty"),
        (("eval", "MODEL", "--methods", "rms", "--rms.rule", "sgd"), "rms.rule is 'sgd'"),
        (("eval", "MODEL", "--text", "TEXT", "--block-size", "64", "--evaluation.context", "stream"), "contexts"),
        (("eval", "MODEL", "--text", "TEXT", "--block-size", "64", "--parts"), "no layers with both fast weights and"),
        (("eval", "MODEL", "--teacher", "embedded"), "give --parts or --divergence"),
        (("eval", "MODEL", "--text", "TEXT", "--divergence"), "was not converted: name by --teacher"),
        (("eval", "MODEL", "--recall-test.repeats", "3"), "give --recall, too"),
        (("eval", "MODEL", "--recall", "--recall-test.distances", "0"), "distances are"),
        (
            ("eval", "MODEL", "--text", "TEXT", "--block-size", "64", "--recall", "--recall-test.distances", "9"),
            "is 9 and a sentence has 30 tokens",
        ),
        (("train", "--evaluation.parts-tokens", "1"), "parts_tokens is 1"),
        (("generate", "MODEL", "--memory", "x.memory"), "fastweights read"),
        (("generate", "MODEL", "--max-new-tokens", "0"), "given are max_new_tokens 0"),
        (("generate", "MODEL", "--prompt", "text"), "absolute positions end at 128"),
        (("generate", "MODEL", "--temperature", "0.7", "--top-k", "-3"), "top_k -3"),
        (("--config", "missing.toml", "train"), "missing.toml does not exist"),
        (("train", "--no-such-option", "1"), "no-such-option"),
    ],
)
def test_bad_input_gets_one_clear_line(monkeypatch, capsys, model_folder, text_file, tmp_path, arguments, expected):
    import re

    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "none.toml").write_text("models = []")
    for folder, *names in (("texts", "book.txt"), ("used", "run.json", "results.json")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    (tmp_path / "binary.txt").write_bytes(bytes(range(128, 256)))
    (tmp_path / "cut.jsonl").write_text('{"text": "a"}\n{"text": "b')
    known = {"MODEL": str(model_folder), "TEXT": str(text_file)}
    code, _, err = run(monkeypatch, capsys, *[known.get(argument, argument) for argument in arguments])
    assert code in (1, 2)  # 2: the command line itself is wrong
    assert "Traceback" not in err
    assert err.strip().count("\n") == 0
    assert re.search(expected, err), err


@pytest.mark.parametrize(("command", "expected"), [("train", "--resume goes on"), ("convert", "nothing new was saved")])
def test_an_interrupt_is_one_line(monkeypatch, capsys, model_folder, text_file, tmp_path, command, expected):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastweights.models.conversion.convert_beside", interrupted)
    monkeypatch.setattr("fastweights.training.pipeline._Run.begin", interrupted)
    options = {
        "train": (
            "--model",
            model_folder,
            "--data.text",
            text_file,
            "--data.block-size",
            "32",
            "--output",
            tmp_path / "x",
        ),
        "convert": (model_folder, tmp_path / "x"),
    }
    code, _, err = run(monkeypatch, capsys, command, *options[command])
    assert code == 130
    assert err.strip().splitlines()[-1].startswith("stopped; ")
    assert expected in err


def test_a_folder_that_may_not_be_written_is_refused_at_once(monkeypatch, capsys, model_folder, text_file, tmp_path):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    options = ("--text", text_file, "--block-size", "64", "--output", tmp_path / "new")
    code, _, err = run(monkeypatch, capsys, "eval", model_folder, *options)
    assert code == 1
    assert "may not be written to" in err


def test_a_reader_that_has_had_enough(model_folder):
    """As in `fastweights generate ... | head -c 1`."""
    command = [sys.executable, "-m", "fastweights", "generate", str(model_folder), "--max-new-tokens", "20"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 141
    assert "Error" not in err


def test_one_nested_option_leaves_the_other_defaults(monkeypatch):
    """The command line builds nested configs from their classes, so defaults must be those of a class."""
    arguments = parsed("eval", "embedded", "--block-size", 64, "--rms.segment", 16)
    assert arguments["text"].split == "test"
    assert arguments["comparison"].rms.rule == "rms"
    config = parsed("train", "--evaluation.stride", 64, "--finetune.steps", 7)["config"]
    assert config.evaluation.max_tokens == 131072
    assert config.finetune.learning_rate == 3e-4
    assert parsed("train", "--stage", "meta", "--meta.steps", 7)["config"].meta.batch_size == 1
    config = parsed("pretrain", "--short.steps", 100, "--long.batch-size", 2)["config"]
    assert (config.short.batch_size, config.short.schedule) == (8, "constant_with_warmup")
    assert (config.long.steps, config.long.learning_rate) == (300, 2e-3)


def test_the_models_of_eval_may_stand_in_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('models = ["a", "b"]')
    assert parsed("eval", "x", "y", "--block-size", 64)["models"] == ("x", "y")
    assert parsed("eval").get("models", ("embedded",)) == ("embedded",)
    assert parsed("eval", recipe=recipe)["models"] == ("a", "b")


def test_a_command_line_unsays_what_a_recipe_says(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[convert]\nvalue_map = true\nrotary = false\nnormaliser = true\nrule = 'gated'\nfeature_map = 'relu'"
    )
    config = parsed("train", "--convert.no-value-map", "--convert.rotary", "--convert.no-normaliser", recipe=recipe)
    convert = config["config"].convert
    assert (convert.value_map, convert.rotary, convert.normaliser, convert.rule) == (False, True, False, "gated")


def test_lists_and_switches_arrive():
    arguments = parsed("convert", "a", "b", "--layer-types", "linear_attention", "full_attention", "--no-rotary")
    assert arguments["config"].layer_types == ["linear_attention", "full_attention"]
    assert (arguments["config"].rotary, arguments["config"].value_gate) == (False, True)
    assert parsed("train", "--convert.no-value-gate")["config"].convert.value_gate is False
    assert parsed("demo", "--contexts", "256", "1024")["config"].contexts == (256, 1024)
    assert parsed("generate", "embedded", "--prompt", "-")["prompt"] == "-"


def test_nothing_is_overwritten_by_an_error(monkeypatch, capsys, model_folder, tmp_path):
    output = tmp_path / "file"
    output.write_text("mine")
    code, _, err = run(monkeypatch, capsys, "convert", model_folder, output)
    assert (code, output.read_text()) == (1, "mine")
    assert "is a file" in err


def test_eval_writes_over_results_only_if_told(monkeypatch, capsys, model_folder, text_file, tmp_path):
    (tmp_path / "results.json").write_text("mine")
    command = ("eval", model_folder, "--text", text_file, "--block-size", "64", "--evaluation.max-tokens", "200")
    command += ("--output", tmp_path)
    code, _, _ = run(monkeypatch, capsys, *command)
    assert (code, (tmp_path / "results.json").read_text()) == (1, "mine")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        code, out, err = run(monkeypatch, capsys, *command, "--overwrite")
        assert (code, (tmp_path / "results.json").read_text()) == (1, "mine")
        assert "static" in out  # what was found is not lost
        assert "no space left" in err.splitlines()[-1]
    code, _, _ = run(monkeypatch, capsys, *command, "--overwrite")
    assert (code, "static" in (tmp_path / "results.json").read_text()) == (0, True)


def test_a_gpu_that_is_full_is_one_line_with_advice(monkeypatch, capsys, model_folder, text_file):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 74.00 MiB. GPU 0 has 139 GiB")

    monkeypatch.setattr("fastweights.evaluation.comparison.compare", full)
    code, _, err = run(monkeypatch, capsys, "eval", model_folder, "--text", text_file)
    assert code == 1
    assert "the GPU has too little memory (CUDA out of memory): take a smaller batch_size or block_size" in err
