"""Where a model's arrays lie on a mesh of devices: one table for import, training, checkpoints, generation.

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
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mamba2_jax.config import Mamba2Config

AXES: tuple[str, ...] = ("data", "fsdp", "sequence", "tensor")
"""Mesh axes, the farthest apart first: devices that differ in the last axis only are neighbours."""

BATCH = ("data", "fsdp")
"""The mesh axes that split rows of a batch."""

# End of a parameter's path -> what each axis of the leaf counts. The first match holds; what is not
# listed (norms of the residual stream, biases of width d) is repeated everywhere.
_TABLE: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(embeddings|lm_head)\.weight", ("vocabulary", "width")),
    # A Mamba-2 mixer.
    (r"in_proj\.weight_(zx|z0x0)", ("width", None, "heads")),
    (r"in_proj\.weight_BC", ("width", None, "groups")),
    (r"in_proj\.weight_dt", ("width", "heads")),
    (r"in_proj\.bias_(zx|z0x0)", (None, "heads")),
    (r"in_proj\.bias_BC", (None, "groups")),
    (r"in_proj\.bias_dt", ("heads",)),
    (r"conv1d\.weight_x", (None, "heads")),
    (r"conv1d\.weight_BC", (None, None, "groups")),
    (r"conv1d\.bias_x", ("heads",)),
    (r"conv1d\.bias_BC", (None, "groups")),
    (r"mixer\.(dt_bias|A_log|D|norm\.weight)", ("heads",)),
    (r"out_proj\.weight", ("mixed", "width")),
    # An attention mixer, and the MLPs.
    (r"in_proj\.weight_q", ("width", "query heads")),
    (r"in_proj\.weight_[kv]", ("width", "key heads")),
    (r"in_proj\.bias_q", ("query heads",)),
    (r"in_proj\.bias_[kv]", ("key heads",)),
    (r"conv1d\.weight_q", (None, "query heads")),
    (r"conv1d\.weight_[kv]", (None, "key heads")),
    (r"conv1d\.bias_q", ("query heads",)),
    (r"conv1d\.bias_[kv]", ("key heads",)),
    (r"in_proj\.weight_mlp", ("width", None, "attention MLP")),
    (r"in_proj\.bias_mlp", (None, "attention MLP")),
    (r"mlp\.fc1\.weight", ("width", None, "MLP")),
    (r"mlp\.fc2\.weight", ("MLP", "width")),
)
# An adapter's B is the weight with its input axis replaced by the rank; its A is that axis, then the rank.
_ADAPTER = re.compile(r"(?P<module>.*)\.lora\.[^.]+\.(A|B\.(?P<weight>\w+))")


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Arrange devices in a mesh of the four axes.

    Args:
        data: devices along the axis; -1, for at most one axis, is all that the others leave.
        fsdp: see `data`.
        sequence: see `data`.
        tensor: see `data`.
        devices: None: all devices of all processes.

    Returns:
        A mesh with the axes `AXES`, those of size 1 too.

    Raises:
        ValueError: sizes that do not multiply to the number of devices; says what would fit.
    """
    sizes: dict[str, int] = dict(zip(AXES, (data, fsdp, sequence, tensor), strict=True))
    devices = jax.devices() if devices is None else list(devices)
    for name, size in sizes.items():
        if type(size) is not int or (size < 1 and size != -1):
            raise ValueError(f"make_mesh: {name}={size!r} must be a positive integer, or -1 for the rest")
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"make_mesh: {' and '.join(rest)} are both -1; one axis can take the rest")
    given = math.prod(size for size in sizes.values() if size != -1)
    if rest and len(devices) % given == 0:
        sizes[rest[0]] = len(devices) // given
    if math.prod(sizes.values()) != len(devices):
        product = " x ".join(f"{name} {size}" for name, size in sizes.items() if size not in (1, -1))
        divisors = [str(size) for size in range(1, len(devices) + 1) if len(devices) % size == 0]
        raise ValueError(
            f"make_mesh: {product or 'data 1'} makes {given} devices, but there are {len(devices)}; "
            f"the sizes must multiply to {len(devices)}, each one of {', '.join(divisors)}"
        )
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def check_mesh(name: str, mesh: Mesh) -> None:
    """Raise ValueError, as from `name`, unless `mesh` has the axes `AXES`, all of them GSPMD's."""
    if set(mesh.axis_names) != set(AXES):
        raise ValueError(
            f"{name}: the mesh has axes {list(mesh.axis_names)}, want {list(AXES)}: see make_mesh"
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"{name}: the mesh's axes are {mesh.axis_types}, want AxisType.Auto for each: see make_mesh"
        )


def axis_size(mesh: Mesh, *axes: str) -> int:
    """Count the devices along some axes together; an axis the mesh does not have counts 1."""
    return math.prod(mesh.shape.get(axis, 1) for axis in axes)


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
        One entry per axis that the table names; an axis that does not divide is not split.
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
    count = _counts(config)
    result = []
    for what in _meaning(path):
        axis = None if what is None else "fsdp" if what == "width" else "tensor"
        size = 1 if axis is None else axis_size(mesh, axis)
        why = ""
        if what is not None and count[what] % size:
            # With fewer groups than devices, each device's heads belong to one group.
            shared = what == "groups" and size % count[what] == 0
            why = _BY_DESIGN if shared else f"{axis}={size} does not divide {what}={count[what]}"
        result.append((axis, why))
    return result


def _meaning(path: str) -> tuple[str | None, ...]:
    """What each axis of the leaf at `path` counts."""
    adapter = _ADAPTER.fullmatch(path)
    if adapter is None:
        return next((axes for end, axes in _TABLE if re.search(rf"(^|\.){end}$", path)), ())
    module = "lm_head" if adapter["module"] == "head" else adapter["module"]
    input_axis = 1 if module == "lm_head" else 0
    if adapter["weight"]:
        axes = _meaning(f"{module}.{adapter['weight']}")
        return (*axes[:input_axis], None, *axes[input_axis + 1 :]) if axes else ()
    leaves = ("weight", "weight_zx", "weight_x", "weight_q")
    axes = next(axes for leaf in leaves if (axes := _meaning(f"{module}.{leaf}")))
    return (axes[input_axis],)


def _counts(config: Mamba2Config) -> dict[str, int]:
    """How many pieces an axis may be cut into: heads and groups stay whole."""
    attention = config.attn_cfg
    heads = math.gcd(config.num_heads, config.parallel_mlp_width)  # gcd(n, 0) is n
    query_heads = 0 if attention is None else attention.num_heads
    # Where an MLP runs beside the heads, its rows come first, and a cut would not fall between the two.
    beside = config.parallel_mlp_width or (attention and attention.mlp_width)
    return {
        "vocabulary": config.vocab_size,
        "width": config.hidden_size,
        "heads": heads,
        "groups": config.n_groups,
        "mixed": 1 if beside else math.gcd(heads, query_heads),
        "query heads": query_heads,
        "key heads": 1 if attention is None else attention.num_heads_kv or 1,
        "attention MLP": 1 if attention is None else attention.mlp_width,
        "MLP": config.mlp_width,
    }
