"""Tokens in memory-mapped files: written once, whole or not at all, and read where they are needed."""

import dataclasses
import json
import os
import pathlib
import threading

import numpy as np
import pytest
from training_runs import make_trainer, run_config, texts_file, tokenizer, words

from mamba2_jax.training import DataConfig, load_documents, make_pipeline
from mamba2_jax.training.data import count_batches, documents, pipeline
from mamba2_jax.training.data.encode import Piece
from mamba2_jax.training.data.token_files import TokenWriter
from mamba2_jax.training.feed import Feed

CONFIG = DataConfig(max_length=48)


def load(source, folder, said=None, **options):
    said = [] if said is None else said
    config = dataclasses.replace(CONFIG, **options)
    return load_documents(source, tokenizer(), config, folder=folder, report=said.append)


def contents(found) -> list[tuple[list[int], list[int]]]:
    return [(document["input_ids"].tolist(), document["labels"].tolist()) for document in found]


@pytest.mark.parametrize("vocab_size", [1 << 16, 100_000])
def test_what_is_written_is_read(vocab_size, tmp_path):
    rng = np.random.default_rng(0)
    pieces = []
    for length in (1, 7, 8, 9, 16, 2, 300):
        tokens = rng.integers(0, vocab_size, length).astype(np.int32)
        pieces.append(Piece(tokens, rng.random(length) < 0.5, int(rng.integers(99))))
    files = []
    for folder in (None, tmp_path / "out" / "tokens"):
        writer = TokenWriter(folder, vocab_size)
        for group in (pieces[:1], [], pieces[1:3], pieces[3:]):
            writer.add(group)
        files.append(writer.finish({}, {}))
    assert files[0].fingerprint == files[1].fingerprint
    for written in files:
        np.testing.assert_array_equal(written.tokens, np.concatenate([piece.tokens for piece in pieces]))
        np.testing.assert_array_equal(written.trained, np.concatenate([piece.trained for piece in pieces]))
        assert np.diff(written.starts).tolist() == [1, 7, 8, 9, 16, 2, 300]
        assert written.num_bytes.tolist() == [piece.num_bytes for piece in pieces]
        assert written.highest == max(piece.tokens.max() for piece in pieces)
        written.forget()
    assert files[1].tokens.dtype.itemsize == (2 if vocab_size <= 1 << 16 else 4)


def test_tokens_are_made_once_while_nothing_they_depend_on_changes(tmp_path):
    source, folder = tmp_path / "texts.jsonl", tmp_path / "run" / "tokens"
    source.write_bytes(texts_file().read_bytes())
    said: list[str] = []
    first = load(source, folder, said)
    assert said == []
    in_memory = load(source, None)
    assert contents(first) == contents(in_memory)
    assert first.fingerprint() == in_memory.fingerprint()
    again = load(source, folder, said)
    assert said == [f"tokens of an earlier start are used: {folder}"]
    assert (contents(again), again.report) == (contents(first), first.report)
    # other options, another tokenizer, other files
    load(source, folder, said, max_length=32)
    load(source, folder, said)
    tokenizer().chat_template = "{{ 1 }}"
    load(source, folder, said)
    tokenizer().chat_template = None
    os.utime(source, ns=(1, 1))
    touched = load(source, folder, said)
    assert len(said) == 1
    assert touched.fingerprint() == first.fingerprint()
    # a file cut short, and what a killed run left
    tokens = folder / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    (folder.with_name(".tokens.part")).mkdir()
    assert contents(load(source, folder, said)) == contents(first)
    assert len(said) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["tokens"]


def test_a_failure_leaves_nothing(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(ValueError, match="no usable record"):
        load([texts_file(), tmp_path / "bad.jsonl"], tmp_path / "new" / "tokens")
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileNotFoundError):
        load([texts_file(), tmp_path / "none.jsonl"], tmp_path / "mine" / "run" / "tokens")
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    if not pathlib.Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    folder = tmp_path / "run" / "tokens"
    writer = TokenWriter(folder, 100)
    writer._files[0].close()
    writer._files[0] = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(
        OSError, match=r"run/tokens: the tokens could not be written \(No space left on device\)"
    ):
        writer.add([Piece(np.zeros(1 << 20, np.int32), np.ones(1 << 20, bool), 0)])
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_a_share_held_out_of_mapped_files_is_that_of_memory(tmp_path):
    parts = [load(texts_file(), folder).hold_out(0.25, seed=1) for folder in (None, tmp_path / "tokens")]
    for in_memory, mapped in zip(*parts, strict=True):
        assert contents(in_memory) == contents(mapped)
        assert in_memory.fingerprint() == mapped.fingerprint()
        assert (in_memory.num_bytes == mapped.num_bytes).all()
        lengths = [len(document["input_ids"]) for document in mapped]
        assert (mapped.report.documents, mapped.report.tokens) == (len(lengths), sum(lengths))
    for part in parts[0]:  # as of documents that were never apart
        alone = [Piece(part[i]["input_ids"], part[i]["labels"] != -100, 0) for i in range(len(part))]
        writer = TokenWriter(None, 100)
        writer.add(alone)
        assert part.fingerprint() == writer.finish({}, {}).fingerprint
    rest, held_out = parts[0]
    assert rest[-1]["input_ids"].tolist() == rest[len(rest) - 1]["input_ids"].tolist()
    with pytest.raises(IndexError):
        held_out[len(held_out)]


