"""Make small random models with transformers and load them in both libraries, cached per process."""

import functools
import pathlib
import tempfile

import numpy as np
import pytest

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 16,
    "n_groups": 2,
    "vocab_size": 96,
    "chunk_size": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@functools.cache
def torch_model(dtype: str = "float32", **changes):
    """Return a transformers model whose norms, biases and D are moved off their initial constants."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.requires_grad_(False)
    return model.to(getattr(torch, dtype))


@functools.cache
def checkpoint(dtype: str = "float32", **changes) -> pathlib.Path:
    """Save `torch_model` of the same arguments by transformers, and return the folder."""
    model = torch_model(dtype, **changes)
    name = "_".join([dtype, *(f"{k}={v}" for k, v in changes.items())]).replace("/", "-") or "default"
    folder = pathlib.Path(_folder().name) / name.replace(" ", "")
    model.save_pretrained(folder)
    return folder


@functools.cache
def jax_model(dtype: str = "float32", **changes):
    """Load `checkpoint` of the same arguments as a model of this package."""
    from mamba2_jax import Mamba2ForCausalLM

    return Mamba2ForCausalLM.from_pretrained(checkpoint(dtype, **changes), dtype=dtype)


def random_ids(batch: int, length: int, vocab: int = SIZES["vocab_size"], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocab, (batch, length))


def relative(got, want) -> float:
    """Return the largest absolute difference, divided by the largest absolute wanted value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    return float(np.abs(got - want).max() / np.abs(want).max())


def random_jax_model(config, dtype: str = "float32", seed: int = 0):
    """Return a model with every parameter random, without compiling its initializers."""
    import jax.numpy as jnp

    from mamba2_jax import Mamba2ForCausalLM
    from mamba2_jax.weights import checkpoint_table

    rng = np.random.default_rng(seed)
    leaves = [leaf for stored in checkpoint_table(config) for leaf in stored.leaves]
    arrays = {leaf.path: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), dtype) for leaf in leaves}
    return Mamba2ForCausalLM._from_arrays(config, arrays, dtype=dtype)
