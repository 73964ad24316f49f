"""lm-eval scores our models as they are: alike at every batch size, with whole documents as one stream."""

from __future__ import annotations

import json

import pytest
import torch

from fastweights.errors import FastWeightsError
from fastweights.layers.quantised import FEW
from fastweights.models import convert
from fastweights.models.loading import load_model, load_tokenizer
from fastweights.settings.conversion import ConversionConfig
from tests.conftest import make_gpt2, make_llama
from tests.models.test_fast_weight_layer import trained
from tests.tolerances import BFLOAT16

pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed", exc_type=ImportError)

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from fastweights.evaluation import lm_eval as ours
from fastweights.evaluation.lm_eval import LONGEST, FastWeightsLM

CLOSE = {"rel": 1e-5, "abs": 1e-3}
"""Sums of a hundred log-probabilities in float32."""
PREFIX = 256
"""What lm-eval puts before a document: the tokenizer's end of text."""
QUESTIONS = [
    {"question": "word" * i, "choices": ["a", " bc" * i, f" {i}{i + 1}, and so on"], "right": i % 3}
    for i in range(1, 7)
]
DOCUMENTS = ["The ship is Tom. " * 9, "short", "x = [1, 2, 3]\n" * 12]
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "documents": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
        ],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> TaskManager:
    """A task of multiple choice and one of whole documents, each as lm-eval reads them from a folder."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {"choice": QUESTIONS, "documents": [{"text": text} for text in DOCUMENTS]}
    for name, settings in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows[name]))
        source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test", **settings}
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # which is YAML, too
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, endless_folder, model_folder):
    """Models of each kind that lm-eval is to treat in its own way."""
    made = {
        "with positions": convert(make_gpt2(), ConversionConfig(window=8)),
        "softmax in a layer": convert(make_llama(), ConversionConfig(layers="0,2")),
        "with a Fast Weight Layer": trained(make_llama()),
    }
    found = {"endless": endless_folder, "unconverted": model_folder}
    for name, model in made.items():
        found[name] = tmp_path_factory.mktemp("model")
        model.save_pretrained(found[name])
        load_tokenizer(model_folder).save_pretrained(found[name])
    return found


def evaluated(tasks: TaskManager, model: str, folder, batch_size: int, **arguments) -> tuple[dict, list, list]:
    """Results, scores of each choice, and log-likelihoods of the documents."""
    if model == "hf":
        arguments["trust_remote_code"] = True
    out = simple_evaluate(
        model=model,
        model_args={"pretrained": str(folder), **arguments},
        tasks=["choice", "documents"],
        task_manager=tasks,
        batch_size=batch_size,
        device="cpu",
        bootstrap_iters=0,
    )
    samples = {name: sorted(out["samples"][name], key=lambda sample: sample["doc_id"]) for name in TASKS}
    choices = [[response[0][0] for response in sample["resps"]] for sample in samples["choice"]]
    return out["results"], choices, [sample["resps"][0][0] for sample in samples["documents"]]


@torch.no_grad()
def by_hand(model, context: list[int], continuation: list[int]) -> float:
    """Log-probability, in one forward pass."""
    ids = torch.tensor([context + continuation])
    scores = model(ids[:, :-1]).logits[0, len(context) - 1 :].double().log_softmax(-1)
    return scores.gather(1, torch.tensor(continuation)[:, None]).sum().item()


def choices_by_hand(folder, **arguments) -> list[list[float]]:
    """Of every choice of every question, after a space."""
    model, tokenizer = load_model(folder, **arguments), load_tokenizer(folder)
    scores = []
    for question in QUESTIONS:
        context = tokenizer.encode(question["question"])
        scores.append([by_hand(model, context, tokenizer.encode(f" {choice}")) for choice in question["choices"]])
    return scores


def documents_by_hand(folder, texts: list[str] = DOCUMENTS) -> list[float]:
    """Of every document, whole."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    return [by_hand(model, [PREFIX], tokenizer.encode(text)) for text in texts]


def flat(scores: list[list[float]]) -> list[float]:
    return [score for row in scores for score in row]


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]


def rolling(model: HFLM, texts: list[str] = DOCUMENTS) -> list[float]:
    return model.loglikelihood_rolling(requests("loglikelihood_rolling", *[(text,) for text in texts]))


