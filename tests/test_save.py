"""Save checkpoints: transformers reads them back, and folders are written atomically."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from checkpoint_files import write_checkpoint
from flax import nnx
from models import SIZES, random_ids, random_jax_model, relative
from safetensors.torch import load_file

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM, Mamba2Model, load_tokenizer
from mamba2_jax.hub import EMBEDDED_MODEL
from mamba2_jax.weights import new_folder, parse_size

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bytes(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert torch.equal(got[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


ROUND_TRIPS = {
    "tied_float32": {"tie_word_embeddings": True},
    "untied_bfloat16": {"tie_word_embeddings": False, "dtype": torch.bfloat16},
    "biases_float16_sharded": {"use_bias": True, "dtype": torch.float16, "max_shard_size": "9KB"},
    "no_conv_bias_float64": {"use_conv_bias": False, "n_groups": 4, "dtype": torch.float64},
}


@pytest.mark.parametrize("param_dtype", [None, "float32"])
@pytest.mark.parametrize("fields", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_transformers_and_back_gives_the_same_bytes(tmp_path, fields, param_dtype):
    write_checkpoint(tmp_path / "theirs", **fields)
    if fields.get("dtype") == torch.float64:  # JAX holds them as float32
        narrow = {name: tensor.float().double() for name, tensor in stored(tmp_path / "theirs").items()}
        from safetensors.torch import save_file

        save_file(narrow, tmp_path / "theirs" / "model.safetensors")
    model = Mamba2ForCausalLM.from_pretrained(tmp_path / "theirs", param_dtype=param_dtype)
    model.save_pretrained(tmp_path / "ours", max_shard_size=fields.get("max_shard_size", "5GB"))
    assert_same_bytes(stored(tmp_path / "ours"), stored(tmp_path / "theirs"))
    loaded, info = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    theirs = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "theirs")
    assert loaded.dtype == theirs.dtype
    assert_same_bytes(loaded.state_dict(), theirs.state_dict())


def test_the_embedded_model_comes_back_whole(tmp_path):
    model = Mamba2ForCausalLM.from_pretrained()
    model.save_pretrained(tmp_path / "copy")
    assert_same_bytes(stored(tmp_path / "copy"), stored(EMBEDDED_MODEL))
    assert files(tmp_path / "copy") == files(EMBEDDED_MODEL)
    text = "def f(x):\n    return x"
    assert load_tokenizer(tmp_path / "copy").encode(text) == load_tokenizer().encode(text)
    for name in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (EMBEDDED_MODEL / name).read_bytes()
    theirs = json.loads((EMBEDDED_MODEL / "config.json").read_text())
    ours = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert ours == {name: value for name, value in theirs.items() if name != "transformers_version"}


def test_a_model_from_scratch_gives_the_same_logits_in_transformers(tmp_path):
    config = Mamba2Config(**SIZES, rescale_prenorm_residual=True, time_step_limit=(0.001, 0.3), use_bias=True)
    model = random_jax_model(config)
    model.save_pretrained(tmp_path / "new")
    theirs = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "new").eval()
    ids = random_ids(2, 40)
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits
    assert relative(model(ids).logits, want) < 2e-5
    assert theirs.generation_config.eos_token_id == 2
    assert files(tmp_path / "new") == {"config.json", "generation_config.json", "model.safetensors"}


def test_the_bare_model(tmp_path):
    write_checkpoint(tmp_path / "theirs", bare=True)
    Mamba2Model.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    assert_same_bytes(stored(tmp_path / "ours"), stored(tmp_path / "theirs"))
    _, info = transformers.Mamba2Model.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", jnp.float32])
def test_another_dtype_narrows_all_but_what_must_stay_precise(tmp_path, dtype):
    state, _ = write_checkpoint(tmp_path / "theirs")
    Mamba2ForCausalLM.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours", dtype=dtype)
    target = getattr(torch, jnp.dtype(dtype).name)
    for name, tensor in stored(tmp_path / "ours").items():
        kept = name.endswith(("A_log", "dt_bias", ".D"))
        assert torch.equal(tensor, state[name] if kept else state[name].to(target))
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["dtype"] == jnp.dtype(dtype).name


def test_values_too_large_for_the_type_leave_no_folder(tmp_path):
    model = random_jax_model(Mamba2Config(**SIZES))
    model.backbone.norm_f.weight[...] = model.backbone.norm_f.weight[...].at[:3].set(1e6)
    with pytest.raises(ValueError, match=r"backbone.norm_f.weight: 3 values are too large for float16"):
        model.save_pretrained(tmp_path / "new", dtype="float16")
    assert files(tmp_path) == set()


def test_parameters_that_no_checkpoint_has_are_named(tmp_path):
    model = random_jax_model(Mamba2Config(**SIZES))
    model.backbone.layers[0].mixer.out_proj.lora_a = nnx.Param(jnp.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"layers.0.mixer.out_proj.lora_a has no place.*merge adapters"):
        model.save_pretrained(tmp_path / "new")
    assert files(tmp_path) == set()


def test_an_index_with_shards(tmp_path):
    model = random_jax_model(Mamba2Config(**SIZES))
    model.save_pretrained(tmp_path / "new", max_shard_size=20_000)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    assert len(shards) > 2
    for shard in shards:
        tensors = load_file(tmp_path / "new" / shard)
        assert {index["weight_map"][name] for name in tensors} == {shard}
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
    assert index["metadata"]["total_size"] == 4 * model.config.num_parameters()


@pytest.mark.parametrize("size", [0, -1, "5 parsecs", "GB", "", True, None, "1e400GB"])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="max_shard_size="):
        parse_size(size)
    assert parse_size("300 MB") == parse_size(300_000_000) == 300_000_000


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "complex64"])
def test_dtypes_that_hold_no_weights(tmp_path, dtype):
    with pytest.raises(ValueError, match=f"dtype={dtype}: weights are stored as one of bfloat16, float16"):
        Mamba2ForCausalLM.from_pretrained().save_pretrained(tmp_path / "x", dtype=dtype)
    assert files(tmp_path) == set()


def test_an_old_checkpoint_is_replaced_and_other_files_stay(tmp_path):
    folder = tmp_path / "model"
    write_checkpoint(folder, max_shard_size="9KB")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    (folder / "notes.txt").write_text("mine")
    (folder / "optimizer").mkdir()
    (folder / "optimizer" / "state").write_text("kept")
    (folder / "link").symlink_to("notes.txt")
    model = Mamba2ForCausalLM.from_pretrained()
    model.save_pretrained(folder)
    assert files(folder) == files(EMBEDDED_MODEL) | {"notes.txt", "optimizer", "link"}
    assert (folder / "link").read_text() == "mine"
    assert (folder / "optimizer" / "state").read_text() == "kept"
    assert files(tmp_path) == {"model"}
    model.save_pretrained(folder)  # the folder that it came from is no different
    assert_same_bytes(stored(folder), stored(EMBEDDED_MODEL))


def test_a_failure_leaves_the_old_folder_as_it_was(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED_MODEL, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = Mamba2ForCausalLM.from_pretrained(folder)
    model.backbone.norm_f.weight[...] *= 1e30
    with pytest.raises(ValueError, match="too large for float16"):
        model.save_pretrained(folder, dtype="float16")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert files(tmp_path) == {"model"}


@pytest.mark.parametrize("step", ["rename", "fsync", "link"])
def test_a_failure_at_any_step_leaves_the_old_folder(tmp_path, monkeypatch, step):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    (folder / "mine").write_text("mine")
    calls = {"left": 0}
    real = getattr(os, step)

    def failing(*arguments, **options):
        calls["left"] -= 1
        if calls["left"] == -1:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    def contents():
        return {file.name: file.read_text() for file in folder.iterdir()}

    def save():
        with new_folder(folder) as new:
            (new / "config.json").write_text("new")

    for left in range(2 if step == "rename" else 1):
        calls["left"] = left
        with monkeypatch.context() as patch:
            patch.setattr(os, step, failing)
            with pytest.raises(KeyboardInterrupt):
                save()
        assert contents() == {"config.json": "old", "mine": "mine"}
        assert files(tmp_path) == {"model"}
    save()
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        "config.json": "new",
        "mine": "mine",
    }


WRITERS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from mamba2_jax.weights.folder import new_folder

def write(who):
    for turn in range(25):
        with new_folder(sys.argv[1]) as folder:
            for name in "config.json", "model.safetensors":
                (folder / name).write_text(f"{who} {turn}")

list(ThreadPoolExecutor(2).map(write, sys.argv[2:]))
"""


