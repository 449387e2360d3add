"""Where a model's arrays lie on a mesh of devices, in import, training, checkpoints and generation.

| mesh axis | what it splits |
|---|---|
| `data` | rows of the batch; every group of devices keeps all parameters |
| `fsdp` | rows of the batch too; parameters, gradients and moments are split and gathered block by block |
| `sequence` | tokens of a row |
| `tensor` | heads with all that is theirs (channels of z and x, dt), groups of B and C, the vocabulary |

A block sums over `tensor` once, after the output projection: everything between the two projections is local
to a head, except the gated norm where its group spans devices, and B and C, which are repeated when there are
fewer groups than devices.

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

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mamba2_jax.config import Mamba2Config
from mamba2_jax.config.kinds import leaf_at, weight_at
from mamba2_jax.config.leaves import Leaf
from mamba2_jax.mesh import BATCH, axis_size, make_mesh

__all__ = ["make_mesh", "parameter_shardings", "parameter_spec", "splits_batch", "token_sharding"]

# Which mesh axis cuts what a leaf's axis counts; all else is whole.
_CUT_BY = {
    "width": "fsdp",
    **dict.fromkeys(("vocabulary", "heads", "groups", "mixed", "query_heads", "key_heads"), "tensor"),
    **dict.fromkeys(("MLP", "parallel_MLP", "attention_MLP"), "tensor"),
}
# An adapter's B is the weight with its input axis replaced by the rank; its A is that axis, then the rank.
_ADAPTER = re.compile(r"(?P<module>.*)\.lora\.[^.]+\.(A|B\.(?P<weight>\w+))")


def splits_batch(mesh: Mesh, batch: int) -> bool:
    """Whether the mesh divides so many rows; if not, every device has them all."""
    return batch % axis_size(mesh, *BATCH) == 0


def token_sharding(mesh: Mesh, batch: int, length: int) -> NamedSharding:
    """Place an array `(b, l, ...)`: rows over `data` and `fsdp`, tokens over `sequence`, where they divide.

    Args:
        mesh: with axes out of `AXES`.
        batch: rows, `b`.
        length: tokens of a row, `l`.

    Returns:
        For the first two axes of an array; the others are whole on every device.
    """
    rows = BATCH if splits_batch(mesh, batch) else None
    tokens = None if length % axis_size(mesh, "sequence") else "sequence"
    return NamedSharding(mesh, PartitionSpec(rows, tokens))


def parameter_spec(path: str, config: Mamba2Config, mesh: Mesh) -> PartitionSpec:
    """Look up how a parameter is split.

    Args:
        path: dot-joined path in the model; adapters and moments end like the parameter they belong to.
        config: of the model.
        mesh: with axes out of `AXES`.

    Returns:
        One entry per axis of the leaf, none for a vector along `d`. An axis that does not divide is not
        split.
    """
    return PartitionSpec(*(None if axis is None or why else axis for axis, why in _axes(path, config, mesh)))


def parameter_shardings(paths: Iterable[str], config: Mamba2Config, mesh: Mesh) -> dict[str, NamedSharding]:
    """Place every parameter, with one warning that names those which the mesh does not divide.

    Args:
        paths: of the parameters.
        config: of the model.
        mesh: with axes out of `AXES`.

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


_BY_DESIGN = "fewer groups than devices"


def _axes(path: str, config: Mamba2Config, mesh: Mesh) -> list[tuple[str | None, str]]:
    """Per axis of the leaf: the mesh axis it wants, and why it cannot have it ("": it can)."""
    result = []
    for word, units in _meaning(path, config):
        axis = _CUT_BY.get(word)
        size = 1 if axis is None else axis_size(mesh, axis)
        what, count = _pieces(word, units, config)
        why = ""
        if axis is not None and count % size:
            # With fewer groups than devices, each device's heads belong to one group.
            shared = what == "groups" and size % count == 0
            why = _BY_DESIGN if shared else f"{axis}={size} does not divide {what}={count}"
        result.append((axis, why))
    return result


def _meaning(path: str, config: Mamba2Config) -> tuple[tuple[str, int], ...]:
    """What each axis of the leaf at `path` counts, and how many of it there are."""
    adapter = _ADAPTER.fullmatch(path)
    if adapter is None:
        axes = _words(leaf_at(config, path))
        # What lies along the residual stream alone, a norm's weight or a bias, is repeated everywhere.
        return axes if [word for word, _ in axes] != ["width"] else ()
    module = "lm_head" if adapter["module"] == "head" else adapter["module"]
    weight = adapter["weight"]
    leaf = leaf_at(config, f"{module}.{weight}") if weight else weight_at(config, module)
    if leaf is None:
        return ()
    axes, axis = _words(leaf), leaf.role.input_axis
    return (*axes[:axis], ("rank", 1), *axes[axis + 1 :]) if weight else (axes[axis],)


def _words(leaf: Leaf | None) -> tuple[tuple[str, int], ...]:
    """The first word of each axis, between which it may be cut, and how many of it there are."""
    if leaf is None:
        return ()
    return tuple((axis.split()[0], units) for axis, units in zip(leaf.axes, leaf.units, strict=True))


def _pieces(word: str, units: int, config: Mamba2Config) -> tuple[str, int]:
    """Into how many pieces an axis may be cut, and of what they are: heads and groups stay whole."""
    heads = math.gcd(config.num_heads, config.parallel_mlp_width)  # gcd(n, 0) is n
    if word in ("heads", "parallel_MLP"):  # the MLP beside the heads goes with them
        return "heads", heads
    if word == "mixed":
        attention = config.attn_cfg
        # Where an MLP runs beside the heads, its rows come first, and a cut would not fall between the two.
        beside = config.parallel_mlp_width or (attention and attention.mlp_width)
        return word, 1 if beside else math.gcd(heads, attention.num_heads if attention else 0)
    return word.replace("_", " "), units
