"""Files as they are: how records are written, in which encoding, and what of them cannot be used."""

import gzip
import json
import re

import pytest

from mamba2_jax.training import DataConfig, load_documents
from mamba2_jax.training.data import json_values

RECORDS = [
    {"text": "one\ntwo"},
    {"text": "three [four], {five} é\u2028\x85."},
    {"prompt": "q. ", "completion": "a \ud83d"},
]
RECORDS[2]["completion"] = "a 😀"
TEXTS = ["one\ntwo<end>", "three [four], {five} é\u2028\x85.<end>", "q. a 😀<end>"]


def lines(records=RECORDS, end="\n", **options) -> str:
    return "".join(json.dumps(record, **options) + end for record in records)


class Characters:
    """Tokenizer of a token per character of the Basic Multilingual Plane, to see every letter of a file."""

    is_fast, chat_template, eos_token_id, added_tokens_decoder = True, None, 0, {}

    def __call__(self, texts, add_special_tokens, **options):
        spans = [[(i, i + 1) for i in range(len(text))] for text in texts]
        return {"input_ids": [[min(ord(c), 60000) for c in text] for text in texts], "offset_mapping": spans}

    def __len__(self):
        return 60001

    class backend_tokenizer:
        to_str = staticmethod(lambda: "characters")


def read(*sources, **options) -> list[str]:
    documents = load_documents(sources, Characters(), DataConfig(**{"max_length": 4096, **options}))
    letters = {0: "<end>", 60000: "😀"}
    return ["".join(letters.get(i, chr(i)) for i in document["input_ids"]) for document in documents]


@pytest.mark.parametrize("block", [7, 1 << 20])
@pytest.mark.parametrize(
    ("name", "content"),
    {
        "lines.jsonl": lines(),
        "crlf.jsonl": lines(end="\r\n"),
        "blank.jsonl": "\n \n" + lines(end="\n\n\n") + "\n",
        "no-end.ndjson": lines().rstrip("\n"),
        "array.json": json.dumps(RECORDS),
        "pretty.json": json.dumps(RECORDS, indent=4),
        "letters.json": json.dumps(RECORDS, indent=1, ensure_ascii=False),
        "array.jsonl": json.dumps(RECORDS) + "\n",
        "array-of-lines.json": "[\n" + lines(end=",\n").rstrip(",\n") + "\n]\n",
        "objects.json": "\n".join(json.dumps(record, indent=2) for record in RECORDS),
        "wrapped.json": json.dumps({"version": "1", "data": RECORDS}, indent=2),
        "mark.jsonl": "\ufeff" + lines(),
        "mark.json": "\ufeff" + json.dumps(RECORDS, indent=2),
    }.items(),
)  # fmt: skip
def test_json_however_it_is_written(name, content, block, tmp_path, monkeypatch):
    monkeypatch.setattr(json_values, "_BLOCK", block)
    (tmp_path / name).write_bytes(content.encode())
    assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_encodings_with_a_byte_order_mark(encoding, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(end="\r\n", ensure_ascii=False).encode(encoding))
    (tmp_path / "b.json").write_bytes(json.dumps(RECORDS, ensure_ascii=False).encode(encoding))
    (tmp_path / "c.csv").write_bytes('text,n\r\n"one\ntwo",1\r\n'.encode(encoding))
    (tmp_path / "d.txt").write_bytes("one\r\né".encode(encoding))
    assert read(tmp_path) == [*TEXTS, *TEXTS, "one\ntwo<end>", "one\né<end>"]


def test_compressed_files_tables_and_folders(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines().encode()))
    (tmp_path / "b.tsv").write_text("prompt\tcompletion\nq. \ta 😀\n", encoding="utf-8")
    long = "x" * 200_000
    (tmp_path / "c.csv").write_text(f",text\n0,{long}\n")  # with an index, as pandas writes it
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "c.jsonl").write_text("no JSON")
    (tmp_path / ".DS_Store").write_bytes(b"\0\1\2")
    assert read(tmp_path, max_length=300_000) == [*TEXTS, TEXTS[2], long + "<end>"]
    (tmp_path / "empty" / "er").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"empty: the folder has no files$"):
        read(tmp_path / "empty")
    (tmp_path / "empty" / "er" / ".hidden.jsonl").write_text(lines())
    with pytest.raises(
        FileNotFoundError, match=r"the folder has no files but 1 hidden ones, which are skipped"
    ):
        read(tmp_path / "empty")


def test_a_large_text_is_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("mamba2_jax.training.data.files._BLOCK", 64)
    text = "".join(f"line {i} é\r\n" for i in range(100))
    (tmp_path / "a.txt").write_bytes(text.encode())
    found = read(tmp_path / "a.txt")
    assert len(found) > 10
    assert "".join(found) == text.replace("\r\n", "\n") + "<end>"
    for whole in (
        "one line\n" * 64,
        "é" * 999,
        "one " * 99,
        "x" * 64,
    ):  # of blocks, and without ends of lines
        (tmp_path / "c.txt").write_text(whole, encoding="utf-8")
        assert "".join(read(tmp_path / "c.txt")) == whole + "<end>"
    (tmp_path / "b.txt").write_bytes(text.encode() + b"\xff")
    with pytest.raises(
        ValueError, match=rf"b.txt: is not UTF-8 \(byte {len(text.encode())}\): the records behind"
    ):
        read(tmp_path / "b.txt")
    assert "".join(read(tmp_path / "b.txt", max_unusable=1)).startswith("line 0 é\nline 1 é")


