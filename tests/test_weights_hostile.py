"""Broken and hostile safetensors checkpoints: the error names file and tensor, and memory stays bounded."""

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import edit_tensors, pack, unpack, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mamba2_jax.weights import CheckpointError, load_weights, open_checkpoint

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
TWO = {
    "first": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "second": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
DATA = np.arange(6, dtype=np.float32).tobytes() + bytes(8)


def entry(**changes) -> dict:
    """The header TWO with one field of `second` changed."""
    return TWO | {"second": TWO["second"] | changes}


def refused(folder: Path) -> str:
    """The message with which a folder is refused, in little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(folder)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    return str(caught.value)


HUGE = 1 << 42
BROKEN_FILES = {
    "empty": (b"", "0 bytes: empty or truncated"),
    "seven_bytes": (b"1234567", "7 bytes: empty or truncated"),
    "garbage": (b"\x93" * 4096, "declares a header of"),
    "text": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "declares a header of"),
    "header_longer_than_file": (pack(TWO, DATA, length=5000), "declares a header of 5000 bytes"),
    "header_of_exabytes": (
        pack(TWO, DATA, length=(1 << 64) - 1),
        "declares a header of 18446744073709551615",
    ),
    "no_json": (pack(b"{not json}", b""), "the header is not readable JSON"),
    "a_list": (pack(b"[1, 2, 3]", b""), "does not begin with '{'"),
    "not_utf8": (pack(b'{"\xff\xfe": 1}', b""), "the header is not readable JSON"),
    "utf16": (pack(json.dumps(TWO).encode("utf-16"), DATA), "does not begin with '{'"),
    "nested_deep": (pack(b'{"a":' * 50_000, b""), "the header is not readable JSON"),
    "nan": (pack(b'{"a": NaN}', b""), "NaN is not JSON"),
    "long_number": (pack(b'{"a": ' + b"9" * 9999 + b"}", b""), "the header is not readable JSON"),
    "same_name_twice": (pack(b'{"x": {}, "x": {}}', b""), "'x' appears twice"),
    "same_key_twice": (pack(b'{"x": {"dtype": "F32", "dtype": "F16"}}', b""), "'dtype' appears twice"),
    "metadata": (pack(TWO | {"__metadata__": {"format": 1}}, DATA), "__metadata__ is not a map of strings"),
    "entry_not_an_object": (pack(TWO | {"second": 7}, DATA), "tensor 'second': its entry is not"),
    "unknown_dtype": (pack(entry(dtype="F33"), DATA), "tensor 'second': unknown dtype 'F33'"),
    "dtype_missing": (pack(entry(dtype=None), DATA), "tensor 'second': unknown dtype 'None'"),
    "shape_missing": (pack(entry(shape=None), DATA), "tensor 'second': shape is not a list of sizes"),
    "shape_negative": (pack(entry(shape=[-2, -2]), DATA), "tensor 'second': shape is not a list of sizes"),
    "shape_fraction": (pack(entry(shape=[4.0]), DATA), "tensor 'second': shape is not a list of sizes"),
    "shape_true": (pack(entry(shape=[4, True]), DATA), "tensor 'second': shape is not a list of sizes"),
    "shape_of_bigints": (pack(entry(shape=[1 << 70]), DATA), "tensor 'second': shape is not a list of sizes"),
    "shape_of_many_axes": (pack(entry(shape=[1] * 5000), DATA), "tensor 'second': shape has 5000 axes"),
    "shape_too_large": (
        pack(entry(shape=[HUGE]), DATA),
        "tensor 'second': BF16 [4398046511104] needs 8796093022208",
    ),
    "offsets_and_shape_too_large": (
        pack(entry(shape=[HUGE], data_offsets=[24, 24 + 2 * HUGE]), DATA),
        "tensor 'second' ends at byte 8796093022",
    ),
    "offsets_reversed": (
        pack(entry(data_offsets=[32, 24]), DATA),
        "tensor 'second': data_offsets is not a begin",
    ),
    "offsets_three": (
        pack(entry(data_offsets=[24, 28, 32]), DATA),
        "tensor 'second': data_offsets is not a begin",
    ),
    "offsets_disagree": (pack(entry(data_offsets=[24, 30]), DATA), "tensor 'second': BF16 [4] needs 8 bytes"),
    "overlap": (pack(entry(data_offsets=[16, 24]), DATA), "tensor 'second' overlaps 'first'"),
    "gap": (
        pack(entry(data_offsets=[28, 36]), DATA + bytes(4)),
        "4 bytes before tensor 'second' belong to no",
    ),
    "outside": (pack(entry(data_offsets=[24, 32]), DATA[:-1]), "tensor 'second' ends at byte"),
    "bytes_left_over": (pack(TWO, DATA + b"extra"), "5 bytes at the end of the file belong to no tensor"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_broken_file(tmp_path, content, message):
    (tmp_path / FILE).write_bytes(content)
    error = refused(tmp_path)
    assert message in error
    assert str(tmp_path / FILE) in error
    assert len(error) < 1000


def test_the_two_tensors_are_readable_as_they_are(tmp_path):
    # every file above is this one with one thing wrong
    (tmp_path / FILE).write_bytes(pack(TWO, DATA))
    with open_checkpoint(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("first"), np.arange(6, dtype=np.float32).reshape(2, 3))
        assert checkpoint.read("second").dtype.name == "bfloat16"


def test_a_declared_header_beyond_the_limit(tmp_path):
    with open(tmp_path / FILE, "wb") as file:  # sparse: takes no room on the disk
        file.write(((1 << 30) - 8).to_bytes(8, "little"))
        file.truncate(1 << 30)
    assert "at most 16777216 are read" in refused(tmp_path)
    (tmp_path / FILE).rename(tmp_path / INDEX)
    assert "more than 16777216 are not read" in refused(tmp_path)


def test_a_huge_sparse_tensor_is_refused_by_its_shape(tmp_path):
    _, config = write_checkpoint(tmp_path)
    header, data = unpack((tmp_path / FILE).read_bytes())
    name, end = "backbone.norm_f.weight", len(data)
    header["zzz"] = {"dtype": "F32", "shape": [1 << 38], "data_offsets": [end, end + (1 << 40)]}
    with open(tmp_path / FILE, "wb") as file:
        file.write(pack(header, data))
        file.truncate(file.tell() + (1 << 40))
    tracemalloc.start()
    with pytest.raises(
        CheckpointError, match=r"'zzz' \(F32 \(274877906944,\), in model.safetensors\) is unexpected"
    ):
        load_weights(tmp_path, config)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert name in header


@pytest.mark.parametrize("cut", [1, 128])
def test_truncated_checkpoint_names_the_tensor(tmp_path, cut):
    _, config = write_checkpoint(
        tmp_path, tie_word_embeddings=True
    )  # its last tensor is the norm's, 128 bytes
    os.truncate(tmp_path / FILE, (tmp_path / FILE).stat().st_size - cut)
    with pytest.raises(
        CheckpointError, match=r"model.safetensors: .*tensor 'backbone.norm_f.weight' ends at byte"
    ):
        load_weights(tmp_path, config)


@pytest.mark.parametrize("uncached", [False, True])
def test_cut_while_being_read(tmp_path, uncached):
    write_checkpoint(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        if uncached and not checkpoint.bypass_cache():
            pytest.skip("this file system has no uncached reads")
        os.truncate(tmp_path / FILE, 6000)
        with pytest.raises(CheckpointError, match="'backbone.norm_f.weight': the file ends 128 bytes early"):
            checkpoint.read("backbone.norm_f.weight")


def test_names_are_shown_harmlessly(tmp_path):
    name = "\x1b[2J\r\n" + "x" * 10_000
    (tmp_path / FILE).write_bytes(pack(TWO | {name: TWO["first"]}, DATA))
    error = refused(tmp_path)
    assert r"\x1b[2J\r\n" in error
    assert "\x1b" not in error
    assert len(error) < 1000


def test_int8_in_a_float_slot(tmp_path):
    _, config = write_checkpoint(tmp_path)
    name = "backbone.layers.0.mixer.D"
    for dtype, stored in ((torch.int8, "I8"), (torch.int32, "I32")):
        edit_tensors(tmp_path, lambda tensors: tensors.update({name: torch.ones(4, dtype=dtype)}))  # noqa: B023
        with pytest.raises(
            CheckpointError, match=f"tensor '{name}' in {FILE} is {stored}, want a float type"
        ):
            load_weights(tmp_path, config)
    with (
        open_checkpoint(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match="is I32; want a float"),
    ):
        checkpoint.read(name)  # only quantized values are integers, of 8 bits


def test_both_names_of_one_tensor(tmp_path):
    state, config = write_checkpoint(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"embeddings.weight": torch.ones(48, 32)}))
    with pytest.raises(CheckpointError, match="tensor 'embeddings.weight' .* is unexpected"):
        load_weights(tmp_path, config)


def test_missing_folder_and_empty_folder(tmp_path):
    assert "not a folder" in refused(tmp_path / "nowhere")
    assert f"holds no weights: neither {FILE}, consolidated" in refused(tmp_path)
    (tmp_path / FILE).write_bytes(b"")
    assert "not a folder" in refused(tmp_path / FILE)


def test_not_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / FILE)  # opening it would wait for ever
    assert "not a regular file" in refused(tmp_path)
    os.remove(tmp_path / FILE)
    (tmp_path / FILE).mkdir()
    assert "not a regular file" in refused(tmp_path)


def test_links_out_of_the_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(pack(TWO, DATA))
    (folder / FILE).symlink_to(Path("..", "secret"))
    assert "a link to" in refused(folder)
    (folder / FILE).unlink()
    (folder / FILE).symlink_to(FILE)
    assert FILE in refused(folder)
    (folder / FILE).unlink()
    (folder / FILE).symlink_to("inside")
    assert "the file is missing" in refused(folder)
    (folder / "inside").write_bytes(pack(TWO, DATA))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tensors.keys() == TWO.keys()


@pytest.fixture
def sharded(tmp_path):
    """A folder with two shards and its index, as a dict to change; `save` writes the index."""
    save_file({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"c": torch.ones(4)}, tmp_path / "two.safetensors")
    shards = {"a": "one", "b": "one", "c": "two"}
    weight_map = {name: f"{shard}.safetensors" for name, shard in shards.items()}
    index = {"metadata": {"total_size": 36}, "weight_map": weight_map}

    def save(folder: Path = tmp_path) -> Path:
        (folder / INDEX).write_text(json.dumps(index))
        return folder

    return index, save


def test_the_index_is_readable_as_it_is(sharded):
    _, save = sharded
    with open_checkpoint(save()) as checkpoint:
        assert {name: checkpoint.read(name).sum() for name in checkpoint.tensors} == {"a": 3, "b": 2, "c": 4}


OUTSIDE = [
    "../two.safetensors",
    "/etc/two.safetensors",
    "sub/two.safetensors",
    "..\\two.safetensors",
    "C:two.safetensors",
    "..",
    "",
    ".two.safetensors",
    "two.safetensors\x00",
    "two.safetensors\n",
    "two.bin",
    "\ud800.safetensors",
    "x" * 5000 + ".safetensors",
]


@pytest.mark.parametrize("shard", OUTSIDE, ids=range(len(OUTSIDE)))
def test_index_that_leads_outside(tmp_path, sharded, shard):
    index, save = sharded
    (tmp_path / "sub").mkdir()
    for copy in (tmp_path.parent / "two.safetensors", tmp_path / "sub" / "two.safetensors"):
        save_file({"c": torch.ones(4)}, copy)
    index["weight_map"]["c"] = shard
    error = refused(save())
    assert "only a plain name" in error
    assert INDEX in error


def test_shard_that_is_a_link_outside(tmp_path, sharded):
    _, save = sharded
    (tmp_path / "two.safetensors").rename(tmp_path.parent / "two_elsewhere.safetensors")
    (tmp_path / "two.safetensors").symlink_to(tmp_path.parent / "two_elsewhere.safetensors")
    assert "two.safetensors: a link to" in refused(save())


def test_shards_missing_or_broken_are_all_listed(tmp_path, sharded):
    index, save = sharded
    (tmp_path / "one.safetensors").write_bytes(b"\0" * 20)
    index["weight_map"]["d"] = "three.safetensors"
    (tmp_path / "two.safetensors").unlink()
    error = refused(save())
    assert "3 problems" in error
    assert "one.safetensors: the header is not readable JSON" in error
    assert "three.safetensors: the file is missing" in error
    assert "two.safetensors: the file is missing" in error


def test_index_and_headers_disagree(tmp_path, sharded):
    index, save = sharded
    index["weight_map"] |= {"a": "two.safetensors", "ghost": "one.safetensors"}
    del index["weight_map"]["b"]
    error = refused(save())
    assert "tensor 'ghost': model.safetensors.index.json places it in one.safetensors" in error
    assert "tensor 'a': model.safetensors.index.json places it in two.safetensors" in error
    assert "tensor 'a' is in one.safetensors, not in two.safetensors as indexed" in error
    assert "tensor 'b' is in one.safetensors but not in model.safetensors.index.json" in error


def test_tensor_in_two_shards(tmp_path, sharded):
    _, save = sharded
    save_file({"c": torch.ones(4), "a": torch.zeros(3)}, tmp_path / "two.safetensors")
    assert "tensor 'a' is in several shards: one.safetensors, two.safetensors" in refused(save())


BROKEN_INDEXES = {
    "empty": (b"", "the index is not readable JSON"),
    "garbage": (b"{garbage", "the index is not readable JSON"),
    "a_list": (b"[]", "the index is not readable JSON"),
    "no_map": (b'{"metadata": {}}', "has no 'weight_map'"),
    "empty_map": (b'{"weight_map": {}}', "has no 'weight_map'"),
    "map_is_a_list": (b'{"weight_map": ["a"]}', "has no 'weight_map'"),
    "not_a_string": (b'{"weight_map": {"a": 5}}', "tensor 'a': its file name is not a string"),
    "name_twice": (b'{"weight_map": {"a": "x", "a": "y"}}', "'a' appears twice"),
    "nested_deep": (b'{"a":' * 50_000, "the index is not readable JSON"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN_INDEXES.values(), ids=BROKEN_INDEXES)
def test_broken_index(tmp_path, content, message):
    (tmp_path / INDEX).write_bytes(content)
    error = refused(tmp_path)
    assert message in error
    assert str(tmp_path / INDEX) in error


# Anything at all is either refused with CheckpointError or read exactly as the safetensors library reads it.

FUZZ = settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
sizes = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 24, 32, 33, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "F64", "I8", "U16", "F8_E4M3", "F4", "BOOL", "X"]),
        "shape": st.sampled_from([[4], [2, 2], [8], [1, 4, 1], [0], []]) | st.lists(sizes, max_size=3),
        "data_offsets": st.just([24, 32]) | st.lists(sizes, min_size=1, max_size=3),
    }
)
headers = st.one_of(
    st.dictionaries(st.sampled_from(["first", "second", "__metadata__", "\ud800"]), entries | json_values),
    entries.map(lambda value: TWO | {"second": value}),
    json_values,
)


def check_against_the_library(folder: Path) -> None:
    """Our reader accepts no more than the safetensors library, and reads the same numbers."""
    tracemalloc.start()
    try:
        try:
            with open_checkpoint(folder) as checkpoint:
                ours = {
                    name: checkpoint.read(name).astype(np.float64)
                    for name, info in checkpoint.tensors.items()
                    if info.dtype in ("F64", "F32", "F16", "BF16")
                }
                shapes = {name: (info.dtype, list(info.shape)) for name, info in checkpoint.tensors.items()}
        except CheckpointError:
            return
        finally:
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    try:
        with safe_open(folder / FILE, framework="pt") as library:
            slices = {name: library.get_slice(name) for name in library.keys()}  # noqa: SIM118
            assert shapes == {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
            for name, array in ours.items():
                np.testing.assert_array_equal(array, library.get_tensor(name).double().numpy())
    except SafetensorError as error:
        raise AssertionError(f"we read what the library refuses: {error}") from error


@FUZZ
@given(
    header=headers,
    length_off=st.sampled_from([0, 0, 0, -1, 1, 40]),
    data=st.just(DATA) | st.binary(max_size=40),
)
def test_fuzz_headers(tmp_path, header, length_off, data):
    text = json.dumps(header).encode()
    (tmp_path / FILE).write_bytes(pack(text, data, length=max(0, len(text) + length_off)))
    check_against_the_library(tmp_path)


WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U16": 2, "BOOL": 1, "I64": 8}
tensors = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6),
    st.tuples(st.sampled_from(sorted(WIDTHS)), st.lists(st.integers(0, 3), max_size=4)),
    max_size=4,
)


@FUZZ
@given(tensors=tensors, slip=st.sampled_from([0, 0, -1, 1]), which=st.integers(0, 3), data=st.data())
def test_fuzz_layouts(tmp_path, tensors, slip, which, data):
    # whole files of any tensors in any order are read; with one offset that slips they are not
    header, end = {}, 0
    for name in data.draw(st.permutations(sorted(tensors))):
        dtype, shape = tensors[name]
        start, end = end, end + WIDTHS[dtype] * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    content = np.arange(end, dtype=np.uint8).tobytes()
    if slip and which < len(header):
        offsets = list(header.values())[which]["data_offsets"]
        offsets[data.draw(st.integers(0, 1))] += slip
    names = data.draw(st.permutations(sorted(header)))
    (tmp_path / FILE).write_bytes(pack({name: header[name] for name in names}, content))
    if slip and which < len(header):
        refused(tmp_path)
    else:
        with open_checkpoint(tmp_path) as checkpoint:
            assert checkpoint.tensors.keys() == tensors.keys()
    check_against_the_library(tmp_path)


@FUZZ
@given(
    edits=st.lists(st.tuples(st.integers(0, 250), st.binary(min_size=1, max_size=4)), max_size=4),
    cut=st.none() | st.integers(0, 250),
    insert=st.booleans(),
)
def test_fuzz_bytes(tmp_path, edits, cut, insert):
    content = bytearray(pack(TWO, DATA))
    for position, change in edits:
        content[position : position + (0 if insert else len(change))] = change
    (tmp_path / FILE).write_bytes(bytes(content[:cut]))
    check_against_the_library(tmp_path)


names = st.sampled_from(
    ["one.safetensors", "two.safetensors", "three.safetensors", "../x.safetensors", "a/b", ""]
)


@FUZZ
@given(
    weight_map=st.dictionaries(st.sampled_from("abcd") | st.text(max_size=3), names | json_values)
    | json_values
)
def test_fuzz_indexes(tmp_path_factory, weight_map):
    folder = tmp_path_factory.getbasetemp() / "fuzz_indexes"
    if not folder.exists():
        folder.mkdir()
        save_file({"a": torch.ones(3), "b": torch.ones(2)}, folder / "one.safetensors")
        save_file({"c": torch.ones(4)}, folder / "two.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    truth = {"a": "one", "b": "one", "c": "two"}
    try:
        with open_checkpoint(folder) as checkpoint:
            assert {name: info.file.stem for name, info in checkpoint.tensors.items()} == weight_map_stems(
                weight_map
            )
            assert weight_map_stems(weight_map).items() <= truth.items()
    except CheckpointError:
        pass


def weight_map_stems(weight_map: dict[str, str]) -> dict[str, str]:
    return {name: shard.removesuffix(".safetensors") for name, shard in weight_map.items()}


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    """One small checkpoint: its bytes, its config, a folder to spoil it in."""
    folder = tmp_path_factory.mktemp("tiny")
    _, config = write_checkpoint(folder, num_hidden_layers=1, hidden_size=16, num_heads=2, vocab_size=8)
    return (folder / FILE).read_bytes(), config, folder


@settings(FUZZ, max_examples=60)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 20_000), st.binary(min_size=1, max_size=3)), min_size=1, max_size=3
    )
)
def test_fuzz_load(tiny_file, edits):
    original, config, folder = tiny_file
    content = bytearray(original)
    for position, change in edits:
        position %= len(original) - 3
        content[position : position + len(change)] = change
    (folder / FILE).write_bytes(content)
    try:
        arrays, _ = load_weights(folder, config)
    except CheckpointError:
        return
    stored = load_file(folder / FILE)
    out_proj = "backbone.layers.0.mixer.out_proj.weight"
    np.testing.assert_array_equal(np.asarray(arrays[out_proj]), stored[out_proj].numpy().T)
    assert all(np.isfinite(np.asarray(array)).all() for array in arrays.values())