def test_several_writers_of_one_folder(tmp_path):
    """Two processes of two threads each: who ends last leaves a whole checkpoint, and nothing beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    command = [sys.executable, "-c", WRITERS, str(folder)]
    processes = [subprocess.Popen([*command, *who], stderr=subprocess.PIPE) for who in ("ab", "cd")]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert files(tmp_path) == {"model"}
    texts = {(folder / name).read_text() for name in ("config.json", "model.safetensors")}
    assert len(texts) == 1
    assert (folder / "mine").read_text() == "mine"


def test_places_that_cannot_be_replaced(tmp_path, monkeypatch):
    model = Mamba2ForCausalLM.from_pretrained()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match="name a folder for the checkpoint"):
        model.save_pretrained(file)
    monkeypatch.chdir(tmp_path)
    for place in (".", tmp_path, tmp_path.parent):
        with pytest.raises(ValueError, match="the current folder or around it"):
            model.save_pretrained(place)
    with pytest.raises(ValueError, match="a mount point"):
        model.save_pretrained("/proc")
    assert files(tmp_path) == {"file"}


def test_a_link_to_a_folder_keeps_pointing_at_it(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    Mamba2ForCausalLM.from_pretrained().save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert "model.safetensors" in files(tmp_path / "real")
    assert files(tmp_path) == {"link", "real"}


def test_what_transformers_lacks_is_refused_with_the_way_out(tmp_path):
    config = Mamba2Config(**SIZES, D_has_hdim=True)
    with pytest.raises(NotImplementedError, match="D_has_hdim"):
        Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)).save_pretrained(tmp_path / "x")
    assert files(tmp_path) == set()


def test_numbers_are_what_the_parameters_are_now(tmp_path):
    model = random_jax_model(Mamba2Config(**SIZES))
    model.save_pretrained(tmp_path / "new")
    got = stored(tmp_path / "new")["backbone.layers.1.mixer.in_proj.weight"]
    zx = np.asarray(model.backbone.layers[1].mixer.in_proj.weight_zx[...])
    np.testing.assert_array_equal(got[:64].numpy(), zx[:, 0].T)
    np.testing.assert_array_equal(got[64:128].numpy(), zx[:, 1].T)
