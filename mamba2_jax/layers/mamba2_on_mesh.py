"""Run a Mamba-2 mixer on a mesh as one `shard_map`: each device its own rows, tokens and heads.

XLA's own partitioning would all-reduce the gradients of z and x, of B and C, and of dt over `tensor` one by
one. Here the whole mixer is one `shard_map` with explicit communication:

| over | forward | backward |
|---|---|---|
| `tensor` | the sum of all heads' updates `(b, l, d)` | the sum of the gradients of `hidden` `(b, l, d)` |
| | where a group of the gated norm spans devices: its mean square `(b, l, g)` | as many |
| `fsdp` | the matrices, all-gathered before use, freed after | gathered again; gradients, reduce-scattered |
| `sequence` | see `ops.ssd_sharded` and `ops.causal_conv1d_sharded` | |

Gradients of replicated arrays are summed over their devices. No device's heads need another device's heads.
"""

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mamba2_jax.config.quantization import SCALES
from mamba2_jax.layers.mamba2 import Mamba2Mixer
from mamba2_jax.layers.state import LayerState, Part, Rows
from mamba2_jax.mesh import BATCH, SEQUENCE, TENSOR
from mamba2_jax.ops.pieces import pad_tokens
from mamba2_jax.ops.quantized import QuantizedWeight, input_pieces
from mamba2_jax.sharding import array_path, parameter_spec, splits_batch
from mamba2_jax.typing import Array, DTypeLike


def left_to_compiler(mixer: Mamba2Mixer, mesh: Mesh) -> str | None:
    """Return why XLA must partition a mixer on a mesh; None if `mix_on_mesh` can run the mixer.

    `mix_on_mesh` needs whole heads and groups on each device, and no random numbers shared between devices.
    """
    config, tensor = mixer.config, mesh.shape[TENSOR]
    if config.num_heads % tensor:
        return f"num_heads={config.num_heads} is not a multiple of the mesh's tensor={tensor}"
    if config.n_groups % tensor and tensor % config.n_groups:
        return f"n_groups={config.n_groups} and the mesh's tensor={tensor} do not divide one another"
    if tensor > 1 and config.parallel_mlp_width:
        return "out_proj's input holds the channels of a gated MLP beside those of the heads"
    out_proj = mixer.out_proj.weight[...]
    if isinstance(out_proj, QuantizedWeight) and input_pieces(out_proj) % tensor:
        return f"tensor={tensor} of the mesh does not divide out_proj's {input_pieces(out_proj)} scales"
    adapters = [*mixer.in_proj.adapters_in_use(), *mixer.out_proj.adapters_in_use()]
    if any(adapter.dropout and adapter.dropout_key is not None for adapter in adapters):
        return "the adapters' dropout is drawn for all rows of the batch at once"
    return None


def mix_on_mesh(
    mixer: Mamba2Mixer, mesh: Mesh, hidden: Array, state: LayerState, rows: Rows
) -> tuple[Array, LayerState]:
    """Run `Mamba2Mixer.mix` sharded over `mesh`: same numbers, differentiable."""
    config = mixer.config
    batch, length, _ = hidden.shape
    tensor = mesh.shape[TENSOR]
    num_pieces = _count_pieces(length, mesh.shape[SEQUENCE], config.conv_kernel - 1)
    part = Part(num_pieces, max(1, tensor // config.n_groups))
    padding = -length % num_pieces
    if padding:
        hidden, rows = pad_tokens(hidden, padding), _pad_rows(rows, batch, length, padding)

    batch_axes = BATCH if splits_batch(mesh, batch) else None
    by_token = P(batch_axes, SEQUENCE if num_pieces > 1 else None)
    rows_specs = jax.tree.map(lambda marks: by_token if marks.ndim == 2 else P(batch_axes), rows)
    groups = None if part.devices_per_group > 1 else TENSOR
    conv_specs = P(batch_axes, None, TENSOR), P(batch_axes, None, None, groups)  # of x, of B and C
    state_specs = jax.tree.unflatten(jax.tree.structure(state), (*conv_specs, P(batch_axes, TENSOR)))
    leaves, treedef = jax.tree.flatten_with_path(mixer)
    paths = [_path(path) for path, _ in leaves]
    specs = [parameter_spec(path, config, mesh) for path in paths]

    def run(leaves, hidden, state, rows):
        leaves = [
            _here(leaf, path, spec, mixer.dtype)
            for leaf, path, spec in zip(leaves, paths, specs, strict=True)
        ]
        update, state = jax.tree.unflatten(treedef, leaves).mix(hidden, state, rows, part)
        return update[None], state

    mix = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(specs, by_token, state_specs, rows_specs),
        # One update per device of `tensor`, summed outside the `shard_map`: inside, the backward pass would
        # sum the gradient once more.
        out_specs=(P(TENSOR, *by_token), state_specs),
        check_vma=False,  # kernels and custom gradients do not declare over which axes their results vary
    )
    if mesh.shape["fsdp"] > 1:
        mix = jax.checkpoint(mix, policy=_all_but_gathered)
    update, state = mix([leaf for _, leaf in leaves], hidden, state, rows)
    return update.sum(axis=0)[:, :length], state


def _count_pieces(length: int, devices: int, reach: int) -> int:
    """Return the number of pieces: `devices`, or 1 when the taps would reach past the left neighbour."""
    return devices if length > 1 and -(-length // devices) >= reach else 1


def _pad_rows(rows: Rows, batch: int, length: int, padding: int) -> Rows:
    mask = jnp.ones((batch, length), bool) if rows.mask is None else rows.mask
    rows = rows._replace(mask=mask)
    return rows._replace(
        **{
            name: pad_tokens(getattr(rows, name), padding)
            for name in ("mask", "segment_ids", "positions")
            if getattr(rows, name) is not None
        }
    )


def _path(path: tuple) -> str:
    """Return a leaf's path in a block; the copy of a weight with merged adapters has the weight's path."""
    return f"mixer.{array_path(path)}".replace(".unmerged.", ".")


def _here(leaf: Array, path: str, spec: P, dtype: DTypeLike) -> Array:
    """All-gather a parameter over `fsdp`, in the compute dtype if that dtype is narrower."""
    if path == "mixer.out_proj.bias":  # on one device only: updates are summed over `tensor`
        return jnp.where(jax.lax.axis_index(TENSOR) == 0, leaf, 0)
    for axis, name in enumerate(spec):
        if name == "fsdp" and jax.lax.axis_size("fsdp") > 1:
            if not path.endswith(SCALES):
                leaf = leaf.astype(min(leaf.dtype, jnp.dtype(dtype), key=lambda kind: kind.itemsize))
            leaf = jax.lax.all_gather(leaf, "fsdp", axis=axis, tiled=True)
    return leaf


def _all_but_gathered(primitive: Primitive, *_: object, **__: object) -> bool:
    """Remat policy: save all but all-gathered matrices, which would defeat the memory savings of `fsdp`."""
    return primitive is not jax.lax.all_gather_p
