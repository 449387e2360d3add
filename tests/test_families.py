"""Models of the families on the Mamba-2 mixer against transformers, and where it is wrong, against themselves."""

import family_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM
from mamba2_jax.training import loss_fn

IDS = np.random.default_rng(0).integers(3, 64, (2, 13))
names = pytest.mark.parametrize("name", family_models.VARIANTS)
_models: dict[str, Mamba2ForCausalLM] = {}


def model_of(name):
    if name not in _models:
        _models[name] = Mamba2ForCausalLM.from_pretrained(family_models.folder(name))
    return _models[name]


def relative_error(got, want):
    want = np.asarray(want, np.float64)
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


@names
def test_logits_are_those_of_transformers(name):
    with torch.no_grad():
        want = family_models.oracle(name)(torch.tensor(IDS)).logits.numpy()
    assert relative_error(model_of(name)(jnp.array(IDS)).logits, want) < 2e-5


@names
def test_gradients_are_those_of_autograd(name):
    theirs = family_models.oracle(name)
    theirs.zero_grad()
    logits = theirs(torch.tensor(IDS)).logits[:, :-1]
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(IDS[:, 1:]).flatten(), reduction="sum"
    ).backward()
    want = {path: value.grad for path, value in theirs.named_parameters() if value.grad is not None}
    model = model_of(name)
    gradients = jax.grad(lambda model: loss_fn(model, {"input_ids": jnp.array(IDS)})[0])(model)
    got = gradients_by_file_name(gradients, model.config)
    assert got.keys() == {to_file_name(path, got) for path in want}
    for path, gradient in want.items():
        assert relative_error(got[to_file_name(path, got)], gradient.numpy()) < 1e-4, path
