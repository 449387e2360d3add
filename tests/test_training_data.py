"""Records, tokens, rows: what is learnt, what is refused, and that the order can be resumed."""

import json

import numpy as np
import pytest
from training_runs import EOS, texts_file, tokenizer, words

from mamba2_jax.training import DataConfig, load_documents, make_pipeline
from mamba2_jax.training.data.records import Record
from mamba2_jax.training.data.sources import read_source

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + '. ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a. {% endif %}"
)


def documents(sources, **options):
    return load_documents(sources, tokenizer(), DataConfig(**{"max_length": 64, **options}))


def learnt(document) -> str:
    """The text that a document teaches: every label but the first, which nothing predicts."""
    return tokenizer().decode([token for token in document["labels"][1:] if token != -100])


def chat_tokenizer():
    import copy

    chatty = copy.copy(tokenizer())
    chatty.chat_template = TEMPLATE
    return chatty


def test_what_is_learnt_of_each_kind_of_record():
    text, completion = documents([{"text": "abc"}, {"prompt": "two and", "completion": " two"}])
    assert learnt(text) == "bc<end>"
    assert learnt(completion) == " two<end>"
    turns = [("user", "hi"), ("assistant", "yes."), ("user", "so"), ("assistant", "no.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (chat,) = load_documents([{"messages": messages}], chat_tokenizer(), DataConfig(max_length=64))
    assert tokenizer().decode(chat["input_ids"]) == "u. hi\na. yes.\nu. so\na. no.\n"
    assert learnt(chat) == "yes.\nno.\n"
    with pytest.raises(
        ValueError, match="record 1: holds 'messages', and the tokenizer has no chat template"
    ):
        documents([{"messages": messages}])


def test_long_texts_are_cut_and_every_token_is_predicted_once():
    text = words(40, 3)
    pieces = documents([{"text": text}], max_length=16)
    assert all(2 <= len(piece["input_ids"]) <= 16 for piece in pieces)
    assert "".join(learnt(piece) for piece in pieces) == text[1:] + "<end>"
    assert pieces.num_bytes.sum() == len(text) - 1
    # with a prompt the end is lost instead, and said to be
    prompted = documents([{"prompt": "one", "completion": text}], max_length=16)
    assert [learnt(piece) for piece in prompted] == [text[: 16 - 3]]
    assert prompted.report.truncated == 1
    assert "1 texts were longer than a row" in str(prompted.report)


def test_records_that_cannot_be_used_are_counted_and_named(tmp_path):
    lines = [
        b'{"text": "one"}', b"{broken", b'{"text": ""}', b'{"words": "x"}', b"", b"[1]", b'{"text": "\xff"}',
        b'{"prompt": "one", "completion": " "}', b'{"text": 7}', b'{"messages": "x"}', b'{"text": "two"}',
    ]  # fmt: skip
    file = tmp_path / "mixed.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.txt").write_text("three")
    (tmp_path / "plain" / "b.bin").write_bytes(b"\xff\xfa")
    (tmp_path / "plain" / ".hidden").write_text("four")
    config = DataConfig(max_length=64, max_unusable=1)
    found = load_documents([file, tmp_path / "plain"], chat_tokenizer(), config)
    assert [learnt(document) for document in found] == ["ne<end>", "wo<end>", "hree<end>"]
    reasons = {unusable.where.rpartition("/")[2]: unusable.reason for unusable in found.report.unusable}
    expected = {
        "mixed.jsonl:2": "is not JSON",
        "mixed.jsonl:3": "is empty",
        "mixed.jsonl:4": "has the fields 'words'",
        "mixed.jsonl:6": "is a list",
        "mixed.jsonl:7": "is not UTF-8",
        "mixed.jsonl:8": "'completion' is empty",
        "mixed.jsonl:9": "'text' is a number, not a string",
        "mixed.jsonl:10": "'messages' is a string, not a list of messages",
        "b.bin": "is not UTF-8",
    }
    assert reasons.keys() == expected.keys()
    for where, reason in expected.items():
        assert reasons[where].startswith(reason)
    assert "9 records could not be used" in str(found.report)
    with pytest.raises(ValueError, match="no usable record in .*/b.bin: 0 texts"):
        documents([tmp_path / "plain" / "b.bin"])
    with pytest.raises(ValueError, match="its prompt fills a whole row"):
        documents([{"prompt": "one two three", "completion": " four"}], max_length=8)


def test_parquet_and_hub_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"quote": ["one", None, "two"]}), tmp_path / "quotes.parquet")
    found = documents([tmp_path / "quotes.parquet"], text_field="quote")
    assert [learnt(document) for document in found] == ["ne<end>", "wo<end>"]
    assert [str(bad).rpartition("/")[2] for bad in found.report.unusable] == [
        "quotes.parquet:2: 'quote' is null"
    ]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"broken.parquet: cannot be read as Parquet"):
        documents([tmp_path / "broken.parquet"])

    def load_dataset(name, config, split, revision, streaming):
        if name != "org/quotes":
            raise FileNotFoundError(f"no dataset {name}")
        if config is None:
            raise ValueError("Config name is missing.")
        rows = datasets.Dataset.from_dict({"quote": [f"one {config} {split} {revision}"]})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DataConfig(split="test", config="long", revision="v2")
    (record,) = read_source("org/quotes", config)
    assert record == Record("org/quotes[0]", {"quote": "one long test v2"}, filled=True)
    with pytest.raises(FileNotFoundError, match=r"Config name is missing.*name one with data.config"):
        list(read_source("org/quotes", DataConfig()))
    broken = (1 // (1 - row) and {"quote": "one"} for row in range(3))
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: broken)
    with pytest.raises(OSError, match="org/quotes: could not be read on after 1 records .ZeroDivisionError"):
        list(read_source("org/quotes", config))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match="org/nothing: no file or folder of that name here"):
        list(read_source("org/nothing", DataConfig()))


