"""Broken and hostile PyTorch files: no pickle code runs, and declared sizes are never allocated."""

import collections
import io
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mamba2_jax.weights import CheckpointError, open_checkpoint

FILE = "pytorch_model.bin"


def refused(folder: Path) -> str:
    """The message with which a folder is refused, in little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(folder)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert str(folder / FILE) in str(caught.value)
    assert len(str(caught.value)) < 1500
    return str(caught.value)


def saved(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory):
    """Read a good file before memory is measured: PyTorch 2.10 imports tens of megabytes for the first."""
    folder = tmp_path_factory.mktemp("good")
    (folder / FILE).write_bytes(saved({"a": torch.ones(3)}))
    open_checkpoint(folder).close()


def repacked(edit, content=None, compression=zipfile.ZIP_STORED) -> bytes:
    """A file of torch.save with its records edited: `edit(dict of name -> bytes)`."""
    with zipfile.ZipFile(io.BytesIO(saved({"a": torch.ones(3)} if content is None else content))) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    edit(records)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return buffer.getvalue()


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_a_payload_does_not_run(tmp_path):
    proof = tmp_path / "ran"
    content = {"a": torch.ones(3), "b": Payload(proof)}
    (tmp_path / FILE).write_bytes(saved(content))
    error = refused(tmp_path)
    assert "'posix.system'" in error
    assert "was not executed" in error
    assert not proof.exists()
    torch.load(tmp_path / FILE, weights_only=False)  # it is a payload
    assert proof.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_payload_does_not_run_in_any_protocol(tmp_path, protocol):
    proof = tmp_path / "ran"

    def edit(records):
        records["archive/data.pkl"] = pickle.dumps({"a": Payload(proof)}, protocol)

    (tmp_path / FILE).write_bytes(repacked(edit))
    assert "was not executed" in refused(tmp_path)
    assert not proof.exists()


def meta(shape, stride, dtype=torch.float32, offset=0):
    """A tensor of any claim over a storage of three numbers."""
    return torch.ones(3, dtype=dtype).as_strided(shape, stride, offset)


NOT_PLAIN = {
    "bomb_of_4_TB": (
        {"a": meta((1 << 20, 1 << 20), (0, 0))},
        "tensor 'a': declares shape (1048576, 1048576)",
    ),
    "overlapping": ({"a": torch.arange(5.0).as_strided((3, 3), (1, 1))}, "with strides (1, 1)"),
    "transposed": ({"a": torch.ones(3, 4).T}, "save it as tensor.contiguous()"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "_rebuild_sparse_tensor"),
    "meta": ({"a": torch.ones(3, device="meta")}, "_rebuild_meta_tensor_no_storage"),
    "float8": ({"a": torch.ones(3).to(torch.float8_e4m3fn)}, "more than plain tensors"),
    "nested": ({"model": {"a": torch.ones(3)}}, "tensor 'model': is a dict"),
    "a_number": ({"a": torch.ones(3), "step": 7}, "tensor 'step': is a int"),
    "number_as_name": ({7: torch.ones(3)}, "its name is a int"),
    "a_list": ([torch.ones(3)], "holds a list, want a dict of tensors"),
    "module": (torch.nn.Linear(2, 2), "was not executed"),
    "counter": (collections.Counter("ab"), "collections.Counter"),
    "bytearray": ({"a": bytearray(10)}, "bytearray"),
}


@pytest.mark.parametrize(("content", "message"), NOT_PLAIN.values(), ids=NOT_PLAIN)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_what_is_not_a_plain_tensor(tmp_path, content, message):
    (tmp_path / FILE).write_bytes(saved(content))
    assert message in refused(tmp_path)
    assert (tmp_path / FILE).stat().st_size < 4000


def test_conjugates(tmp_path):
    (tmp_path / FILE).write_bytes(saved({"a": torch.ones(3, dtype=torch.complex64).conj()}))
    assert "tensor 'a': is torch.complex64" in refused(tmp_path)


GOOD = saved({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)})


def test_the_good_file_is_read(tmp_path):
    # what is spoiled below
    (tmp_path / FILE).write_bytes(GOOD)
    with open_checkpoint(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("a"), np.arange(6.0).reshape(2, 3))
        np.testing.assert_array_equal(checkpoint.read("b").astype(np.float32), np.ones(4))


def legacy() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


BROKEN = {
    "empty": (b"", "0 bytes, not a zip"),
    "garbage": (b"\x93" * 5000, "not a zip as torch.save has written"),
    "legacy": (legacy(), "load an old one in PyTorch and save it again"),
    "truncated": (GOOD[:-100], "not a zip"),
    "beginning_lost": (GOOD[200:], ""),
    "compressed": (repacked(lambda records: None, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "pickle_missing": (repacked(lambda records: records.pop("archive/data.pkl")), "has no data.pkl"),
    "pickle_garbage": (
        repacked(lambda records: records.update({"archive/data.pkl": b"\x80\x02garbage"})),
        "data.pkl is not a pickle",
    ),
    "pickle_empty": (repacked(lambda records: records.update({"archive/data.pkl": b""})), "not a pickle"),
    "big_endian": (repacked(lambda records: records.update({"archive/byteorder": b"big"})), "byte order"),
    "torchscript": (repacked(lambda records: records.update({"archive/constants.pkl": b""})), "TorchScript"),
    "storage_missing": (repacked(lambda records: records.pop("archive/data/0")), "torch.load(weights_only"),
    "storage_short": (
        repacked(lambda records: records.update({"archive/data/0": b"1234"})),
        "tensor 'a': F32 (3,) does not fit the bytes",
    ),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_file(tmp_path, content, message):
    (tmp_path / FILE).write_bytes(content)
    assert message in refused(tmp_path)


def test_a_record_twice(tmp_path):
    buffer = io.BytesIO(GOOD)
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data.pkl", b"")
    (tmp_path / FILE).write_bytes(buffer.getvalue())
    assert "record 'data.pkl' appears twice" in refused(tmp_path)


def test_a_pickle_beyond_the_limit(tmp_path):
    def edit(records):
        records["archive/data.pkl"] = bytes((16 << 20) + 1)

    (tmp_path / FILE).write_bytes(repacked(edit))
    assert "at most 16777216 are read" in refused(tmp_path)


def test_cut_while_being_read(tmp_path):
    (tmp_path / FILE).write_bytes(saved({"a": torch.ones(100_000), "b": torch.ones(100_000)}))
    with open_checkpoint(tmp_path) as checkpoint:
        os.truncate(tmp_path / FILE, 500_000)
        checkpoint.read("a")
        with pytest.raises(CheckpointError, match="tensor 'b': the file ends .* bytes early"):
            checkpoint.read("b")


def test_index_of_pickles_leads_nowhere_else(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../x.bin"}}')
    with pytest.raises(CheckpointError, match=r"only a plain name, such as 'model-00001-of-00003.bin'"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}')
    with pytest.raises(CheckpointError, match="only a plain name"):
        open_checkpoint(tmp_path)


@settings(
    max_examples=120,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(GOOD)), st.binary(min_size=1, max_size=4)), max_size=4),
    cut=st.none() | st.integers(0, len(GOOD)),
    insert=st.booleans(),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fuzz_bytes(tmp_path, edits, cut, insert):
    # anything is refused with CheckpointError, or read as torch reads it
    content = bytearray(GOOD)
    for position, change in edits:
        content[position : position + (0 if insert else len(change))] = change
    (tmp_path / FILE).write_bytes(bytes(content[:cut]))
    try:
        with open_checkpoint(tmp_path) as checkpoint:
            floats = [
                name for name, info in checkpoint.tensors.items() if info.dtype in ("F32", "BF16", "F64")
            ]
            ours = {name: checkpoint.read(name).astype(np.float64) for name in floats}
    except CheckpointError:
        return
    theirs = torch.load(tmp_path / FILE, weights_only=True)
    assert theirs.keys() == checkpoint.tensors.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name].detach().double().numpy())
