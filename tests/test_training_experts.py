"""Training of models with experts: the auxiliary loss, and the correction of the router's choice."""

import family_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM
from mamba2_jax.training import (
    OptimConfig,
    TrainConfig,
    TrainState,
    loss_fn,
    make_optimizer,
    split_model,
    train_step,
)

COEFFICIENT = 0.3
IDS = np.random.default_rng(0).integers(3, 64, (2, 13))


@jax.jit
def mean_loss(router, model, batch):
    """The loss with the auxiliary one, as a function of the first layer's router."""
    model.backbone.layers[0].experts.router.weight.set_value(router)
    nats, tokens = loss_fn(model, batch, balance=COEFFICIENT, remat="block")
    return nats / tokens


def test_the_auxiliary_loss_is_that_of_transformers():
    theirs = family_models.oracle("granite, experts")
    theirs.zero_grad()
    theirs.router_aux_loss_coef = COEFFICIENT
    want = theirs(torch.tensor(IDS), labels=torch.tensor(IDS), output_router_logits=True)
    want.loss.backward()
    assert COEFFICIENT * want.aux_loss > 0.05 * want.loss  # not lost in the cross entropy
    model = Mamba2ForCausalLM.from_pretrained(family_models.folder("granite, experts"))
    router = model.backbone.layers[0].experts.router.weight[...]
    loss, gradient = jax.value_and_grad(mean_loss)(router, model, {"input_ids": jnp.asarray(IDS)})
    np.testing.assert_allclose(loss, want.loss.item(), rtol=1e-5)
    theirs_gradient = theirs.model.layers[0].block_sparse_moe.router.weight.grad.numpy().T
    assert np.abs(gradient - theirs_gradient).max() < 1e-4 * np.abs(theirs_gradient).max()

    padded = np.pad(IDS, ((0, 0), (0, 6)), constant_values=7)
    mask = np.pad(np.ones_like(IDS), ((0, 0), (0, 6)))
    alone = mean_loss(router, model, {"input_ids": padded, "attention_mask": mask})
    np.testing.assert_allclose(alone, loss, rtol=1e-6)  # padding is no load


def model_of_experts() -> Mamba2ForCausalLM:
    config = Mamba2Config.from_dict(
        {
            **{"model_type": "nemotron_h", "vocab_size": 16, "hidden_size": 8},
            **{"hybrid_override_pattern": "E", "n_routed_experts": 4, "num_experts_per_tok": 2},
            **{"moe_intermediate_size": 4, "moe_shared_expert_intermediate_size": 8},
        }
    )
    model = Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    model.backbone.layers[0].experts.router.correction.set_value(jnp.array([0.1, -0.2, 0.3, 0.05]))
    return model


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_leaves_the_correction_of_the_choice_alone(optimizer):
    structure, trained, frozen = split_model(model_of_experts())
    before = {path: np.asarray(array) for path, array in trained.items()}
    options = OptimConfig(optimizer=optimizer, learning_rate=0.1, weight_decay=0.5)
    update = make_optimizer(options, trained, 10)
    state = TrainState.start(trained, update, jax.random.key(0))
    batch = {"input_ids": np.random.default_rng(0).integers(3, 16, (4, 9))}
    for _ in range(2):
        state, metrics = train_step(
            state, frozen, batch, structure=structure, optimizer=update, balance=COEFFICIENT
        )
        assert metrics.finite
    for path, array in state.params.items():
        same = np.asarray(array).tobytes() == before[path].tobytes()
        assert same == path.endswith("correction"), path


def test_a_factor_that_has_no_meaning_is_refused(tmp_path):
    with pytest.raises(ValueError, match="balance_loss=-1"):
        TrainConfig(tmp_path, balance_loss=-1.0)
    with pytest.raises(ValueError, match="balance=0.1, but the model has no experts"):
        loss_fn(Mamba2ForCausalLM.from_pretrained(), {"input_ids": IDS}, balance=0.1)
