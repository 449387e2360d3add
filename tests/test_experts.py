"""Mixture of experts: each implementation against all experts for every token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import relative

from mamba2_jax.config.experts import ExpertsConfig
from mamba2_jax.ops.experts import ACTIVATIONS, IMPLEMENTATIONS, experts, sort_into_blocks

# float32 sums in another order; gradients of weights sum over the tokens as well.
TOLERANCE, GRADIENTS = 2e-6, 1e-5
# Operands, and what an expert computes inside, are rounded to 2**-9.
HALF = 2e-2


def draw(activation, tokens=37, e=6, k=2, d=16, m=24, dtype="float32"):
    """Arguments of `experts`; no token goes to the last expert, and many to the first."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(tokens, e)) + np.r_[2, np.zeros(e - 2), -np.inf]
    ids = np.argsort(-scores, axis=1)[:, :k].astype(np.int32)
    pair = (2,) if activation == "silu_gated" else ()
    shapes = {"x": (tokens, d), "up": (e, *pair, m, d), "down": (e, d, m)}
    arrays = {name: rng.normal(size=shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    arrays = {name: jnp.asarray(array, dtype) for name, array in arrays.items()}
    return arrays | {"expert_ids": jnp.asarray(ids), "gates": jnp.asarray(rng.uniform(size=(tokens, k)))}


def by_every_expert(x, up, down, expert_ids, gates, *, activation, **_):
    """All experts for every token, weighted by gates that are 0 for those not chosen."""
    x, up, down = (array.astype(jnp.float32) for array in (x, up, down))
    gates = (jax.nn.one_hot(expert_ids, len(down)) * gates[..., None]).sum(-2)
    inner = jnp.einsum("...d,e...md->...em" if up.ndim == 3 else "td,ecmd->tecm", x, up)
    inner = jax.nn.silu(inner[:, :, 0]) * inner[:, :, 1] if up.ndim == 4 else jax.nn.relu(inner) ** 2
    return jnp.einsum("...em,edm,...e->...d", inner, down, gates)


@partial(jax.jit, static_argnames=("op", "activation", "implementation", "dtype"))
def loss_and_gradients(op, arguments, activation, implementation=None, dtype="float32"):
    ids = arguments["expert_ids"]

    def loss(arrays):
        y = op(**arrays, expert_ids=ids, activation=activation, implementation=implementation, dtype=dtype)
        return jnp.sin(3 * y).sum(), y

    arrays = {name: array for name, array in arguments.items() if name != "expert_ids"}
    return jax.grad(loss, has_aux=True)(arrays)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [37, 1])
def test_values_and_every_gradient(tokens, implementation, activation):
    arguments = draw(activation, tokens)
    gradients, y = loss_and_gradients(experts, arguments, activation, implementation)
    wanted, want = loss_and_gradients(by_every_expert, arguments, activation)
    assert relative(y, want) < TOLERANCE
    for name, gradient in gradients.items():
        assert relative(gradient, wanted[name]) < GRADIENTS, name
    assert not gradients["up"][-1].any()  # of an expert without tokens


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision(implementation):
    arguments = draw("silu_gated", dtype="bfloat16")
    gradients, y = loss_and_gradients(experts, arguments, "silu_gated", implementation, "bfloat16")
    wanted, want = loss_and_gradients(by_every_expert, arguments, "silu_gated")
    assert y.dtype == jnp.float32
    assert relative(y, want) < HALF
    for name, gradient in gradients.items():
        assert gradient.dtype == arguments[name].dtype
        assert relative(gradient.astype(jnp.float32), wanted[name].astype(jnp.float32)) < HALF, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_forward_mode_and_second_derivatives(implementation):
    arguments = draw("relu2", 9)
    ids = arguments.pop("expert_ids")
    tangents = jax.tree.map(lambda array: jnp.cos(3 * array), arguments)

    @partial(jax.jit, static_argnums=0)
    def derivatives(op, arrays, tangents):
        def loss(arrays):
            options = {"activation": "relu2", "dtype": jnp.float32, "implementation": implementation}
            return jnp.sin(op(**arrays, expert_ids=ids, **options)).sum()

        return jax.jvp(jax.value_and_grad(loss), (arrays,), (tangents,))[1]

    got = derivatives(experts, arguments, tangents)
    want = derivatives(by_every_expert, arguments, tangents)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(one, other) < GRADIENTS


def test_vmap_over_weights_and_over_tokens():
    arguments = draw("relu2", 9)
    op = jax.jit(partial(experts, activation="relu2", dtype=jnp.float32))
    want = op(**arguments)
    two = {name: jnp.stack([array, array[::-1]]) for name, array in arguments.items()}
    mapped = dict.fromkeys(arguments, 0)
    got = jax.jit(jax.vmap(lambda arrays: op(**arrays), in_axes=(mapped,)))(two)
    assert relative(got[0], want) < TOLERANCE
    assert relative(got[1], op(**{name: array[::-1] for name, array in arguments.items()})) < TOLERANCE


@pytest.mark.parametrize("count", [1, 2, 4])
def test_tokens_alone_equal_the_whole(count):
    arguments = draw("silu_gated")
    op = jax.jit(partial(experts, activation="silu_gated", dtype=jnp.float32))
    some = {name: array[5 : 5 + count] for name, array in arguments.items() if name not in ("up", "down")}
    assert relative(op(**{**arguments, **some}), op(**arguments)[5 : 5 + count]) < TOLERANCE


def test_no_token_depends_on_another():
    arguments = draw("relu2")
    op = jax.jit(partial(experts, activation="relu2", dtype=jnp.float32))
    want = op(**arguments)
    spoilt = arguments["x"].at[:5].set(jnp.nan)
    got = op(**{**arguments, "x": spoilt, "expert_ids": arguments["expert_ids"].at[:5].set(0)})
    assert relative(got[5:], want[5:]) < TOLERANCE


@pytest.mark.parametrize("block", [1, 4, 32])
def test_blocks_hold_one_experts_pairs_and_only_those(block):
    ids = np.asarray(draw("relu2")["expert_ids"])
    plan = jax.tree.map(np.asarray, jax.jit(sort_into_blocks, static_argnums=(1, 2))(ids, 6, block))
    tokens, of_blocks = plan.tokens.reshape(-1, block), plan.groups.of_blocks
    found = {
        (token, of_blocks[i])
        for i in range(plan.groups.blocks)
        for token in tokens[i]
        if token != len(ids)  # fills a block
    }
    assert found == {(token, expert) for token, chosen in enumerate(ids) for expert in chosen}
    assert (plan.tokens < len(ids)).sum() == ids.size
    np.testing.assert_array_equal(plan.tokens[plan.slots], np.arange(len(ids))[:, None].repeat(2, 1))
    counts = np.bincount(ids.ravel(), minlength=6)
    assert plan.groups.blocks == (-(-counts // block)).sum()
    np.testing.assert_array_equal(plan.groups.sizes, -(-counts // block) * block)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "activation='gelu' is not one of"),
        ({"implementation": "dense"}, "implementation='dense' is not one of"),
        ({"activation": "silu_gated"}, "up has rank 3"),
        ({"expert_ids": jnp.zeros((3, 2), int)}, r"expert_ids \(3, 2\)"),
        ({"gates": jnp.zeros((37, 1))}, "gates has shape"),
        ({"down": jnp.zeros((6, 24, 16))}, "down has shape"),
        ({"expert_ids": jnp.zeros((37, 2))}, "expert_ids is float32, wants integers"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(ValueError, match=f"experts: .*{message}"):
        experts(**{**draw("relu2"), "activation": "relu2", "dtype": jnp.float32, **change})


def test_a_config_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="top_k=9 is more than the 4 experts .*scale=2.0 has no meaning"):
        ExpertsConfig(num_experts=8, width=4, top_k=9, gated=True, num_groups=2, scale=2.0)
    with pytest.raises(ValueError, match="width=0, wants an integer .*; gated=1, wants true or false"):
        ExpertsConfig(num_experts=8, width=0, top_k=2, gated=1)
