"""Load checkpoints written by transformers; compare every value with transformers' state dict."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoint_files import edit_tensors, expected_leaves, pack, random_model, write_checkpoint

from mamba2_jax.config import Mamba2Config
from mamba2_jax.weights import CheckpointError, checkpoint_table, load_weights, open_checkpoint
from mamba2_jax.weights.reader import Checkpoint

EMBEDDED = Path(__file__).parents[1] / "mamba2_jax" / "assets" / "tiny-python"


def assert_same(arrays: dict[str, jax.Array], leaves: dict[str, torch.Tensor], dtype=None) -> None:
    """Exactly the same paths, shapes, types and numbers."""
    assert arrays.keys() == leaves.keys()
    for path, leaf in leaves.items():
        assert arrays[path].shape == tuple(leaf.shape), path
        if dtype is None:
            assert str(arrays[path].dtype) == str(leaf.dtype).removeprefix("torch."), path
        ours = np.asarray(arrays[path].astype(jnp.float32))
        np.testing.assert_array_equal(ours, leaf.float().numpy(), err_msg=path)


VARIANTS = {
    "groups1_tied": {"n_groups": 1, "tie_word_embeddings": True},
    "groups2_untied": {"n_groups": 2, "tie_word_embeddings": False},
    "groups4_bias": {"n_groups": 4, "use_bias": True},
    "no_conv_bias": {"use_conv_bias": False, "tie_word_embeddings": True},
    "both_biases_kernel3": {"use_bias": True, "use_conv_bias": True, "conv_kernel": 3},
    "wide": {"expand": 3, "num_heads": 6, "head_dim": 16, "n_groups": 3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_equals_the_state_dict(tmp_path, fields, dtype):
    state, config = write_checkpoint(tmp_path, dtype=dtype, **fields)
    arrays, report = load_weights(tmp_path, config)
    assert_same(arrays, expected_leaves(state, config))
    assert report.parameters == config.num_parameters() == sum(array.size for array in arrays.values())
    assert report.notes == ()


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_by_index(tmp_path, tied):
    state, config = write_checkpoint(tmp_path, max_shard_size="9KB", tie_word_embeddings=tied)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    arrays, report = load_weights(tmp_path, config)
    assert_same(arrays, expected_leaves(state, config))
    assert len(report.files) > 3
    assert f"{len(report.files)} files in {tmp_path}" in str(report)


def test_index_wins_over_a_single_file(tmp_path):
    state, config = write_checkpoint(tmp_path, max_shard_size="9KB")
    (tmp_path / "model.safetensors").write_bytes(b"left over")
    assert_same(load_weights(tmp_path, config)[0], expected_leaves(state, config))


def test_embedded_model():
    config = Mamba2Config.from_pretrained(EMBEDDED)
    arrays, report = load_weights(EMBEDDED, config)
    assert report.tensors == 38
    assert report.parameters == config.num_parameters()
    exact = 3 * config.num_heads * config.num_hidden_layers  # A_log, D, dt_bias
    assert report.dtypes == report.param_dtypes == {"bfloat16": report.parameters - exact, "float32": exact}
    assert report.bytes == 2 * report.parameters + 2 * exact
    loaded = r"loaded 38 tensors, 2\.8 M parameters, 5\.6 MB bfloat16 \+ float32"
    pattern = rf"{loaded} in \d+\.\d\d s \(.*B/s\) from (.*)"
    match = re.fullmatch(pattern, str(report))
    assert match
    assert match[1] == str(EMBEDDED / "model.safetensors")
    assert float(jnp.abs(arrays["backbone.embeddings.weight"].astype(jnp.float32)).mean()) > 0


def test_bare_model_has_no_prefix(tmp_path):
    state, config = write_checkpoint(tmp_path, bare=True, tie_word_embeddings=True)
    assert "embeddings.weight" in state
    assert_same(load_weights(tmp_path, config)[0], expected_leaves(state, config))


def test_bare_model_lacks_an_untied_head(tmp_path):
    state, config = write_checkpoint(tmp_path, bare=True, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is missing .*tie_word_embeddings is false"):
        load_weights(tmp_path, config)
    assert_same(load_weights(tmp_path, config, head=False)[0], expected_leaves(state, config))


def test_head_can_be_left_out(tmp_path):
    state, config = write_checkpoint(tmp_path, tie_word_embeddings=False)
    arrays, report = load_weights(tmp_path, config, head=False)
    assert "lm_head.weight" in state
    assert arrays.keys() == expected_leaves(state, config).keys() - {"lm_head.weight"}
    assert "lm_head.weight is not used" in report.notes[0]


def test_older_embedding_name(tmp_path):
    state, config = write_checkpoint(tmp_path)

    def rename(tensors):
        tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")

    edit_tensors(tmp_path, rename)
    assert_same(load_weights(tmp_path, config)[0], expected_leaves(state, config))


def test_tied_head_may_be_present(tmp_path):
    state, config = write_checkpoint(tmp_path, tie_word_embeddings=True)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": state["lm_head.weight"]}))
    arrays, report = load_weights(tmp_path, config)
    assert_same(arrays, expected_leaves(state, config))
    assert "repeats the embedding" in report.notes[0]
    edit_tensors(tmp_path, lambda tensors: tensors["lm_head.weight"].mul_(2))
    with pytest.raises(CheckpointError, match="'lm_head.weight' in model.safetensors differs from"):
        load_weights(tmp_path, config)


def test_tied_head_may_stand_for_the_embedding(tmp_path):
    state, config = write_checkpoint(tmp_path, tie_word_embeddings=True)

    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("backbone.embeddings.weight")

    edit_tensors(tmp_path, rename)
    assert_same(load_weights(tmp_path, config)[0], expected_leaves(state, config))


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_param_dtype(tmp_path, stored, target):
    state, config = write_checkpoint(tmp_path, dtype=stored)
    arrays, report = load_weights(tmp_path, config, param_dtype=target)
    leaves = expected_leaves(state, config)
    kept = {path for path in leaves if path.endswith(("A_log", "dt_bias", ".D"))}
    assert len(kept) == 6
    assert {str(array.dtype) for path, array in arrays.items() if path not in kept} == {target}
    # never narrowed: where neither type holds the other (float16, bfloat16), the wider of both
    assert_same({path: arrays[path] for path in kept}, {path: leaves[path] for path in kept}, target)
    cast = {path: leaf.to(getattr(torch, target)) for path, leaf in leaves.items() if path not in kept}
    assert_same({path: arrays[path] for path in cast}, cast)
    if str(stored) != f"torch.{target}":
        assert f" as {target}" in str(report)


def test_float64_becomes_float32_with_a_note(tmp_path):
    state, config = write_checkpoint(tmp_path, dtype=torch.float64)
    arrays, report = load_weights(tmp_path, config)
    assert_same(arrays, {path: leaf.float() for path, leaf in expected_leaves(state, config).items()})
    assert "float64 weights become float32" in report.notes[0]
    with pytest.raises(ValueError, match="param_dtype=float64 needs jax_enable_x64"):
        load_weights(tmp_path, config, param_dtype=jnp.float64)
    with jax.enable_x64(True):
        assert load_weights(tmp_path, config)[0]["backbone.norm_f.weight"].dtype == jnp.float64


def test_param_dtype_must_be_a_float(tmp_path):
    with pytest.raises(ValueError, match="param_dtype=int8"):
        load_weights(tmp_path, Mamba2Config(), param_dtype=jnp.int8)


def test_mixed_stored_dtypes_are_kept(tmp_path):
    _, config = write_checkpoint(tmp_path, dtype=torch.float16)
    kept = "backbone.layers.1.mixer.dt_bias"
    edit_tensors(tmp_path, lambda tensors: tensors.update({kept: tensors[kept].float()}))
    arrays, report = load_weights(tmp_path, config)
    assert arrays[kept].dtype == jnp.float32
    assert report.dtypes == {"float16": config.num_parameters() - 4, "float32": 4}
    assert "float16 + float32" in str(report)


def test_placement(tmp_path):
    state, config = write_checkpoint(tmp_path)
    device = jax.devices()[0]
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    seen = []

    def place(path):
        seen.append(path)
        return sharding if path.endswith("in_proj.weight_zx") else None

    leaves = expected_leaves(state, config)
    assert_same(load_weights(tmp_path, config, sharding=device)[0], leaves)
    arrays, _ = load_weights(tmp_path, config, sharding=place)
    assert sorted(seen) == sorted(leaves)
    assert arrays["backbone.layers.0.mixer.in_proj.weight_zx"].sharding == sharding
    arrays, _ = load_weights(tmp_path, config, sharding=sharding)
    assert {array.sharding for array in arrays.values()} == {sharding}


def test_arrays_own_their_memory(tmp_path):
    state, config = write_checkpoint(tmp_path)
    arrays, _ = load_weights(tmp_path, config)
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size
    with open(file, "r+b") as stream:  # in place: a mapping would see it
        stream.write(b"\xff" * size)
        stream.truncate(100)
    leaves = expected_leaves(state, config)
    assert_same(arrays, leaves)
    donate = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    assert_same(donate(arrays), {path: leaf + 1 for path, leaf in leaves.items()})


def test_table_goes_both_ways(tmp_path):
    state, config = write_checkpoint(tmp_path, use_bias=True, n_groups=4, tie_word_embeddings=False)
    arrays = {path: np.asarray(array) for path, array in load_weights(tmp_path, config)[0].items()}
    table = checkpoint_table(config)
    assert {stored.name for stored in table} == state.keys()
    for stored in table:
        np.testing.assert_array_equal(
            stored.assemble(arrays), state[stored.name].numpy(), err_msg=stored.name
        )


def test_open_checkpoint_reads_lazily(tmp_path):
    state, _ = write_checkpoint(tmp_path, max_shard_size="9KB", dtype=torch.bfloat16)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors.keys() == state.keys()
        assert checkpoint.nbytes == sum(info.nbytes for info in checkpoint.tensors.values())
        name = "backbone.layers.0.mixer.in_proj.weight"
        info = checkpoint.tensors[name]
        assert (info.dtype, info.shape) == ("BF16", tuple(state[name].shape))
        whole = state[name].float().numpy()
        np.testing.assert_array_equal(checkpoint.read(name).astype(np.float32), whole)
        blocks = [(row, block.copy()) for row, block in checkpoint.blocks(name, 3, 60, block_bytes=500)]
        assert [row for row, _ in blocks] == list(range(3, 60, 7))  # 64 bytes a row: 7 in 500
        np.testing.assert_array_equal(np.concatenate([b for _, b in blocks]).astype(np.float32), whole[3:60])
        with pytest.raises(ValueError, match="rows 3 to 1000"):
            next(checkpoint.blocks(name, 3, 1000))


@pytest.mark.parametrize("piece", [4096, 4 << 20])
def test_weights_that_would_not_fit_twice_are_read_past_the_cache(tmp_path, monkeypatch, piece):
    state, config = write_checkpoint(tmp_path, max_shard_size="9KB", dtype=torch.bfloat16)
    with open_checkpoint(tmp_path) as checkpoint:
        if not checkpoint.bypass_cache():
            pytest.skip("this file system has no uncached reads")
    done = []
    bypass = Checkpoint.bypass_cache
    monkeypatch.setattr(Checkpoint, "bypass_cache", lambda self: done.append(bypass(self)) or done[-1])
    monkeypatch.setattr("mamba2_jax.weights.uncached._UNCACHED_BYTES", piece)
    for available, want in ((2 * 10**9, []), (2 * 10**3, [True]), (None, [True])):
        monkeypatch.setattr("mamba2_jax.weights.load.available_memory", lambda now=available: now)
        arrays, _ = load_weights(tmp_path, config)
        assert_same(arrays, expected_leaves(state, config))
        assert done == want


def test_every_problem_is_listed_before_anything_is_allocated(tmp_path, monkeypatch):
    _, config = write_checkpoint(tmp_path)
    at = "backbone.layers.1.mixer."

    def spoil(tensors):
        del tensors["backbone.norm_f.weight"]
        tensors["backbone.layers.2.norm.weight"] = torch.zeros(32)
        tensors[f"{at}A_log"] = torch.zeros(5)
        tensors[f"{at}in_proj.weight"] = tensors[f"{at}in_proj.weight"].to(torch.int8)

    edit_tensors(tmp_path, spoil)
    monkeypatch.setattr(jax, "device_put", None)
    monkeypatch.setattr("mamba2_jax.weights.shards._aligned_empty", None)
    with pytest.raises(CheckpointError) as caught:
        load_weights(tmp_path, config)
    assert caught.value.problems == (
        "tensor 'backbone.norm_f.weight' is missing",
        "tensor 'backbone.layers.2.norm.weight' (F32 (32,), in model.safetensors) is unexpected",
        f"tensor '{at}in_proj.weight' in model.safetensors is I8, want a float type (F64, F32, F16, BF16)",
        f"tensor '{at}A_log' in model.safetensors has shape (5,), the config wants (4,)",
    )
    assert "4 problems" in str(caught.value)
    assert all(problem in str(caught.value) for problem in caught.value.problems)


@pytest.mark.parametrize(("vocab_size", "relation"), [(64, "fewer"), (32, "more")])
def test_vocabulary_padding_is_explained(tmp_path, vocab_size, relation):
    _, config = write_checkpoint(tmp_path, tie_word_embeddings=False)
    with pytest.raises(
        CheckpointError, match=f"48 rows of vocabulary, {relation} than vocab_size={vocab_size}"
    ):
        load_weights(tmp_path, config.replace(vocab_size=vocab_size))


def test_bias_flags_are_explained(tmp_path):
    _, config = write_checkpoint(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"out_proj.bias' is missing \(use_bias is true in the config\)"
    ):
        load_weights(tmp_path, config.replace(use_bias=True))


def test_tensors_of_another_variant_are_named(tmp_path):
    _, config = write_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers.0.mixer.norm.weight' .* is unexpected"):
        load_weights(tmp_path, config.replace(rmsnorm=False))
    with pytest.raises(CheckpointError, match=r"layers.1.norm2.weight' is missing"):
        load_weights(tmp_path, config.replace(d_intermediate=16))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda d: str(d)[6:]
)
def test_non_finite_weights(tmp_path, dtype, value):
    _, config = write_checkpoint(tmp_path, dtype=dtype)
    name = "backbone.layers.0.mixer.in_proj.weight"

    def spoil(tensors):
        tensors[name][140, 5] = value
        tensors["backbone.norm_f.weight"][:2] = value

    edit_tensors(tmp_path, spoil)
    with pytest.raises(CheckpointError, match="allow_non_finite") as caught:
        load_weights(tmp_path, config)
    assert len(caught.value.problems) == 2
    assert f"tensor '{name}' in model.safetensors has 1 NaN or infinite values" in str(caught.value)
    arrays, report = load_weights(tmp_path, config, allow_non_finite=True, param_dtype=jnp.bfloat16)
    assert not np.isfinite(np.asarray(arrays["backbone.norm_f.weight"], np.float32)[:2]).any()
    assert sum("NaN or infinite" in note for note in report.notes) == 2


def test_cast_that_overflows(tmp_path):
    _, config = write_checkpoint(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors["backbone.norm_f.weight"][:3].fill_(1e6))
    with pytest.raises(CheckpointError, match=r"norm_f.weight' .* has 3 values too large for float16"):
        load_weights(tmp_path, config, param_dtype=jnp.float16)


def test_hub_cache_links(tmp_path):
    repository = tmp_path / "models--someone--tiny"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    state, config = write_checkpoint(snapshot, max_shard_size="9KB")
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        shutil.move(file, blobs / f"{number}")
        file.symlink_to(Path("..", "..", "blobs", f"{number}"))
    assert_same(load_weights(snapshot, config)[0], expected_leaves(state, config))
    (tmp_path / "elsewhere").symlink_to(snapshot)  # a link to the folder is the user's own choice
    assert_same(load_weights(tmp_path / "elsewhere", config)[0], expected_leaves(state, config))


def test_progress_bar(tmp_path, capsys):
    _, config = write_checkpoint(tmp_path)
    capsys.readouterr()
    load_weights(tmp_path, config)
    assert capsys.readouterr() == ("", "")
    load_weights(tmp_path, config, show_progress=True)
    out, error = capsys.readouterr()
    assert out == ""
    assert "loading weights" in error


def test_no_file_stays_open(tmp_path):
    _, config = write_checkpoint(tmp_path, max_shard_size="9KB")
    before = len(os.listdir("/proc/self/fd"))
    load_weights(tmp_path, config)
    with pytest.raises(CheckpointError):
        load_weights(tmp_path, config.replace(vocab_size=64))
    assert len(os.listdir("/proc/self/fd")) == before


_MEASURE = """
import json, sys, threading, time
from mamba2_jax.config import Mamba2Config
from mamba2_jax.weights import load_weights
import jax, jax.numpy as jnp

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

