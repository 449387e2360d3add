"""Training on meshes of eight devices: the losses of one device, also from one mesh to another."""

import functools
import shutil

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from meshes import error, mesh_cases, small_config
from training_runs import run_config, texts_file, tokenizer

from mamba2_jax import Mamba2Cache, Mamba2ForCausalLM, generate
from mamba2_jax.mesh import make_mesh
from mamba2_jax.sharding import parameter_shardings
from mamba2_jax.training import CheckpointConfig, DataConfig, LoraOptions, MeshOptions, OptimConfig, Trainer
from mamba2_jax.training.metrics import METRICS_FILE, read_metrics

TOLERANCE = 1e-5  # float32 sums in another order
# Logits and gradients on every mesh are in test_model.py, and tensor 2 x fsdp 4 trains in test_processes.py.
MESHES = mesh_cases(("sequence 2 x tensor 2 x data 2", 1))


def make_model(num_groups: int) -> Mamba2ForCausalLM:
    end = tokenizer().eos_token_id
    config = small_config(num_groups, vocab_size=32, bos_token_id=end, eos_token_id=end, pad_token_id=end)
    return Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))


def is_adam(part) -> bool:
    return isinstance(part, optax.ScaleByAdamState)


def train(folder, num_groups: int, mesh: MeshOptions, **changes):
    """The losses of all steps, and the trainer."""
    options = {"batch_size": 8, "mesh": mesh, "checkpoint": CheckpointConfig(every=10), **changes}
    trainer = Trainer(
        make_model(num_groups), run_config(folder, **options), texts_file(), tokenizer=tokenizer()
    )
    assert trainer.fit().skipped == 0
    return [line["loss"] for line in read_metrics(folder / METRICS_FILE) if "loss" in line], trainer


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    @functools.cache
    def run(num_groups: int, **changes):
        losses, trainer = train(tmp_path_factory.mktemp("alone"), num_groups, MeshOptions(), **changes)
        return losses, {name: np.asarray(array) for name, array in trainer._trained.items()}

    return run


@pytest.mark.parametrize(("sizes", "num_groups"), MESHES)
def test_twenty_steps_are_those_of_one_device(sizes, num_groups, alone, tmp_path):
    want_losses, want = alone(num_groups)
    losses, trainer = train(tmp_path / "run", num_groups, MeshOptions(**sizes))
    assert len(losses) == 20
    np.testing.assert_allclose(losses, want_losses, rtol=TOLERANCE)
    placed = parameter_shardings(want, trainer.model.config, trainer._mesh)
    moments = trainer._optimizer.init(trainer._trained)
    (adam,) = [part for part in jax.tree.leaves(moments, is_leaf=is_adam) if is_adam(part)]
    for path, array in trainer._trained.items():
        for of_its_shape in (array, adam.mu[path], adam.nu[path]):
            assert of_its_shape.sharding.is_equivalent_to(placed[path], array.ndim), path
        # where a gradient is nearly 0, AdamW makes a step of what is rounding
        change = np.linalg.norm(np.asarray(array) - want[path]) / np.linalg.norm(want[path])
        assert change < 10 * TOLERANCE, path
    # the result is a checkpoint like any other
    saved = Mamba2ForCausalLM.from_pretrained(tmp_path / "run" / "model")
    ids = np.arange(8 * 16).reshape(8, 16) % 28
    assert error(trainer.model(ids).logits, saved(ids).logits) < TOLERANCE
    np.testing.assert_array_equal(
        generate(trainer.model, ids, max_new_tokens=4, eos_token_id=()).tokens,
        generate(saved, ids, max_new_tokens=4, eos_token_id=()).tokens,
    )


@pytest.mark.slow
def test_a_run_goes_on_upon_another_mesh(alone, tmp_path):
    """In one process; from two to one, in every run, is in test_processes.py."""
    want, _ = alone(2)
    train(tmp_path / "run", 2, MeshOptions(fsdp=8))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    losses, _ = train(tmp_path / "run", 2, MeshOptions(tensor=2, fsdp=-1), resume=True)
    np.testing.assert_allclose(losses, want, rtol=TOLERANCE)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    losses, _ = train(tmp_path / "run", 2, MeshOptions(), resume=True)
    np.testing.assert_allclose(losses, want, rtol=TOLERANCE)