@pytest.mark.parametrize("rows", ["pack", "pad"])
def test_rows_hold_every_document_once_an_epoch_and_can_be_resumed(rows):
    config = DataConfig(max_length=80, rows=rows)
    found = documents([texts_file()], max_length=80)
    pipeline = make_pipeline(found, config, 4, seed=3, epochs=2)
    batches, states, iterator = [], [], iter(pipeline)
    for batch in iterator:
        batches.append(batch)
        states.append(json.loads(json.dumps(iterator.get_state())))
    whole = sorted(tokenizer().decode(document["input_ids"]) for document in found)
    held = []
    for batch in batches:
        assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(batch, (4, 80))
        for ids, segments, labels in zip(*batch.values(), strict=True):
            assert (labels[segments == 0] == -100).all()
            for segment in np.unique(segments[segments != 0]):
                assert np.ptp(np.flatnonzero(segments == segment)) == (segments == segment).sum() - 1
                held.append(tokenizer().decode(ids[segments == segment]))
                assert held[-1].endswith("<end>")
    assert sorted(held) == sorted(whole * 2)
    assert held[: len(whole)] != held[len(whole) :]
    share = np.mean([(batch["segment_ids"] != 0).mean() for batch in batches])
    assert share > (0.75 if rows == "pack" else 0.3)

    resumed = iter(make_pipeline(found, config, 4, seed=3, epochs=2))
    resumed.set_state(states[2])
    for want, got in zip(batches[3:], resumed, strict=True):
        for name, array in want.items():
            np.testing.assert_array_equal(array, got[name])
    other = next(iter(make_pipeline(found, config, 4, seed=4, epochs=2)))
    assert (other["input_ids"] != batches[0]["input_ids"]).any()


def test_a_share_is_held_out():
    found = documents([texts_file()])
    train, held_out = found.hold_out(0.25, seed=0)
    assert (len(train), len(held_out)) == (45, 15)
    texts = lambda some: [tuple(document["input_ids"]) for document in some]  # noqa: E731
    assert sorted(texts(train) + texts(held_out)) == sorted(texts(found))
    assert train.num_bytes.sum() + held_out.num_bytes.sum() == found.num_bytes.sum()
    assert found.fingerprint() == documents([texts_file()]).fingerprint() != train.fingerprint()
    assert all(tokens[-1] == EOS for tokens in texts(found))
    with pytest.raises(ValueError, match="leaves none to train on"):
        documents([{"text": "one"}]).hold_out(0.5, 0)


def test_half_a_surrogate_pair_does_not_stop_the_others():
    found = documents([{"text": "one"}, {"text": "t\udc80"}])
    assert [learnt(document) for document in found] == ["ne<end>"]
    assert [str(record) for record in found.report.unusable] == [
        r"record 2: holds \udc80, half of a surrogate pair, at character 1"
    ]
