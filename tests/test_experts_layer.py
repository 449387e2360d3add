"""Layers with experts against transformers; and in training, with the auxiliary loss."""

import dataclasses
from functools import cache

import family_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from models import relative
from transformers.models.granitemoehybrid import modeling_granitemoehybrid
from transformers.models.nemotron_h import modeling_nemotron_h

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM
from mamba2_jax.config.experts import ExpertsConfig
from mamba2_jax.layers.experts import Experts
from mamba2_jax.ops import routing
from mamba2_jax.training import (
    OptimConfig,
    TrainConfig,
    TrainState,
    loss_fn,
    make_optimizer,
    split_model,
    train_step,
)

# float32 sums in another order; gradients of weights sum over the tokens as well.
TOLERANCE, GRADIENTS = 2e-6, 1e-5
COEFFICIENT = 0.3
IDS = np.random.default_rng(0).integers(3, 64, (2, 13))
SIZES = {"hidden_size": 32, "num_experts_per_tok": 2}
NEMOTRON = SIZES | {
    "n_routed_experts": 8,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
    "layers_block_type": ["moe"],
}
SIGMOID = ExpertsConfig(num_experts=8, width=24, top_k=2, gated=False, router="sigmoid", scale=2.5)
PEERS = {
    "granite": (
        {"num_local_experts": 8, "intermediate_size": 24},
        {"gated": True, "router": "softmax", "scale": 1.0},
    ),
    "nemotron": ({}, {}),
    "two of four groups": ({"n_group": 4, "topk_group": 2}, {"num_groups": 4, "groups_kept": 2}),
    "not normalised": ({"norm_topk_prob": False}, {"normalised": False}),
    "latent": ({"moe_latent_size": 16}, {"latent_size": 16}),
}


@cache
def peer(name):
    """The layer of transformers with random weights, and ours with the same."""
    changes, options = PEERS[name]
    if name == "granite":
        config = transformers.GraniteMoeHybridConfig(**SIZES, mamba_n_heads=8, mamba_d_head=8, **changes)
        theirs = modeling_granitemoehybrid.GraniteMoeHybridMoE(config)
    else:
        config = transformers.NemotronHConfig(**NEMOTRON, **changes)
        theirs = modeling_nemotron_h.NemotronHMoE(config)
    torch.manual_seed(0)
    for tensor in (*theirs.parameters(), *theirs.buffers()):
        torch.nn.init.normal_(tensor, std=0.3)
    ours = Experts(dataclasses.replace(SIGMOID, **options), 32, rngs=nnx.Rngs(0))
    for path, array in named(theirs).items():
        leaf = ours
        for part in path.split("."):
            leaf = getattr(leaf, part)
        leaf[...] = jnp.asarray(array)
    return theirs, ours


NAMES = {
    "router.weight": "router.weight",
    "gate.weight": "router.weight",
    "gate.e_score_correction_bias": "router.correction",
    "experts.gate_up_proj": "up",
    "experts.up_proj": "up",
    "experts.down_proj": "down",
    "fc1_latent_proj.weight": "fc1_latent.weight",
    "fc2_latent_proj.weight": "fc2_latent.weight",
}


def named(theirs, gradients=False):
    """Arrays of the layer of transformers by our paths and in our shapes."""
    found = {}
    for name, tensor in (*theirs.named_parameters(), *theirs.named_buffers()):
        if name not in NAMES or (gradients and tensor.grad is None):
            continue
        array = (tensor.grad if gradients else tensor).detach().numpy()
        if name == "experts.gate_up_proj":
            array = array.reshape(len(array), 2, -1, array.shape[-1])
        found[NAMES[name]] = array.T if array.ndim == 2 else array
    return found


@pytest.mark.parametrize("name", PEERS)
def test_the_layer_and_its_gradients_equal_transformers(name):
    theirs, ours = peer(name)
    hidden = np.random.default_rng(0).normal(size=(2, 21, 32)).astype(np.float32)
    theirs.zero_grad()
    x = torch.tensor(hidden, requires_grad=True)
    want = theirs(x) - (theirs.shared_experts(x) if name != "granite" else 0)
    torch.sin(3 * want).sum().backward()
    graph, parameters = nnx.split(ours)

    @jax.jit
    def run(parameters, hidden):
        def loss(parameters, hidden):
            y = nnx.merge(graph, parameters)(hidden)
            return jnp.sin(3 * y).sum(), y

        return jax.grad(loss, (0, 1), has_aux=True)(parameters, hidden)

    (gradients, of_hidden), y = run(parameters, hidden)
    assert relative(y, want.detach()) < 2e-5
    assert relative(of_hidden, x.grad) < 1e-4
    gradients = {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(gradients)}
    wanted = named(theirs, gradients=True)
    correction = gradients.pop("router.correction", jnp.zeros(1))
    assert not correction.any()
    assert gradients.keys() == wanted.keys()
    for path, gradient in gradients.items():
        assert relative(gradient, wanted[path]) < 1e-4, path


@pytest.mark.parametrize("masked", [False, True])
def test_the_balance_loss_equals_transformers(masked):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 2 * 11, 8)).astype(np.float32)  # layers, tokens, experts
    mask = rng.integers(0, 2, (2, 11)) if masked else None
    layers = tuple(torch.tensor(logits, requires_grad=True))
    leaf = [layer.detach().requires_grad_() for layer in layers]
    want = modeling_granitemoehybrid.load_balancing_loss_func(
        tuple(leaf), 8, 2, None if mask is None else torch.tensor(mask)
    )
    want.backward()

    def loss(logits):
        chosen = routing.route_by_softmax(logits, 2)
        flat = None if mask is None else jnp.asarray(mask.reshape(-1) != 0)
        load = jax.vmap(lambda chosen: routing.expert_load(chosen, flat))(chosen)
        return routing.load_balancing_loss(load)

    got, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
    assert relative(got, want.detach()) < TOLERANCE
    assert relative(gradient, np.stack([one.grad.numpy() for one in leaf])) < GRADIENTS


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