jnp.zeros(1).block_until_ready()
base, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
config = Mamba2Config.from_dict(json.load(open(sys.argv[1] + "/config.json")))
arrays, report = load_weights(sys.argv[1], config, param_dtype=sys.argv[2] if sys.argv[2] != "None" else None)
done = True
thread.join()
print(report, file=sys.stderr)
print(json.dumps([peak - base, sum(array.nbytes for array in arrays.values())]))
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory):
    """A checkpoint of 0.4 GB, its bytes random, and how many there are."""
    folder = tmp_path_factory.mktemp("large")
    config = Mamba2Config(
        hidden_size=1024,
        num_heads=32,
        n_groups=1,
        num_hidden_layers=22,
        vocab_size=50288,
        tie_word_embeddings=True,
    )
    header, end = {}, 0
    for stored in checkpoint_table(config)[:-1]:
        size = 2 * int(np.prod(stored.shape))
        header[stored.name] = {"dtype": "BF16", "shape": stored.shape, "data_offsets": [end, end + size]}
        end += size
    block = np.random.default_rng(0).integers(0, 1 << 16, 1 << 20, np.uint16) & 0xBFFF  # no infinity, no NaN
    with open(folder / "model.safetensors", "wb") as file:
        file.write(pack(header, b""))
        for start in range(0, end, block.nbytes):
            file.write(block.tobytes()[: end - start])
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    yield folder, end
    shutil.rmtree(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("param_dtype", [None, "float32"])
def test_peak_memory(large_checkpoint, param_dtype):
    folder, size = large_checkpoint
    assert 0.39e9 < size < 0.45e9
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_MEASURE), str(folder), str(param_dtype)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[1],
        check=True,
    )
    peak, result = json.loads(run.stdout)
    assert result == size * (1 if param_dtype is None else 2)
    # On CPU the arrays themselves are anonymous memory. Beyond them there are only blocks of 4 MB, their
    # casts, and what the allocator keeps: less than half of the largest tensor, the embedding.
    assert peak < result + 50288 * 1024, f"peak {peak / 1e6:.0f} MB for {result / 1e6:.0f} MB of weights"


def test_random_model_is_random():
    # the comparison above would not see a tensor read from the wrong place if two were equal
    model = random_model(use_bias=True)
    assert all(parameter.std() > 0.3 for parameter in model.parameters() if parameter.numel() > 8)
