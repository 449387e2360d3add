"""Test that checkpoints, adapters and a training run written by an early version load unchanged.

`data/before_folders` was written by commit babba9a, on a CPU: a model; an adapter for it with all values
random; a training run of 4 steps on the model, of which only the checkpoint of step 2 was kept; and in the
state-spaces form, in bfloat16, a model, a hybrid with attention and MLPs, and an adapter for the hybrid.
`numbers.json` holds the outputs of that commit for these files, and the losses of all 4 steps.
"""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from mamba2_jax import Mamba2ForCausalLM
from mamba2_jax.lora import load_lora
from mamba2_jax.training import CheckpointConfig, DataConfig, OptimConfig, TrainConfig, Trainer
from mamba2_jax.training.checkpoint import Checkpoints, _flatten
from mamba2_jax.training.data import Documents, Report

FOLDER = pathlib.Path(__file__).parent / "data" / "before_folders"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another processor's order


@pytest.fixture(scope="module")
def numbers() -> dict:
    return json.loads((FOLDER / "numbers.json").read_text())


def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 32, (1, 8))


def make_model(name: str = "model") -> Mamba2ForCausalLM:
    return Mamba2ForCausalLM.from_pretrained(FOLDER / name, dtype="float32")


def make_trainer(output: pathlib.Path, report) -> Trainer:
    lengths = np.random.default_rng(2).integers(5, 14, 40)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.random.default_rng(3).integers(2, 32, starts[-1]).astype(np.int32)
    trained = np.ones(len(tokens), bool)
    config = TrainConfig(
        output=output,
        resume=True,
        # That commit's schedules ended one step after the last, so its 4 steps are the first of 5 today. The
        # fifth is made at a rate of 0 and changes nothing.
        steps=5,
        batch_size=2,
        tensorboard=False,
        progress=False,
        data=DataConfig(max_length=24),
        optim=OptimConfig(learning_rate=1e-2, warmup=1),
        checkpoint=CheckpointConfig(every=2),
    )
    documents = Documents(tokens, trained, starts, lengths, Report(40, 40, len(tokens), 0))
    return Trainer(make_model(), config, documents, report=report)


@pytest.fixture
def run_folder(tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(FOLDER / "run", tmp_path / "run"))


def test_a_checkpoint(numbers):
    np.testing.assert_allclose(make_model()(ids()).logits, numbers["logits"], **TOLERANCE)


def test_an_adapter(numbers):
    model = make_model()
    load_lora(model, FOLDER / "adapter")
    np.testing.assert_allclose(model(ids()).logits, numbers["adapter_logits"], **TOLERANCE)


@pytest.mark.parametrize("name", ["state_spaces", "hybrid"])
def test_a_checkpoint_in_the_state_spaces_form(name, numbers):
    np.testing.assert_allclose(make_model(name)(ids()).logits, numbers[f"{name}_logits"], **TOLERANCE)


def test_an_adapter_of_a_hybrid(numbers):
    model = make_model("hybrid")
    load_lora(model, FOLDER / "hybrid_adapter")
    np.testing.assert_allclose(model(ids()).logits, numbers["hybrid_adapter_logits"], **TOLERANCE)


def test_the_state_of_a_run(run_folder, numbers):
    trainer = make_trainer(run_folder, lambda message: None)
    checkpoints = Checkpoints(run_folder / "checkpoints", trainer.config.checkpoint)
    state, _ = trainer._start(checkpoints)
    checkpoints.close()
    arrays = {name: array for name, array in _flatten(state).items() if name in numbers["state"]}
    assert int(state.step) == 2
    assert arrays.keys() == numbers["state"].keys()
    for name, array in arrays.items():  # the bytes are checked by the stored checksums
        np.testing.assert_allclose(float(jnp.linalg.norm(array)), numbers["state"][name], rtol=1e-6)


def test_a_run_goes_on(run_folder, numbers):
    said = []
    trainer = make_trainer(run_folder, said.append)
    assert trainer.fit().step == 5
    assert "going on from step 2 of 5" in said
    assert "steps: 4 until now, 5 from here on" in said
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose([line["loss"] for line in lines[:4]], numbers["losses"], rtol=1e-5)
    # Adam normalizes gradients, which amplifies the rounding errors of small ones.
    np.testing.assert_allclose(trainer.model(ids()).logits, numbers["trained_logits"], rtol=1e-4, atol=1e-4)
