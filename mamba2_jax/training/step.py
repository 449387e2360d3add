"""Run one training step as a pure, jitted function from state and batch to new state and metrics.

`split_model` splits the model into trained arrays (a flat dict from path to float32 array), frozen arrays and
a static structure; the step merges them while tracing. So the compiled program takes the weights as
arguments, can be donated their buffers, and inherits their sharding.

    structure, trained, frozen = split_model(model)
    optimizer = make_optimizer(OptimConfig(), trained, steps=100)
    state = TrainState.start(trained, optimizer, jax.random.key(0))
    state, metrics = train_step(state, frozen, batch, structure=structure, optimizer=optimizer)
    model = structure.merge(state.params, frozen)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mamba2_jax.lora import set_dropout_key
from mamba2_jax.lora.attach import trained_paths
from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.models.mamba2 import Mamba2ForCausalLM
from mamba2_jax.processes import place
from mamba2_jax.training.carry import begin_or_go_on, initial_cache
from mamba2_jax.training.gradients import gradients_through, summed_gradients
from mamba2_jax.training.loss import TOKENS_PER_SLICE, loss_and_cache, loss_fn
from mamba2_jax.training.on_cpu import choose_update, on_one_cpu
from mamba2_jax.typing import Array, Bool, Float, Int

Params = dict[str, Array]


class Structure(NamedTuple):
    """A model without its arrays; hashable, hence a valid static argument of `jax.jit`."""

    treedef: Any
    names: tuple[str, ...]  # paths of the pytree leaves, in flattening order

    def merge(self, trained: Mapping[str, Array], frozen: Mapping[str, Array]) -> Mamba2ForCausalLM:
        """Rebuild the model from its arrays or tracers."""
        leaves = [trained[name] if name in trained else frozen[name] for name in self.names]
        return jax.tree.unflatten(self.treedef, leaves)


def split_model(model: Mamba2ForCausalLM, trainable: Any = None) -> tuple[Structure, Params, Params]:
    """Split a model into its structure, the trained arrays and the frozen arrays.

    Args:
        model: not modified; the frozen arrays are shared with it.
        trainable: an `nnx` filter that selects the trained parameters. None: the adapters, with what they
            train in full, if the model has any, else every parameter.

    Returns:
        structure: rebuilds the model from both dicts with `merge`.
        trained: path -> copied array; half precision is widened to float32, which keeps small updates.
        frozen: path -> array, unchanged.

    Raises:
        ValueError: the filter selects no parameter.
    """
    chosen = trained_paths(model) if trainable is None else set()
    if not chosen:
        state = nnx.to_flat_state(nnx.state(model, nnx.Param if trainable is None else trainable))
        chosen = {".".join(map(str, path)) for path, _ in state}
    if not chosen:
        raise ValueError(
            f"split_model: the model has no parameter that fits {trainable}; nothing would be trained"
        )
    leaves, treedef = jax.tree.flatten_with_path(model)
    arrays = {_name(path): leaf for path, leaf in leaves}
    structure = Structure(treedef, tuple(arrays))
    trained = {
        name: jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32))  # a copy: steps donate the buffers
        for name, leaf in arrays.items()
        if name in chosen
    }
    return structure, trained, {name: leaf for name, leaf in arrays.items() if name not in chosen}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All state that a training step updates; a run resumed from it continues bit for bit."""

    step: Int[Array, ""]
    """Number of batches consumed."""
    params: Params
    """Trained parameters, float32."""
    opt_state: optax.OptState
    key: Array
    """Root PRNG key; each step folds `step` into it."""
    skipped: Int[Array, ""]
    """Total steps skipped because the loss or a gradient was not finite."""
    skipped_in_a_row: Int[Array, ""]
    cache: Mamba2Cache | None = None
    """The model's state after the last batch, from which rows go on in the next; None: every batch is new.
    Attention layers keep as many of each row's last tokens as their buffers hold."""

    @classmethod
    def start(
        cls,
        params: Params,
        optimizer: optax.GradientTransformation,
        key: Array,
        cache: Mamba2Cache | None = None,
    ) -> "TrainState":
        """Create the state of a new run."""
        # One buffer per counter: the same buffer cannot be donated twice.
        return cls(jnp.int32(0), params, optimizer.init(params), key, jnp.int32(0), jnp.int32(0), cache)

    def to_mesh(self, mesh: Mesh) -> "TrainState":
        """Replicate the leaves that are not on the mesh yet (counters, key) over all of its devices."""
        everywhere = NamedSharding(mesh, PartitionSpec())

        def placed(array):
            if len(array.sharding.device_set) == mesh.size:
                return array
            if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
                data = place(np.asarray(jax.random.key_data(array)), everywhere)
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
            return place(np.asarray(array), everywhere)

        return jax.tree.map(placed, self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one step, as device arrays, so that the host does not wait for the step."""

    loss: Float[Array, ""]
    """Mean cross entropy in nats over the batch's tokens, before the update."""
    tokens: Int[Array, ""]
    """Number of scored tokens."""
    grad_norm: Float[Array, ""]
    """Global norm of the gradients, before clipping."""
    finite: Bool[Array, ""]
    """Whether loss and gradient norm were finite and the update was applied."""
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


def _train_step(
    state: TrainState,
    frozen: Params,
    batch: Mapping[str, Array],
    *,
    structure: Structure,
    optimizer: optax.GradientTransformation,
    remat: str = "none",
    tokens_per_slice: int = TOKENS_PER_SLICE,
    pass_gradient: bool = False,
    balance: float = 0.0,
) -> tuple[TrainState, StepMetrics]:
    """Update the parameters once. Donates `state`, which cannot be used afterwards.

    Implementations are chosen for JAX's default device; for arrays on another one, call the step under
    `jax.default_device`.

    Args:
        state: from `TrainState.start` or the previous step.
        frozen: from `split_model`.
        batch: as for `loss_fn`; with a leading axis `(a, b, l)`, the gradients of `a` microbatches are summed
            and divided by their total token count, which gives the gradient of the whole batch. Dropout is
            drawn per microbatch. With `state.cache`, microbatches are consecutive pieces of the same rows,
            and `continues (b,)` or `(a, b)` tells which rows' first documents go on from it (None: all).
        structure: from `split_model`.
        optimizer: from `make_optimizer`, or any Optax transformation.
        remat: passed to `loss_fn`.
        tokens_per_slice: passed to `loss_fn`.
        pass_gradient: with `state.cache`, let the gradient flow from piece to piece of one step, with each
            piece recomputed; otherwise it stops at each piece's beginning. It never leaves the step.
        balance: passed to `loss_fn`; the metric `loss` then holds the auxiliary loss too.

    Returns:
        The new state, and the step's metrics. If the loss or a gradient is not finite, parameters and
        optimizer moments are unchanged.
    """
    key = jax.random.fold_in(state.key, state.step)

    def summed_loss(params: Params, part: Mapping[str, Array], index: Array | int, cache: Mamba2Cache | None):
        model = structure.merge(params, frozen)
        set_dropout_key(model, jax.random.fold_in(key, index))
        capacity = 0 if cache is None else cache.capacity or 0
        start = initial_cache(params, model.config, part["input_ids"].shape[0], model.dtype, capacity)
        begin = start if cache is None else begin_or_go_on(cache, start, part.get("continues"))
        options = {"remat": remat, "tokens_per_slice": tokens_per_slice, "balance": balance}
        options["rolling"] = cache is not None
        nats, (tokens, after) = loss_and_cache(model, part, begin, **options)
        return nats, (tokens, None if cache is None else after)

    passes = pass_gradient and state.cache is not None and batch["input_ids"].ndim == 3
    summed = gradients_through if passes else summed_gradients
    nats, tokens, grads, cache = summed(summed_loss, state.params, batch, state.cache)
    count = jnp.maximum(tokens, 1).astype(jnp.float32)
    loss, norm = nats / count, optax.tree.norm(grads) / count
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)

    def update(params: Any, opt_state: optax.OptState) -> tuple[Any, optax.OptState]:
        updates, opt_state = optimizer.update(jax.tree.map(lambda g: g / count, grads), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    in_place = on_one_cpu(structure.merge(state.params, frozen))
    old = (state.params, state.opt_state)
    params, opt_state = choose_update(finite, update, old, in_place=in_place)
    skipped = state.skipped + ~finite
    in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
    cache = jax.tree.map(partial(jnp.where, finite), cache, state.cache)
    new = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        key=state.key,
        skipped=skipped,
        skipped_in_a_row=in_a_row,
        cache=cache,
    )
    return new, StepMetrics(loss, tokens, norm, finite, skipped, in_a_row)