UNUSABLE = {
    "null.jsonl": ('{"text": null}', "'text' is null"),
    "number.jsonl": ('{"text": 7}', "'text' is a number, not a string"),
    "not-a-number.jsonl": ('{"text": NaN}', "'text' is a number, not a string"),
    "nested.jsonl": ('{"text": ["one"]}', "'text' is a list, not a string"),
    "object.jsonl": ('{"text": {"a": "one"}}', "'text' is an object, not a string"),
    "scalar.jsonl": ("7", "is a number, not an object with fields"),
    "strings.json": ('["one"]', "is a string, not an object with fields"),
    "prompt.jsonl": ('{"prompt": 7, "completion": "x"}', "'prompt' is a number, not a string"),
    "completion.jsonl": ('{"prompt": "x", "completion": null}', "'completion' is null"),
    "mixed.jsonl": ('{"prompt": "x", "completion": [1]}', "'completion' is a list, not a string"),
    "output.jsonl": ('{"instruction": "x", "output": null}', "'output' is null"),
    "instruction.jsonl": ('{"instruction": "x", "output": 1.5}', "'output' is a number, not a string"),
    "surrogate.jsonl": ('{"text": "ab\\ud83d"}', r"holds \ud83d, half of a surrogate pair, at character 2"),
    "rejected.jsonl": ('{"chosen": "x", "rejected": "y"}', "has the fields 'chosen', 'rejected'; wants"),
    "deep.jsonl": ("[" * 100_000, "is not JSON from there on"),
    "zeros.txt": ("o\0n\0e\0", "has zero bytes where text begins: UTF-16 or UTF-32 without a"),
    "x.arrow": ("ARROW1", "is Arrow, which is not read"),
    "x.csv": ("text,n\none,two,three\n", "has another number of fields than the header's 2"),
    "x.gz": ("no archive", "is damaged (Not a gzipped file"),
    "cut.jsonl": ('{"text": "one', "is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_used_is_named(name, tmp_path):
    content, reason = UNUSABLE[name]
    (tmp_path / name).write_text(content)
    (tmp_path / "good.jsonl").write_text('{"text": "good"}\n')
    config = DataConfig(max_unusable=1)
    documents = load_documents([tmp_path / name, tmp_path / "good.jsonl"], Characters(), config)
    (record,) = documents.report.unusable
    assert record.where.startswith(str(tmp_path / name))
    assert record.reason.startswith(reason)
    assert len(documents) == 1
    with pytest.raises(ValueError, match=f"no usable record in .*{re.escape(name)}: 0 texts"):
        read(tmp_path / name, tmp_path / "good.jsonl")


def test_a_source_mostly_unusable_stops_the_run(tmp_path):
    file = tmp_path / "some.jsonl"
    file.write_text(lines([{"text": "one"}] * 2 + [{"text": 1}] * 2))
    assert len(read(file)) == 2
    with pytest.raises(
        ValueError, match=r"(?s)some.jsonl: 50% of its .* 0.4; .*some.jsonl:3: 'text' is a number"
    ):
        read(file, max_unusable=0.4)
    file.write_text(lines([{"text": "one"}] * 2 + [{"text": 1}] * 30))
    with pytest.raises(ValueError, match=r"(?s)94% of its records .* and 20 more"):
        read(file)
    assert len(read(file, max_unusable=1)) == 2
    with pytest.raises(ValueError, match="the records: 67% of its records cannot be used"):
        read({"text": "one"}, {"text": None}, {"words": "two"})


@pytest.mark.parametrize(
    ("name", "content", "count"),
    [
        ("cut.json", json.dumps(RECORDS)[:-20], 2),
        ("broken.json", '[{"text": "one"}, {"text": two}, {"text": "three"}]', 1),
        ("after.json", json.dumps(RECORDS) + " more", 3),
        ("open.json", json.dumps(RECORDS)[:-1], 3),
    ],
)
def test_a_file_that_ends_early_stops_the_run(name, content, count, tmp_path):
    (tmp_path / name).write_text(content)
    message = (
        rf"{name}: after record {count}: is not JSON from there on .*the records behind it cannot be read"
    )
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)
    assert read(tmp_path / name, max_unusable=1) == (TEXTS[:count] if count > 1 else ["one<end>"])


def test_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", None]})
    rows.save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == ["one<end>"]
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    assert read(tmp_path / "splits" / "train") == ["one<end>"]
    with pytest.raises(ValueError, match="splits: holds the splits train; name the folder of one of them"):
        read(tmp_path / "splits")
