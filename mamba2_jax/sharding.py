"""Shardings of a model's arrays on a mesh of devices, for import, training, checkpoints and generation.

| mesh axis | what is sharded |
|---|---|
| `data` | batch rows; parameters are replicated |
| `fsdp` | batch rows too; parameters, gradients and moments are sharded, and all-gathered block by block |
| `sequence` | tokens of a row |
| `tensor` | heads with their channels of z and x and their dt, groups of B and C, the vocabulary |

A block sums over `tensor` once, after the output projection: everything between the two projections is local
to a head, except the gated norm where its group spans devices, and B and C, which are replicated when there
are fewer groups than devices.

>>> from mamba2_jax.config import Mamba2Config
>>> mesh = make_mesh()  # all devices on the data axis
>>> config = Mamba2Config.preset("mamba2-130m")
>>> parameter_spec("backbone.layers.0.mixer.in_proj.weight_zx", config, mesh)
P('fsdp', None, 'tensor')
"""

import math
import re
import warnings
from collections.abc import Iterable
from operator import attrgetter

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mamba2_jax.config import Mamba2Config
from mamba2_jax.config.leaves import Leaf
from mamba2_jax.config.table import leaf_at, weight_at
from mamba2_jax.mesh import BATCH, axis_size, make_mesh

__all__ = [
    "make_mesh",
    "parameter_shardings",
    "parameter_spec",
    "splits_batch",
    "state_spec",
    "token_sharding",
]

# First word of a leaf's axis name -> the mesh axis that shards the axis; all other axes are whole.
_CUT_BY = {
    "width": "fsdp",
    **dict.fromkeys(("vocabulary", "heads", "groups", "mixed", "query_heads", "key_heads"), "tensor"),
    **dict.fromkeys(("MLP", "parallel_MLP", "attention_MLP", "expert_width"), "tensor"),
    "expert_input": "fsdp",
}
# An adapter's B has the weight's axes with the rank in place of the input axis; its A is (input, rank). A
# magnitude (DoRA) has no entry here and is whole on every device.
_ADAPTER = re.compile(r"(?P<module>.*)\.lora\.[^.]+\.(A|B\.(?P<weight>\w+))")


def splits_batch(mesh: Mesh, batch: int) -> bool:
    """Return whether the mesh divides `batch` rows; if not, every device holds all rows."""
    return batch % axis_size(mesh, *BATCH) == 0


def token_sharding(mesh: Mesh, batch: int, length: int) -> NamedSharding:
    """Shard an array `(b, l, ...)`: rows over `data` and `fsdp`, tokens over `sequence`, where these divide.

    Args:
        mesh: mesh with axes from `AXES`.
        batch: number of rows, `b`.
        length: tokens per row, `l`.

    Returns:
        The sharding of the first two axes; all other axes are whole on every device.
    """
    rows = BATCH if splits_batch(mesh, batch) else None
    tokens = None if length % axis_size(mesh, "sequence") else "sequence"
    return NamedSharding(mesh, PartitionSpec(rows, tokens))


def parameter_spec(path: str, config: Mamba2Config, mesh: Mesh) -> PartitionSpec:
    """Look up the `PartitionSpec` of a parameter.

    Args:
        path: dot-joined path of a parameter or adapter array; a moment's path ends in its parameter's path.
        config: config of the model.
        mesh: mesh with axes from `AXES`.

    Returns:
        One entry per axis of the leaf, none for a vector along `d`. An axis that the mesh axis does not
        divide is not sharded.
    """
    return PartitionSpec(*(None if axis is None or why else axis for axis, why in _axes(path, config, mesh)))


def parameter_shardings(paths: Iterable[str], config: Mamba2Config, mesh: Mesh) -> dict[str, NamedSharding]:
    """Compute the sharding of every parameter; one warning names all that the mesh does not divide.

    Args:
        paths: dot-joined paths of the parameters.
        config: config of the model.
        mesh: mesh with axes from `AXES`.

    Returns:
        Shardings by path.
    """
    whole: dict[str, set[str]] = {}
    for path in paths:
        for _, why in _axes(path, config, mesh):
            if why and why != _BY_DESIGN:
                whole.setdefault(why, set()).add(re.sub(r"\.\d+\.", ".*.", path))
    if whole:
        reasons = "; ".join(f"{why}: {', '.join(sorted(names))}" for why, names in whole.items())
        warnings.warn(f"kept whole on every device, because {reasons}", stacklevel=2)
    return {path: NamedSharding(mesh, parameter_spec(path, config, mesh)) for path in paths}


