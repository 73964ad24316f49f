import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys

import datasets
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastweights.data import load_documents, token_ids, tokenize
from fastweights.embedded import SPLITS, ByteIds, byte_tokenizer, stdlib_documents
from fastweights.errors import FastWeightsError
from fastweights.settings.text import DataConfig
from fastweights.training.blocks import TokenBlocks


def test_splits_of_the_standard_library_share_no_document():
    documents = {split: set(stdlib_documents(split)) for split in SPLITS}
    assert all(documents.values())
    assert not documents["train"] & documents["validation"]
    assert not documents["train"] & documents["test"]
    assert sum(map(len, documents["train"])) > 5_000_000


def test_byte_tokenizer_gives_bytes_back(tokenizer):
    text = "naïve café \n\t\x00 — 漢字 🙂"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_bytes_are_found_without_the_tokenizer_as_by_it(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    texts = [
        "naïve café \n\t\x00 — 漢字 🙂  \r\n",
        "a<|endoftext|>b",
        "".join(map(chr, range(1, 3000))),
        " x ",
        "\ufeff",
    ]
    for of in (tokenizer, AutoTokenizer.from_pretrained(tmp_path), byte_tokenizer()):
        assert ByteIds.of(of) is not None
        text = tokenize(texts, of)
        expected = [[*ids, of.eos_token_id] for ids in token_ids(texts, of)]
        assert text.tokens.tolist() == [id for ids in expected for id in ids]
        assert text.document_lengths == list(map(len, expected))
    assert ByteIds.of(tokenizer)(texts[1]) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": None},
        {"model": {"type": "BPE", "merges": ["a b"]}},
    ],
    ids=["normaliser", "prefix", "no bytes", "merges"],
)
def test_other_tokenizers_are_asked(changes, tokenizer):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"] | changes.pop("model", {})
    if model["merges"]:
        model["vocab"]["ab"] = model["vocab"].pop("Ā")
    other = Tokenizer.from_str(json.dumps(state | changes | {"model": model}))
    assert ByteIds.of(PreTrainedTokenizerFast(tokenizer_object=other)) is None


def test_documents_end_with_the_end_token(tokenizer):
    text = tokenize(["ab", "c"], tokenizer)
    assert text.tokens.tolist() == [97, 98, 256, 99, 256]
    assert text.document_lengths == [3, 2]
    assert text.bytes_and_words(len(text.tokens)) == (3, 2)


def test_documents_begin_as_the_tokenizer_begins_texts(tokenizer):
    mark = ("<|endoftext|>", 256)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{mark[0]} $A", special_tokens=[mark])
    text = tokenize(["ab", "c"], tokenizer)
    assert text.tokens.tolist() == [256, 97, 98, 256, 256, 99, 256]
    assert text.document_lengths == [4, 3]
    assert text.bytes_and_words(len(text.tokens)) == (3, 2)
    blocks = TokenBlocks(text.tokens, 7, text.document_lengths)
    assert blocks[0]["labels"].tolist() == [-100, 97, 98, 256, -100, 99, 256]


def test_what_a_tokenizer_was_last_used_with_changes_nothing(tokenizer):
    whole = tokenize(["ab" * 50, "c"], tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["ab"], truncation=True, max_length=4, padding="max_length")
    assert tokenize(["ab" * 50, "c"], tokenizer).tokens.tolist() == whole.tokens.tolist()


def test_bytes_and_words_of_the_tokens_that_are_read(tokenizer):
    text = tokenize(["漢字 か", "a b c d e f g"], tokenizer)
    assert text.bytes_and_words(11) == (10, 2)
    assert text.bytes_and_words(11 + 7) == (10 + 13 / 2, 2 + 7 / 2)
    assert text.bytes_and_words(1000) == (23, 9)


def test_a_column_of_numbers_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 5}\n{"text": 6}\n')
    with pytest.raises(FastWeightsError, match="holds int and not text, such as 5"):
        load_documents(DataConfig(text=str(tmp_path / "a.jsonl")))


def test_files_whose_rows_have_other_fields_are_refused_in_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "y", "tokens": 3}\n')
    with pytest.raises(FastWeightsError, match=r"rows have not all the same fields; give each 'text' alone$"):
        load_documents(DataConfig(text=str(tmp_path)))


def test_blocks_leave_out_the_rest():
    blocks = TokenBlocks(tokenize_range(11), 4)
    assert [block["input_ids"].tolist() for block in blocks] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_documents_of_a_block_stand_alone():
    blocks = TokenBlocks(tokenize_range(13), 6, [3, 1, 5, 4])
    first, second = blocks
    assert first["input_ids"].tolist() == [0, 1, 2, 3, 4, 5]
    assert first["position_ids"].tolist() == [0, 1, 2, 0, 0, 1]
    assert first["labels"].tolist() == [-100, 1, 2, -100, -100, 5]
    assert second["position_ids"].tolist() == [0, 1, 2, 0, 1, 2]
    assert second["labels"].tolist() == [6, 7, 8, -100, 10, 11]
    assert [blocks.begins_with_a_document(i) for i in range(2)] == [True, False]


def tokenize_range(n):
    import torch

    return torch.arange(n)


ROWS = ["first text\nof two lines", "second"]


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert load_documents(DataConfig(text=str(tmp_path / "a.txt"))) == ["one\n\ntwo\n"]