@pytest.mark.slow
def test_adapters_and_accumulation_on_a_mesh(alone, tmp_path):
    """In one process; in two, in every run, is in test_processes.py."""
    changes = {
        "lora": LoraOptions(rank=2, targets=("embeddings", "in_proj", "conv1d", "out_proj")),
        "accumulate": 2,
        "steps": 4,
    }
    want, _ = alone(2, **changes)
    losses, trainer = train(tmp_path / "run", 2, MeshOptions(tensor=2, fsdp=2, data=2), **changes)
    np.testing.assert_allclose(losses, want, rtol=TOLERANCE)
    assert all("lora" in name for name in trainer._trained)


def test_carried_and_trained_states_on_a_mesh(tmp_path, monkeypatch):
    """A hybrid's, with the gradient passed from piece to piece, also over borders of `sequence`."""
    end = tokenizer().eos_token_id
    attention = {"num_heads": 4, "num_heads_kv": 2, "head_dim": 8, "d_conv": 4, "rotary_emb_dim": 4}
    hybrid = {"attn_layer_idx": (1,), "attn_cfg": attention, "vocab_size": 32}
    config = small_config(2, **hybrid, bos_token_id=end, eos_token_id=end, pad_token_id=end)
    monkeypatch.setitem(globals(), "make_model", lambda _: Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)))
    changes = {
        "data": DataConfig(max_length=16, rows="pad", eval_share=0.1),
        "batch_size": 4, "accumulate": 2, "steps": 4,
        # where a gradient is nearly 0, as that of a bias of all keys, Adam would make a step of rounding
        "optim": OptimConfig(learning_rate=1e-2, eps=1e-3),
        "carry_state": True, "pass_gradient": True, "train_initial_state": True, "attention_context": 20,
    }  # fmt: skip
    want, alone = train(tmp_path / "alone", 2, MeshOptions(), **changes)
    losses, trainer = train(tmp_path / "run", 2, MeshOptions(data=2, sequence=2, tensor=2), **changes)
    np.testing.assert_allclose(losses, want, rtol=TOLERANCE)
    np.testing.assert_allclose(trainer.evaluate().loss, alone.evaluate().loss, rtol=TOLERANCE)
    for name, array in alone._trained.items():
        assert error(trainer._trained[name], array) < 10 * TOLERANCE, name
    assert trainer._trained["initial_state.0"].sharding.spec == PartitionSpec("tensor")
    cache = trainer._empty_cache(trainer._feed.documents)
    for state, axis in ((cache.ssm[0], 1), (cache.conv[0].BC, 3), (cache.attention[1].keys, 2)):
        assert state.addressable_shards[0].data.shape[0] == 2
        assert state.addressable_shards[0].data.shape[axis] == state.shape[axis] // 2
    file = tmp_path / "run" / "initial_state.safetensors"
    saved = Mamba2ForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert error(Mamba2Cache.load(file, saved).ssm[0], alone.initial_state().ssm[0]) < 10 * TOLERANCE


def test_a_batch_that_the_mesh_does_not_divide_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"batch_size=6 is no multiple of mesh.data x mesh.fsdp = 4"):
        train(tmp_path / "run", 2, MeshOptions(data=2, fsdp=2, tensor=2), batch_size=6)
    with pytest.raises(ValueError, match=r"fsdp 3 makes 3 devices, but there are 8"):
        train(tmp_path / "run", 2, MeshOptions(fsdp=3))


def test_a_model_moves_onto_a_mesh_and_loads_onto_one(tmp_path):
    model = make_model(2)
    model.save_pretrained(tmp_path / "model")
    ids = np.arange(3 * 5).reshape(3, 5)  # three rows, which eight devices do not divide
    want = np.asarray(model(ids).logits)
    mesh = make_mesh(fsdp=4, tensor=2)
    loaded = Mamba2ForCausalLM.from_pretrained(tmp_path / "model", sharding=mesh)
    model.to_mesh(mesh)
    for placed in (model, loaded):
        weight = placed.backbone.layers[1].mixer.out_proj.weight[...]
        assert weight.addressable_shards[0].data.size == weight.size // 8
        assert error(placed(ids).logits, want) < TOLERANCE
