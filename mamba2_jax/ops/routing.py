"""Routers of a mixture of experts: which experts a token goes to, and with which weights; all in float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mamba2_jax.typing import Array, Bool, Float, Int


class Routing(NamedTuple):
    """The experts chosen for each token, `k` of `e`."""

    expert_ids: Int[Array, "*b k"]
    gates: Float[Array, "*b k"]  # weight of each chosen expert's output
    probabilities: Float[Array, "*b e"]  # of all experts, sum 1: what `expert_load` takes


def router_logits(hidden: Float[Array, "*b d"], weight: Float[Array, "d e"]) -> Float[Array, "*b e"]:
    """Compute `hidden @ weight` with float32 operands at full precision, whatever their dtypes.

    A choice of experts is not continuous: scores rounded to 16 bits would often tie.
    """
    full = jnp.promote_types(hidden.dtype, jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    return jnp.matmul(hidden.astype(full), weight.astype(full), precision=highest)


def route_by_softmax(logits: Float[Array, "*b e"], top_k: int) -> Routing:
    """Choose the `top_k` largest logits, weighted by the softmax over the chosen ones (Granite, Mixtral).

    >>> routing = route_by_softmax(jnp.log(jnp.array([1.0, 2.0, 5.0, 3.0])), 2)
    >>> routing.expert_ids, routing.gates
    (Array([2, 3], dtype=int32), Array([0.625, 0.375], dtype=float32))
    """
    chosen, ids = jax.lax.top_k(logits, top_k)
    return Routing(ids, jax.nn.softmax(chosen), jax.nn.softmax(logits))


def route_by_sigmoid(
    logits: Float[Array, "*b e"],
    correction: Float[Array, " e"] | None,
    top_k: int,
    *,
    num_groups: int = 1,
    groups_kept: int = 1,
    normalised: bool = True,
    scale: float = 1.0,
) -> Routing:
    """Choose by sigmoid score plus correction, weighted by the score alone (DeepSeek-V3, Nemotron 3).

    Args:
        logits: `(..., e)`.
        correction: `(e,)` added to the scores for the choice only; its gradient is zero.
        top_k: experts per token.
        num_groups: neighbouring experts form this many groups of equal size.
        groups_kept: groups to choose from: those whose two best corrected scores have the largest sums.
        normalised: divide the chosen scores by their sum.
        scale: factor on the weights.

    Source: DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2.
    """
    scores = jax.nn.sigmoid(logits)
    choice = scores if correction is None else scores + correction.astype(scores.dtype)
    if groups_kept < num_groups:
        grouped = choice.reshape(*choice.shape[:-1], num_groups, -1)
        best_two = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)  # (..., groups)
        kept = jax.nn.one_hot(jax.lax.top_k(best_two, groups_kept)[1], num_groups, dtype=bool).any(-2)
        choice = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)
    ids = jax.lax.top_k(choice, top_k)[1]
    gates = jnp.take_along_axis(scores, ids, axis=-1)
    if normalised:
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
    return Routing(ids, gates * scale, scores / scores.sum(-1, keepdims=True))


def expert_load(routing: Routing, mask: Bool[Array, "*b"] | None = None) -> Float[Array, "2 e"]:
    """Average over tokens: the share that goes to each expert, without a gradient, and its probability.

    Args:
        routing: of any number of tokens.
        mask: `(...)` true at the tokens that count; None: all.
    """
    num_experts = routing.probabilities.shape[-1]
    weights = jnp.ones(routing.expert_ids.shape[:-1]) if mask is None else mask
    weights = weights.astype(routing.probabilities.dtype)[..., None]
    chosen = jax.nn.one_hot(routing.expert_ids, num_experts, dtype=weights.dtype).sum(-2)  # (..., e)
    tokens = tuple(range(weights.ndim - 1))
    count = jnp.maximum(weights.sum(), 1)
    share = (chosen * weights).sum(tokens) / count
    return jnp.stack([share, (routing.probabilities * weights).sum(tokens) / count])


def load_balancing_loss(load: Float[Array, "*n 2 e"]) -> Float[Array, ""]:
    r"""Compute the auxiliary loss of an uneven load, $e \sum_i f_i p_i$.

    $f_i$ is the share of the tokens that go to expert $i$, and $p_i$ the mean of the expert's probability,
    both averaged over all leading axes, such as layers. A perfectly even load gives `k`, the number of
    experts per token.

    Args:
        load: `(..., 2, e)` from `expert_load`, of equally many tokens each.

    Source: Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6.

    >>> even = Routing(jnp.array([[0], [1]]), jnp.ones((2, 1)), jnp.full((2, 2), 0.5))
    >>> float(load_balancing_loss(expert_load(even)))
    1.0
    """
    share, probability = load.reshape(-1, *load.shape[-2:]).mean(0)
    return load.shape[-1] * (share * probability).sum()
