"""Fine-tuning: `Trainer` runs a whole training, and its building blocks serve custom training loops.

from mamba2_jax import Mamba2ForCausalLM, load_tokenizer
from mamba2_jax.training import TrainConfig, Trainer

model = Mamba2ForCausalLM.from_pretrained("folder")
config = TrainConfig(output="run", epochs=3)
Trainer(model, config, "texts.jsonl", tokenizer=load_tokenizer("folder")).fit()
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mamba2_jax.training.carry import initial_cache, new_initial_state
    from mamba2_jax.training.checkpoint import CheckpointConfig, Checkpoints, SaveError
    from mamba2_jax.training.config import LoraOptions, MeshOptions, TrainConfig
    from mamba2_jax.training.data import DataConfig, Documents, load_documents, make_pipeline
    from mamba2_jax.training.evaluate import Evaluation
    from mamba2_jax.training.export import initial_state_of
    from mamba2_jax.training.loss import loss_and_cache, loss_fn
    from mamba2_jax.training.on_cpu import keep_freed_memory
    from mamba2_jax.training.optim import OptimConfig, make_optimizer
    from mamba2_jax.training.step import TrainState, eval_step, split_model, train_step
    from mamba2_jax.training.trainer import Trainer, TrainResult

__all__ = [
    "CheckpointConfig",
    "Checkpoints",
    "DataConfig",
    "Documents",
    "Evaluation",
    "LoraOptions",
    "MeshOptions",
    "OptimConfig",
    "SaveError",
    "TrainConfig",
    "TrainResult",
    "TrainState",
    "Trainer",
    "eval_step",
    "initial_cache",
    "initial_state_of",
    "keep_freed_memory",
    "load_documents",
    "loss_and_cache",
    "loss_fn",
    "make_optimizer",
    "make_pipeline",
    "new_initial_state",
    "split_model",
    "train_step",
]

_MODULES = {
    "checkpoint": ("CheckpointConfig", "Checkpoints", "SaveError"),
    "config": ("LoraOptions", "MeshOptions", "TrainConfig"),
    "data": ("DataConfig", "Documents", "load_documents", "make_pipeline"),
    "on_cpu": ("keep_freed_memory",),
    "loss": ("loss_and_cache", "loss_fn"),
    "optim": ("OptimConfig", "make_optimizer"),
    "step": ("TrainState", "eval_step", "split_model", "train_step"),
    "evaluate": ("Evaluation",),
    "carry": ("initial_cache", "new_initial_state"),
    "export": ("initial_state_of",),
    "trainer": ("TrainResult", "Trainer"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    # imported lazily, so that the option classes can be inspected without importing JAX
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