def test_batches_are_counted_once(tmp_path, monkeypatch):
    found = load(texts_file(), tmp_path / "tokens")
    count = count_batches(found, CONFIG, 4, seed=3, epochs=2)
    assert count == count_batches(load(texts_file(), None), CONFIG, 4, seed=3, epochs=2)
    batches = pipeline._batches
    monkeypatch.setattr(pipeline, "_batches", None)
    assert count_batches(load(texts_file(), tmp_path / "tokens"), CONFIG, 4, seed=3, epochs=2) == count
    with pytest.raises(TypeError):
        count_batches(found, CONFIG, 4, seed=4, epochs=2)
    monkeypatch.setattr(pipeline, "_batches", batches)
    (tmp_path / "tokens" / "batches.json").write_text("{")
    assert count_batches(found, CONFIG, 4, seed=3, epochs=2) == count


@pytest.mark.parametrize("rows", ["pack", "pad"])
def test_a_process_reads_its_own_rows(rows, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, rows=rows)
    found = load(texts_file(), tmp_path / "tokens")
    whole = list(make_pipeline(found, config, 4, seed=3, epochs=2))
    assert len(whole) == count_batches(found, config, 4, seed=3, epochs=2)
    read: list[int] = []
    inner = documents.Documents.read

    def counted(self, positions):
        read.append(int((positions >= 0).sum()))
        return inner(self, positions)

    monkeypatch.setattr(documents.Documents, "read", counted)
    halves = []
    for own in ([True, True, False, False], [False, False, True, True]):
        halves.append(list(make_pipeline(found, config, 4, seed=3, epochs=2, own_rows=np.array(own))))
        for batch, wanted in zip(halves[-1], whole, strict=True):
            np.testing.assert_array_equal(batch["segment_ids"], wanted["segment_ids"])
            for name, ignored in (("input_ids", 0), ("labels", -100)):
                np.testing.assert_array_equal(batch[name][own], wanted[name][own])
                assert (batch[name][~np.array(own)] == ignored).all()
    assert sum(read) == sum(int((batch["segment_ids"] != 0).sum()) for batch in whole)

    # the rate shown counts the rows of all processes, once
    feed = Feed(run_config(tmp_path, batch_size=4), None, 0, None, print)
    monkeypatch.setattr(feed, "_own_rows", lambda: np.array(own))
    assert [feed.tokens_of(batch) for batch in halves[1]] == [feed.tokens_of(batch) for batch in whole]


def test_a_run_uses_the_tokens_of_the_start_before(tmp_path):
    said: list[str] = []
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": words(9, seed)}) + "\n" for seed in range(20)))
    make_trainer(tmp_path / "run", source)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tokens"]
    # not begun, so that the folder counts as empty
    make_trainer(tmp_path / "run", source, said.append)
    assert said[0] == f"tokens of an earlier start are used: {tmp_path / 'run' / 'tokens' / 'data'}"
    assert said[1].startswith("data: 20 texts")


def test_other_processes_wait_for_the_first(tmp_path, monkeypatch):
    """The other process: it reads no source, and ends when the first one fails."""
    monkeypatch.setattr(documents, "_SECONDS", 0.01)
    folder, failed = tmp_path / "tokens", tmp_path / ".tokens.failed"
    first = load(texts_file(), tmp_path / "first")
    writer = threading.Timer(0.1, (tmp_path / "first").rename, [folder])
    writer.start()
    found, report = documents._wait_for(folder, failed)
    assert (found.fingerprint, report["texts"]) == (first.fingerprint(), 60)
    failed.touch()
    with pytest.raises(ValueError, match="the first process wrote no tokens; its message has the reason"):
        documents._wait_for(tmp_path / "none", failed)
