"""Mixture of experts: run each token through its chosen experts, and no other.

1. pairs of token and chosen expert are sorted by expert, into blocks that hold one expert's pairs each;
2. the tokens of the pairs go through their experts' two matrices, block by block (`ops.grouped`);
3. each token sums the outputs of its pairs, weighted by its gates.

No token is dropped, and none depends on another.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mamba2_jax.mesh import BATCH, SEQUENCE, TENSOR, axis_size, check_mesh
from mamba2_jax.ops.checks import check_choice, check_dtype, check_integer, check_shape
from mamba2_jax.ops.device import on_device_of, platform
from mamba2_jax.ops.gate import silu_gate
from mamba2_jax.ops.grouped import Groups, grouped_product
from mamba2_jax.ops.quantized import QuantizedWeight, input_pieces, spec_of
from mamba2_jax.ops.quantized_groups import quantized_grouped_product
from mamba2_jax.typing import Array, DTypeLike, Float, Int

IMPLEMENTATIONS = ("blocks", "ragged_dot")
ACTIVATIONS = ("silu_gated", "relu2")


def experts(
    x: Float[Array, "*t d"],
    up: Float[Array, "e *c m d"] | QuantizedWeight,
    down: Float[Array, "e d m"] | QuantizedWeight,
    expert_ids: Int[Array, "*t k"],
    gates: Float[Array, "*t k"],
    *,
    activation: str,
    dtype: DTypeLike,
    implementation: str | None = None,
) -> Float[Array, "*t d"]:
    r"""Compute $\sum_i \mathrm{gate}_i\, W^\mathrm{down}_i\, \phi(W^\mathrm{up}_i x)$ over a token's experts.

    Args:
        x: tokens `(..., d)`.
        up: `(e, m, d)`; for `"silu_gated"` `(e, 2, m, d)`, first the gate, then the value.
        down: `(e, d, m)`; both are arrays, or both quantized.
        expert_ids: `(..., k)`, from 0 to e - 1, different for each token's choices.
        gates: `(..., k)`; 0 for padding, which may name any experts.
        activation: `"silu_gated"`, `silu(gate) * value`, or `"relu2"`, `relu(x) ** 2`.
        dtype: dtype that the operands of the products are cast to, in the backward pass too.
        implementation: `"blocks"`, a loop over blocks of one expert each; `"ragged_dot"`,
            `jax.lax.ragged_dot_general`, which computes every expert for every token on a CPU; None:
            `"ragged_dot"` on a TPU, else `"blocks"`. Both have forward and reverse mode of any order. For
            quantized experts there is only `"blocks"`.

    Returns:
        `(..., d)` in float32 (float64 when `dtype` is).

    Raises:
        ValueError: an invalid shape, dtype or option; the message names the argument.

    >>> x, ids = jnp.ones((1, 2)), jnp.array([[2, 0]])
    >>> up, down = jnp.ones((3, 4, 2)), jnp.arange(3.0)[:, None, None] * jnp.ones((3, 2, 4))
    >>> experts(x, up, down, ids, jnp.array([[0.5, 0.5]]), activation="relu2", dtype=jnp.float32)
    Array([[16., 16.]], dtype=float32)
    """
    check_arguments("experts", x, up, down, expert_ids, gates, activation, implementation)
    with on_device_of(x, expert_ids, gates, *jax.tree.leaves((up, down))):
        if implementation is None:
            implementation = (
                "ragged_dot" if platform() == "tpu" and not isinstance(up, QuantizedWeight) else "blocks"
            )
        return _run(x, up, down, expert_ids, gates, activation, dtype, implementation == "ragged_dot")


def experts_sharded(
    x: Float[Array, "b l d"],
    up: Float[Array, "e *c m d"] | QuantizedWeight,
    down: Float[Array, "e d m"] | QuantizedWeight,
    expert_ids: Int[Array, "b l k"],
    gates: Float[Array, "b l k"],
    *,
    activation: str,
    dtype: DTypeLike,
    implementation: str | None = None,
    mesh: Mesh,
) -> Float[Array, "b l d"]:
    """Run `experts` on arrays sharded over a mesh: same numbers, differentiable; call inside `jit`.

    Each device runs its own tokens through its own channels of every expert, so that all devices of `tensor`
    have the same work whatever the router chose.

    | over | forward | backward |
    |---|---|---|
    | `tensor` | the sum of all channels' updates `(b, l, d)` | the sums of the gradients of x and of gates |
    | `fsdp` | the weights, all-gathered before use, freed after | again; gradients, reduce-scattered |

    Args:
        x: `(b, l, d)`; rows over `data` and `fsdp`, tokens over `sequence`, where these divide them.
        up: `(e, m, d)` or `(e, 2, m, d)`; m over `tensor` and d over `fsdp`, where these divide them.
        down: `(e, d, m)`, sharded alike.
        expert_ids: `(b, l, k)`, sharded like `x`.
        gates: `(b, l, k)`.
        activation: as in `experts`.
        dtype: as in `experts`.
        implementation: as in `experts`.
        mesh: with the axes `data`, `fsdp`, `sequence` and `tensor`, of any sizes, all `AxisType.Auto`.

    Returns:
        `(b, l, d)` in float32.

    Raises:
        ValueError: as `experts`, or a mesh without these axes.
    """
    op = "experts_sharded"
    check_arguments(op, x, up, down, expert_ids, gates, activation, implementation)
    check_mesh(op, mesh)
    batch, length, width = x.shape

    def over(axis: str, size: int) -> str | None:
        return None if size % axis_size(mesh, axis) else axis

    rows = None if batch % axis_size(mesh, *BATCH) else BATCH
    tokens = P(rows, over(SEQUENCE, length))
    tensor, fsdp = over(TENSOR, input_pieces(down)), over("fsdp", math.gcd(width, input_pieces(up)))
    of_up = spec_of(up, P(*(None,) * (up.ndim - 2), tensor, fsdp))
    of_down = spec_of(down, P(None, fsdp, tensor))

    def run(x, up, down, expert_ids, gates):
        if fsdp and axis_size(mesh, fsdp) > 1:
            up, down = _gathered(up, of_up, fsdp, dtype), _gathered(down, of_down, fsdp, dtype)
        options = {"activation": activation, "dtype": dtype, "implementation": implementation}
        return experts(x, up, down, expert_ids, gates, **options)[None]

    run = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(tokens, of_up, of_down, tokens, tokens),
        # One update per device of `tensor`, summed outside the `shard_map`: inside, the backward pass would
        # sum the gradient once more.
        out_specs=P(tensor, *tokens),
        check_vma=False,  # the grouped product does not declare over which axes its results vary
    )
    if fsdp and axis_size(mesh, fsdp) > 1:
        run = jax.checkpoint(run, policy=_all_but_gathered)
    return run(x, up, down, expert_ids, gates).sum(axis=0)


def _gathered(
    weight: Array | QuantizedWeight, spec: P | QuantizedWeight, axis: str, dtype: DTypeLike
) -> Array | QuantizedWeight:
    """All-gather a weight over a mesh axis, in the compute dtype if that is narrower; quantized as it is."""
    if not isinstance(weight, QuantizedWeight):
        weight = weight.astype(min(weight.dtype, jnp.dtype(dtype), key=lambda kind: kind.itemsize))

    def gather(array: Array, spec: P) -> Array:
        at = [index for index, name in enumerate(spec) if name == axis]
        return jax.lax.all_gather(array, axis, axis=at[0], tiled=True) if at else array

    return jax.tree.map(gather, weight, spec)


def _all_but_gathered(primitive: Primitive, *_: object, **__: object) -> bool:
    """Remat policy: save all but all-gathered weights, which would defeat the memory savings of `fsdp`."""
    return primitive is not jax.lax.all_gather_p


def _run(x, up, down, expert_ids, gates, activation: str, dtype: DTypeLike, ragged: bool) -> Array:
    shape, num_experts = x.shape, len(down)
    x, expert_ids, gates = (array.reshape(-1, array.shape[-1]) for array in (x, expert_ids, gates))
    block = 1 if ragged else rows_per_block(expert_ids.size, num_experts)
    plan = sort_into_blocks(expert_ids, num_experts, block)
    if isinstance(up, QuantizedWeight):
        product, up = quantized_grouped_product, up.reshape_rows(num_experts, -1)
    else:
        product, up = partial(grouped_product, ragged=ragged), up.reshape(num_experts, -1, up.shape[-1])
    product = partial(product, groups=plan.groups, dtype=dtype)
    full = jnp.promote_types(dtype, jnp.float32)
    # In float32, so that the gradient sums a token's pairs before it is rounded.
    rows = x.astype(full).at[plan.tokens].get(mode="fill", fill_value=0)  # (s, d)
    inner = product(rows, up)  # (s, m), gated (s, 2 m)
    y = product(_activate(inner.astype(dtype), activation), down)  # (s, d)
    return jnp.einsum("tkd,tk->td", y[plan.slots], gates.astype(full)).reshape(shape)


def _activate(inner: Float[Array, "s m"], activation: str) -> Float[Array, "s n"]:
    if activation == "silu_gated":
        gate, value = jnp.split(inner, 2, axis=1)
        return silu_gate(value, gate)
    full = jnp.promote_types(inner.dtype, jnp.float32)
    return jnp.square(jax.nn.relu(inner.astype(full))).astype(inner.dtype)


class Plan(NamedTuple):
    """Layout of the pairs of token and expert in blocks of slots."""

    tokens: Int[Array, " s"]  # token of each slot; t in slots that only fill a block
    slots: Int[Array, "t k"]  # slot of each pair
    groups: Groups


def sort_into_blocks(expert_ids: Int[Array, "t k"], num_experts: int, block: int) -> Plan:
    """Give every pair a slot: pairs in the order of their experts, each expert from a new block on."""
    flat = expert_ids.reshape(-1).astype(jnp.int32)
    pairs, (num_tokens, top_k) = len(flat), expert_ids.shape
    order = jnp.argsort(flat)
    by_expert = flat[order]
    counts = (flat[:, None] == jnp.arange(num_experts)).sum(0, dtype=jnp.int32)
    blocks = -(-counts // block)
    ends, before = jnp.cumsum(blocks), jnp.cumsum(counts) - counts
    first = (ends - blocks) * block  # first slot of each expert
    slots_in_order = (first - before)[by_expert] + jnp.arange(pairs, dtype=jnp.int32)
    slots = jnp.zeros_like(flat).at[order].set(slots_in_order, unique_indices=True)
    # At most: every expert that has pairs has a last block with only one of them.
    most = (pairs + min(num_experts, pairs) * (block - 1)) // block
    tokens = jnp.full(most * block, num_tokens, jnp.int32)
    tokens = tokens.at[slots].set(jnp.arange(pairs, dtype=jnp.int32) // top_k, unique_indices=True)
    of_blocks = jnp.searchsorted(ends, jnp.arange(most), side="right", method="compare_all")
    groups = Groups(jnp.minimum(of_blocks, num_experts - 1).astype(jnp.int32), ends[-1], blocks * block)
    return Plan(tokens, slots.reshape(expert_ids.shape), groups)


def rows_per_block(pairs: int, num_experts: int) -> int:
    """Return the slots of a block: the power of two that holds an expert's mean number of pairs, or less.

    On two cores, a forward in bfloat16 takes nearly twice as long with blocks of 64 as with those of 32; in
    float32 they are equal. Elsewhere a step of the loop costs more, and blocks of under 16 rows waste a
    tensor core.
    """
    least, most = (1, 32) if platform() == "cpu" else (16, 128)
    mean = -(-pairs // num_experts)
    return min(max(1 << (mean - 1).bit_length(), least), most)


def check_arguments(op: str, x, up, down, expert_ids, gates, activation, implementation) -> None:
    """Raise ValueError unless the arguments of `experts` are valid and their shapes agree."""
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_choice(op, "implementation", implementation, (None, *IMPLEMENTATIONS))
    if getattr(x, "ndim", 0) < 2 or x.shape[:-1] != expert_ids.shape[:-1]:
        raise ValueError(
            f"{op}: x has shape {x.shape} and expert_ids {expert_ids.shape}; they want (..., d) and (..., k)"
        )
    check_shape(op, "down", down, "e d m", d=x.shape[-1])
    sizes = {"d": x.shape[-1], "e": down.shape[0], "m": down.shape[2], "2": 2}
    check_shape(op, "up", up, "e 2 m d" if activation == "silu_gated" else "e m d", **sizes)
    if gates.shape != expert_ids.shape:
        raise ValueError(f"{op}: gates has shape {gates.shape}, wants that of expert_ids, {expert_ids.shape}")
    check_integer(op, expert_ids=expert_ids)
    check_dtype(op, x=x, up=up, down=down, gates=gates)
    if isinstance(up, QuantizedWeight) != isinstance(down, QuantizedWeight):
        raise ValueError(f"{op}: one of up and down is quantized, the other is not; quantize both")
    if isinstance(up, QuantizedWeight) and implementation == "ragged_dot":
        raise ValueError(
            f"{op}: implementation='ragged_dot' has no form for quantized experts; want 'blocks'"
        )