def test_a_task_has_the_same_scores_at_every_batch_size_and_by_hand(tasks, endless_folder, monkeypatch):
    monkeypatch.setattr(ours, "PIECE", 32)
    one, eight = (evaluated(tasks, "fastweights", endless_folder, size) for size in (1, 8))
    expected = choices_by_hand(endless_folder)
    for results, choices, documents in (one, eight):
        for found, true in zip(choices, expected, strict=True):
            assert found == pytest.approx(true, **CLOSE)
        assert documents == pytest.approx(documents_by_hand(endless_folder), **CLOSE)
        right = [
            max(range(3), key=scores.__getitem__) == q["right"] for scores, q in zip(expected, QUESTIONS, strict=True)
        ]
        assert results["choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
        bits = -sum(documents) / torch.log(torch.tensor(2.0)).item() / sum(map(len, DOCUMENTS))
        assert results["documents"]["bits_per_byte,none"] == pytest.approx(bits)


def test_lm_evals_own_class_takes_a_saved_folder(tasks, endless_folder):
    """Its scores of requests are the same; documents it cuts into windows of 128 tokens, as the base model has them."""
    one, eight = (evaluated(tasks, "hf", endless_folder, size) for size in (1, 8))
    for found in (one, eight):
        for scores, true in zip(found[1], choices_by_hand(endless_folder), strict=True):
            assert scores == pytest.approx(true, **CLOSE)
    assert one[2] == pytest.approx(eight[2], **CLOSE)
    whole = documents_by_hand(endless_folder)
    longer = [len(text) > 128 for text in DOCUMENTS]
    assert longer == [True, False, True]
    for cut, true, long in zip(one[2], whole, longer, strict=True):
        assert (abs(cut - true) > 0.1) == long


@pytest.mark.parametrize("name", ["endless", "with a Fast Weight Layer"])
@pytest.mark.parametrize("piece", [1, 50, 1000])
def test_a_document_is_one_stream(folders, name, piece, monkeypatch):
    monkeypatch.setattr(ours, "PIECE", piece)
    texts = [*DOCUMENTS, ""] if piece > 1 else DOCUMENTS[1:2]
    model = FastWeightsLM(folders[name], device="cpu", max_length=64)
    whole = [by_hand(model.model, [PREFIX], model.tok_encode(text)) if text else 0.0 for text in texts]
    assert rolling(model, texts) == pytest.approx(whole, **CLOSE)


def test_windows_lose_what_a_stream_carries(endless_folder):
    model = FastWeightsLM(endless_folder, device="cpu", max_length=64)
    found = rolling(model)
    windows = HFLM.loglikelihood_rolling(model, requests("loglikelihood_rolling", *[(text,) for text in DOCUMENTS]))
    assert windows[1] == pytest.approx(found[1], **CLOSE)
    assert abs(windows[0] - found[0]) > 0.1


@pytest.mark.parametrize("name", ["with positions", "softmax in a layer", "unconverted"])
def test_models_that_end_somewhere_read_windows(folders, name):
    one, eight = (FastWeightsLM(folders[name], device="cpu", batch_size=size) for size in (1, 8))
    windows = HFLM.loglikelihood_rolling(one, requests("loglikelihood_rolling", *[(text,) for text in DOCUMENTS]))
    assert rolling(one) == windows
    assert rolling(eight) == pytest.approx(windows, **CLOSE)
    assert windows[1:2] == pytest.approx(documents_by_hand(folders[name], DOCUMENTS[1:2]), **CLOSE)


@pytest.mark.parametrize(
    ("name", "given", "length"),
    [
        ("endless", None, LONGEST),
        ("with a Fast Weight Layer", None, LONGEST),
        ("endless", 64, 64),
        ("with positions", None, 128),
        ("with positions", 100, 100),
        ("softmax in a layer", None, 128),
        ("unconverted", None, 128),
    ],
)
def test_the_maximum_length(folders, name, given, length):
    assert FastWeightsLM(folders[name], device="cpu", max_length=given).max_length == length


def test_a_request_beyond_the_base_models_length_is_read_whole(endless_folder):
    context, continuation = (DOCUMENTS[0] * 2).strip(), " The ship"
    model = FastWeightsLM(endless_folder, device="cpu")
    ((score, _),) = model.loglikelihood(requests("loglikelihood", (context, continuation)))
    ids = [model.tok_encode(text) for text in (context, continuation)]
    assert len(ids[0]) > 128
    assert score == pytest.approx(by_hand(model.model, *ids), **CLOSE)


@pytest.mark.parametrize("name", ["endless", "with a Fast Weight Layer"])
def test_what_is_generated_is_the_same_at_every_batch_size(folders, name):
    settings = {"until": ["\n\n"], "max_gen_toks": 8}
    asked = requests("generate_until", *[(text, settings) for text in DOCUMENTS])
    one, eight = (FastWeightsLM(folders[name], device="cpu", batch_size=size) for size in (1, 8))
    assert one.generate_until(asked) == eight.generate_until(asked)


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_matrices_in_few_bits(endless_folder, weights):
    """Also for requests of fewer tokens than whose products have other roundings."""
    pairs = [(question["question"], f" {choice}") for question in QUESTIONS for choice in question["choices"]]
    assert len("".join(pairs[0])) < FEW < len("".join(pairs[-1]))
    models = [FastWeightsLM(endless_folder, device="cpu", weights=weights, batch_size=size) for size in (1, 8)]
    one, eight = ([score for score, _ in model.loglikelihood(requests("loglikelihood", *pairs))] for model in models)
    assert one == pytest.approx(eight, **CLOSE)
    assert one == pytest.approx(flat(choices_by_hand(endless_folder, weights=weights)), rel=BFLOAT16)
    assert one != pytest.approx(flat(choices_by_hand(endless_folder)), **CLOSE)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"wieghts": "int4"}, "argument 'wieghts' is unknown; known are pretrained, tokenizer, weights"),
        ({"weights": "int2"}, "weights 'int2' is unknown"),
        ({"dtype": "auto"}, "dtype 'auto' is unknown; known are float32, bfloat16, float16"),
        ({"max_length": 129}, "max_length is 129; this model's absolute positions end at 128"),
        ({"device": "nowhere"}, "device 'nowhere' cannot be used"),
        ({"pretrained": "./nowhere"}, "./nowhere does not exist"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_is_refused(model_folder, arguments, said):
    with pytest.raises(FastWeightsError) as caught:
        FastWeightsLM(**{"pretrained": model_folder, "device": "cpu", **arguments})
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