# Array of a cache, `(b, ...)` -> the axis that `tensor` shards, and the units between which it cuts.
_STATES = {
    "ssm": (1, "num_heads"),
    "x": (2, "num_heads"),
    "BC": (3, "n_groups"),
    "q": (2, "attn_cfg.num_heads"),
    **dict.fromkeys(("k", "v", "keys", "values"), (2, "attn_cfg.num_heads_kv")),
}


def state_spec(path: str, batch: int, config: Mamba2Config, mesh: Mesh) -> PartitionSpec:
    """Look up the `PartitionSpec` of an array of a cache: rows over `data` and `fsdp`, heads over `tensor`.

    Args:
        path: dot-joined path in `Mamba2Cache`, such as `ssm.0` or `conv.0.x`.
        batch: number of rows.
        config: config of the model.
        mesh: mesh with axes from `AXES`.

    Returns:
        One entry per axis up to the last one that is sharded.
    """
    rows = BATCH if splits_batch(mesh, batch) else None
    name = "ssm" if path.startswith("ssm.") else path.rpartition(".")[2]
    if name not in _STATES:
        return PartitionSpec(rows)
    axis, units = _STATES[name]
    if attrgetter(units)(config) % axis_size(mesh, "tensor"):
        return PartitionSpec(rows)
    return PartitionSpec(rows, *(None,) * (axis - 1), "tensor")


_BY_DESIGN = "fewer groups than devices"


def _axes(path: str, config: Mamba2Config, mesh: Mesh) -> list[tuple[str | None, str]]:
    """Per axis of the leaf, return the mesh axis that should shard it, and why that axis cannot ("": can)."""
    result = []
    for word, units in _meaning(path, config):
        axis = _CUT_BY.get(word)
        size = 1 if axis is None else axis_size(mesh, axis)
        what, count = _pieces(word, units, config)
        why = ""
        if axis is not None and count % size:
            # With fewer groups (or key heads) than devices, each device's heads belong to one of them.
            shared = what in ("groups", "key heads") and size % count == 0
            why = _BY_DESIGN if shared else f"{axis}={size} does not divide {what}={count}"
        result.append((axis, why))
    return result


def _meaning(path: str, config: Mamba2Config) -> tuple[tuple[str, int], ...]:
    """Per axis of the leaf at `path`, return the first word of the axis name and that word's size."""
    adapter = _ADAPTER.fullmatch(path)
    if adapter is None:
        axes = _words(leaf_at(config, path))
        # Vectors along the residual stream, the weights of norms and biases, are replicated.
        return axes if [word for word, _ in axes] != ["width"] else ()
    module = "lm_head" if adapter["module"] == "head" else adapter["module"]
    weight = adapter["weight"]
    leaf = leaf_at(config, f"{module}.{weight}") if weight else weight_at(config, module)
    if leaf is None:
        return ()
    axes, axis = _words(leaf), leaf.role.input_axis
    return (*axes[:axis], ("rank", 1), *axes[axis + 1 :]) if weight else (axes[axis],)


def _words(leaf: Leaf | None) -> tuple[tuple[str, int], ...]:
    """Per axis, return the first word of its name and that word's size; shards begin between such units."""
    if leaf is None:
        return ()
    return tuple((axis.split()[0], units) for axis, units in zip(leaf.axes, leaf.units, strict=True))


def _pieces(word: str, units: int, config: Mamba2Config) -> tuple[str, int]:
    """Return the unit in which an axis is sharded, for messages, and the largest number of shards."""
    heads = math.gcd(config.num_heads, config.parallel_mlp_width)  # gcd(n, 0) is n
    if word in ("heads", "parallel_MLP"):  # the parallel MLP is sharded like the heads
        return "heads", heads
    if word == "mixed":
        attention = config.attn_cfg
        # The channels of a parallel MLP come before those of the heads; equal shards would mix the two.
        beside = config.parallel_mlp_width or (attention and attention.mlp_width)
        return word, 1 if beside else math.gcd(heads, attention.num_heads if attention else 0)
    return word.replace("_", " "), units