_jit_step = partial(
    jax.jit,
    static_argnames=("structure", "optimizer", "remat", "tokens_per_slice", "pass_gradient", "balance"),
    donate_argnames="state",
)
train_step = _jit_step(_train_step)


def sharded_train_step(state: TrainState) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Return `train_step` for a state on a mesh, jitted to keep the sharding of each array of `state`."""
    return _jit_step(_train_step, out_shardings=(jax.tree.map(lambda array: array.sharding, state), None))


_jit_eval = partial(jax.jit, static_argnames=("structure", "tokens_per_slice"))


@_jit_eval
def eval_step(
    params: Params,
    frozen: Params,
    batch: Mapping[str, Array],
    *,
    structure: Structure,
    tokens_per_slice: int = TOKENS_PER_SLICE,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Return the summed nats and the token count of a batch `(b, l)`, as `loss_fn` does."""
    model = structure.merge(params, frozen)
    start = initial_cache(params, model.config, batch["input_ids"].shape[0], model.dtype)
    return loss_fn(model, batch, cache=start, tokens_per_slice=tokens_per_slice)


@_jit_eval
def eval_piece(
    params: Params,
    frozen: Params,
    batch: Mapping[str, Array],
    cache: Mamba2Cache,
    *,
    structure: Structure,
    tokens_per_slice: int = TOKENS_PER_SLICE,
) -> tuple[Float[Array, ""], Int[Array, ""], Mamba2Cache]:
    """Compute `eval_step` for a piece of rows that go on from a cache; also return the cache after it."""
    model = structure.merge(params, frozen)
    rows = batch["input_ids"].shape[0]
    start = initial_cache(params, model.config, rows, model.dtype, cache.capacity or 0)
    begin = begin_or_go_on(cache, start, batch.get("continues"))
    options = {"tokens_per_slice": tokens_per_slice, "rolling": True}
    nats, (tokens, after) = loss_and_cache(model, batch, begin, **options)
    return nats, tokens, after
