"""Checks of a run's options against its model, its devices and its output folder."""

import importlib.util
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from mamba2_jax.mesh import BATCH, axis_size
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.sharding import splits_batch
from mamba2_jax.training.carry import new_initial_state
from mamba2_jax.training.config import TrainConfig
from mamba2_jax.training.folder import TOKENIZER, TOKENS
from mamba2_jax.training.result import form_of_result


def check_run(config: TrainConfig, model: Mamba2ForCausalLM, output: pathlib.Path, eval_data: Any) -> None:
    """Refuse options that fit neither the output folder, nor the model, nor one another."""
    check_output(config, output)
    check_evaluation(config, eval_data)
    check_states(config, model)
    check_result(config, model)


def check_output(config: TrainConfig, output: pathlib.Path) -> None:
    """Refuse an output folder that holds anything but tokens and a tokenizer, unless the run resumes."""
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output}: is a file; name a folder")
    used = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if not config.resume and used - {TOKENS, TOKENIZER}:
        raise FileExistsError(
            f"{output}: is not empty; go on from what is in it with resume, or name another folder"
        )


def check_result(config: TrainConfig, model: Mamba2ForCausalLM) -> None:
    """Refuse a model that could not be saved, before it is trained."""
    saves_adapter = config.lora.config() is not None and not config.lora.merge
    if saves_adapter or form_of_result(model) == "transformers" or importlib.util.find_spec("torch"):
        return
    raise ImportError(
        "Trainer: the model can be saved in the form of state-spaces alone, for which PyTorch is missing: "
        "pip install 'mamba2-jax-flax[torch]'"
    )


def check_states(config: TrainConfig, model: Mamba2ForCausalLM) -> None:
    """Refuse options of states that the model does not have."""
    if config.attention_context is not None and not model.config.attends:
        raise ValueError(
            f"Trainer: attention_context={config.attention_context}, but the model has no attention layers; "
            "its state is of one size"
        )
    if config.train_initial_state and not new_initial_state(model.config):
        raise ValueError("Trainer: train_initial_state, but the model has no Mamba-2 layers")


def check_mesh(config: TrainConfig, mesh: Mesh | None) -> None:
    """Refuse a mesh that the processes, the rows or other options do not fit."""
    if mesh is None and jax.process_count() > 1:
        raise ValueError(
            f"Trainer: {jax.process_count()} processes, and no mesh of their devices; "
            "set mesh.data or mesh.fsdp to -1, which is all of them"
        )
    if mesh is not None:
        if config.lora.use_dora and axis_size(mesh, "tensor") > 1:
            raise ValueError(
                "Trainer: lora.use_dora needs whole weights for its norms; leave mesh.tensor at 1"
            )
        if not splits_batch(mesh, config.batch_size):
            raise ValueError(
                f"Trainer: batch_size={config.batch_size} is no multiple of mesh.data x mesh.fsdp = "
                f"{axis_size(mesh, *BATCH)}"
            )
        if config.tokens_per_turn:
            raise ValueError(
                f"Trainer: tokens_per_turn={config.tokens_per_turn} is for one device; on a mesh, make "
                "batch_size smaller and accumulate larger"
            )


def check_evaluation(config: TrainConfig, eval_data: Any) -> None:
    """Refuse options of evaluation without evaluation data, or with two kinds of it."""
    share = config.data.eval_share
    if share and eval_data is not None:
        raise ValueError(
            f"Trainer: eval_data and data.eval_share={share} both say what is held out; give one of them"
        )
    if config.eval_every is not None and not share and eval_data is None:
        raise ValueError(
            f"Trainer: eval_every={config.eval_every} needs evaluation data: eval_data or data.eval_share"
        )
