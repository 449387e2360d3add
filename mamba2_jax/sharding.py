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
from collections.abc import Iterable

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mamba2_jax.config import Mamba2Config
from mamba2_jax.mesh import BATCH, axis_size, make_mesh

__all__ = ["make_mesh", "parameter_shardings", "parameter_spec", "splits_batch", "token_sharding"]

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