@pytest.mark.parametrize("name", ["notes[1].txt", "a*.txt", "b?.txt", "one::two.txt"])
def test_names_are_no_patterns(tmp_path, name):
    for other in ("notes1.txt", "ab.txt", "bb.txt"):
        (tmp_path / other).write_text("another text")
    (tmp_path / name).write_text("this text")
    assert load_documents(DataConfig(text=str(tmp_path / name))) == ["this text"]
    for folder in ("notes1", name):
        (tmp_path / "folders" / folder / "more").mkdir(parents=True)
        (tmp_path / "folders" / folder / "more" / "a.txt").write_text(folder)
    assert load_documents(DataConfig(text=str(tmp_path / "folders" / name))) == [name]


@pytest.mark.parametrize("given", [{"text_config": "x"}, {"text_column": "x"}, {"text_config": "x", "text": "a.txt"}])
def test_settings_that_would_do_nothing_are_refused(tmp_path, monkeypatch, given):
    (tmp_path / "a.txt").write_text("some text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FastWeightsError, match="leave it out"):
        load_documents(DataConfig(**given))


def test_compressed_text(tmp_path):
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("packed\n")
    assert load_documents(DataConfig(text=str(tmp_path / "a.txt.gz"))) == ["packed\n"]


def test_jsonl_and_parquet(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": row}) + "\n" for row in ROWS))
    datasets.Dataset.from_dict({"body": ROWS}).to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert load_documents(DataConfig(text=str(tmp_path / name), text_column="body")) == ROWS


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.txt.bz2", "a.txt.xz", "a.jsonl.gz"])
@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_text_is_known_by_what_is_in_it(tmp_path, name, given):
    file, source = tmp_path / name, DataConfig(text=str(tmp_path / name if given == "file" else tmp_path))
    opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(file.suffix, open)
    for text in ("one text", "another "):
        with opened(file, "wt", encoding="utf-8") as out:
            out.write(json.dumps({"text": text}) if "jsonl" in name else text)
        os.utime(file, (1e9, 1e9))
        assert load_documents(source) == [text]


def test_the_cache_of_datasets_is_left_as_it_is(tmp_path, monkeypatch):
    before = set(tmp_path.iterdir())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "a.txt").write_text("text")
    for module in ("datasets.config", "datasets.builder.config"):
        monkeypatch.setattr(f"{module}.HF_DATASETS_CACHE", tmp_path / "cache")
    assert load_documents(DataConfig(text=str(tmp_path / "a.txt"))) == ["text"]
    assert set(tmp_path.iterdir()) - before == {tmp_path / "a.txt", tmp_path / "temporary"}
    assert not list((tmp_path / "temporary").iterdir())


def test_a_home_that_cannot_be_written_to_stops_no_reading(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "in a file"}))
    (tmp_path / "home").write_text("no folder")
    script = f"""
from fastweights.data import DataConfig, load_documents
print(load_documents(DataConfig(text={str(tmp_path / "a.jsonl")!r})), len(load_documents(DataConfig())) > 0)
"""
    homeless = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    homeless |= {"HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=homeless)
    assert (done.stdout.strip(), done.returncode) == ("['in a file'] True", 0), done.stderr


def test_a_text_that_the_hub_cannot_be_asked_for_is_said_in_one_line(monkeypatch):
    def fails(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", fails)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: pytest.fail("that takes a minute"))
    with pytest.raises(FastWeightsError, match="no file or folder corpsu, and the Hugging Face hub cannot be reached"):
        load_documents(DataConfig(text="corpsu"))


def test_folder_with_splits(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text(f"{split} text")
    assert load_documents(DataConfig(text=str(tmp_path), split="test")) == ["test text"]


def test_other_files_of_a_folder_are_no_text(tmp_path):
    """Whether files are named by splits or not."""
    for name in ("train.txt", "test.txt", "more/test.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    for name in ("train.log", "test.csv", "LICENSE", "cover.png", "more/test.html"):
        (tmp_path / name).write_bytes(b"no text \xff\xfe")
    assert sorted(load_documents(DataConfig(text=str(tmp_path), split="test"))) == [
        "text of more/test.txt",
        "text of test.txt",
    ]
    (tmp_path / "train.txt").rename(tmp_path / "a.txt")
    (tmp_path / "test.txt").unlink()
    (tmp_path / "more" / "test.txt").unlink()
    assert load_documents(DataConfig(text=str(tmp_path))) == ["text of train.txt"]


def test_rows_that_are_lines_of_one_text(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row + "\n"}) + "\n" for row in ROWS))
    assert load_documents(DataConfig(text=str(tmp_path / "a.jsonl"), join_rows=True)) == ["\n".join(ROWS) + "\n"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", "", "is empty"),
        ("blank.txt", " \n ", "holds no text"),
        ("a.exe", "x", "suffix that is not read"),
        ("broken.jsonl", "{", "cannot read text"),
        ("a.jsonl", '{"other": "x"}', "no column 'text'"),
    ],
)
def test_bad_files_get_one_line(tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(FastWeightsError, match=expected) as caught:
        load_documents(DataConfig(text=str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_text_shorter_than_a_block(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(FastWeightsError, match="fewer than one block of 1024"):
        TokenBlocks(tokenize(load_documents(DataConfig(text=str(tmp_path / "a.txt"))), tokenizer).tokens, 1024)


def test_a_file_has_one_split(text_file):
    with pytest.raises(FastWeightsError, match="the split 'train' alone"):
        load_documents(DataConfig(text=str(text_file), split="validation"))


def test_unknown_split_names_the_known_ones():
    with pytest.raises(FastWeightsError, match="train, validation, test"):
        load_documents(DataConfig(split="dev"))
