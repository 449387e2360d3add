"""Checkpoints whose names or sizes differ from the config's as a whole: read with a note, or one sentence."""

import json
import time

import numpy as np
import pytest
from checkpoint_files import edit_tensors, write_checkpoint

from mamba2_jax.cli.info import describe
from mamba2_jax.config import Mamba2Config
from mamba2_jax.weights import CheckpointError, load_weights
from mamba2_jax.weights.convert import convert


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of 6 layers, its config, and its arrays."""
    folder = tmp_path_factory.mktemp("names")
    _, config = write_checkpoint(folder, num_hidden_layers=6)
    return folder, config, load_weights(folder, config)[0]


@pytest.fixture
def copy(checkpoint, tmp_path):
    folder, config, _ = checkpoint
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path, config


def rename(folder, change):
    def edit(tensors):
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    edit_tensors(folder, edit)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"module.model._orig_mod.{name}",
        lambda name: f"model.model.{name}",
        lambda name: name.replace(".mixer.", "._checkpoint_wrapped_module.mixer."),
        lambda name: f"_orig_mod.{name.removeprefix('backbone.')}",
    ],
)
def test_wrappers_are_taken_off_with_a_note(change, copy, checkpoint, tmp_path):
    folder, config = copy
    rename(folder, change)
    arrays, report = load_weights(folder, config)
    assert any("prefix of a wrapper" in note for note in report.notes)
    for path, array in checkpoint[2].items():
        np.testing.assert_array_equal(arrays[path], array)
    convert(folder, tmp_path / "converted")
    assert not load_weights(tmp_path / "converted", config)[1].notes


def test_two_names_of_one_tensor_are_not_merged(copy):
    folder, config = copy
    edit_tensors(folder, lambda tensors: tensors.update({"module.lm_head.weight": tensors["lm_head.weight"]}))
    with pytest.raises(CheckpointError, match=r"'module\.lm_head\.weight' .* is unexpected"):
        load_weights(folder, config)


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (lambda name: f"student.net.{name}", {}, "begin with 'student.net.backbone.', which is not known"),
        (None, {"num_hidden_layers": 30}, "num_hidden_layers=30, but the files hold 6 layers"),
        (None, {"num_hidden_layers": 4}, "num_hidden_layers=4, but the files hold 6 layers"),
        (None, {"use_conv_bias": False}, "conv1d.bias' .* is unexpected; the same holds for 5 more"),
        (None, {"state_size": 4}, "the config wants .*; the same holds for 5 more"),
        (None, {"hidden_size": 64, "num_heads": 8}, "wants"),
        (None, {"num_hidden_layers": 99}, "num_hidden_layers=99, but the files hold 57 tensors"),
        (None, {"vocab_size": 10**6}, "config describes 64,.* but the files hold .* do not belong together"),
    ],
)
def test_many_problems_of_one_cause_are_one_sentence(change, fields, message, copy):
    folder, config = copy
    if change:
        rename(folder, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_weights(folder, config.replace(**fields))
    assert len(str(error.value)) < 2500


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"num_hidden_layers": 10_000_000}, "num_hidden_layers=10000000, wants a positive integer"),
        ({"num_hidden_layers": 16_000}, "num_hidden_layers=16000, but the files hold"),
        ({"hidden_size": 2**24, "num_heads": 2**20, "head_dim": 32}, "do not belong together"),
        ({"vocab_size": 2**31 - 1}, "do not belong together"),
        ({"state_size": 2**40}, "state_size=1099511627776, wants a positive integer"),
        ({"model_type": "bamba", "num_hidden_layers": 2**60}, "num_hidden_layers=1152921504606846976"),
        (
            {"model_type": "granitemoehybrid", "num_local_experts": 2**28, "mamba_n_heads": 8},
            "do not belong together",
        ),
        ({"layer_types": ["x" * 9] * 10**5, "model_type": "bamba"}, "layers_block_type"),
    ],
)
def test_sizes_beyond_the_files_are_refused_at_once(size, message, copy, tmp_path):
    folder, _ = copy
    config = json.loads((folder / "config.json").read_text()) | size
    if "model_type" in size:
        config = {"hidden_size": 32, "vocab_size": 48, **size}
    (folder / "config.json").write_text(json.dumps(config))

    def load():
        return load_weights(folder, Mamba2Config.from_pretrained(folder))

    for attempt in (load, lambda: convert(folder, tmp_path / "new"), lambda: describe(str(folder))):
        began = time.process_time()  # not of the clock, which other tests slow down
        with pytest.raises(ValueError, match=message) as error:
            attempt()
        assert time.process_time() - began < 1
        assert len(str(error.value)) < 4000
