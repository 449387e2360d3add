"""The kinds of modules in layers, and the single table of all parameters of a model.

`Mamba2Config.layers` names a key of `KINDS` for each module. A new kind declares its tensors here, and its
module in `mamba2_jax.layers.kinds`.

>>> from mamba2_jax.config import Mamba2Config
>>> config = Mamba2Config.preset("mamba2-130m")
>>> table = {stored.name: stored for stored in checkpoint_table(config)}
>>> stored = table["backbone.layers.0.mixer.in_proj.weight"]
>>> stored.shape
(3352, 768)
>>> for leaf in stored.leaves:
...     print(leaf.path, leaf.shape, leaf.axes, leaf.rows)
backbone.layers.0.mixer.in_proj.weight_zx (768, 2, 1536) ('width', '2', 'heads head_dim') (0, 3072)
backbone.layers.0.mixer.in_proj.weight_BC (768, 2, 128) ('width', '2', 'groups state') (3072, 3328)
backbone.layers.0.mixer.in_proj.weight_dt (768, 24) ('width', 'heads') (3328, 3352)
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mamba2_jax.config.families import FAMILIES
from mamba2_jax.config.layers import NORMS, Layer
from mamba2_jax.config.leaves import (
    CORRECTION,
    DYNAMICS,
    EMBEDDING_TABLE,
    OUTPUT_HEAD,
    ROUTER,
    Leaf,
    Part,
    Role,
    StoredTensor,
    Tensor,
    convolution,
    matrix_per_expert,
    projection,
    vector,
)
from mamba2_jax.config.mlp import MLP_LAYOUTS, MLPConfig

if TYPE_CHECKING:
    from mamba2_jax.config.mamba2 import Mamba2Config

BACKBONE = "backbone."
EMBEDDING = "backbone.embeddings.weight"
HEAD = "lm_head.weight"


def _mamba2_numbers(config: "Mamba2Config") -> Mapping[str, int]:
    return {
        "width": config.hidden_size,
        "heads": config.num_heads,
        "head_dim": config.head_dim,
        "groups": config.n_groups,
        "state": config.state_size,
        "taps": config.conv_kernel,
        "parallel_MLP": config.parallel_mlp_width,
        "mixed": config.inner_width,  # the MLP's channels, then the heads'
        "use_bias": config.use_bias,
        "use_conv_bias": config.use_conv_bias,
        "rmsnorm": config.rmsnorm,
        "D_has_hdim": config.D_has_hdim,
        "D_per_head": int(not config.D_has_hdim),
    }


# The stored rows of `in_proj.weight` are z, x, B, C and dt. Each meaning is its own leaf, so that heads and
# groups can be sharded over devices; likewise q, k and v of an attention layer.
_MAMBA2 = Part(
    (
        *projection(
            "in_proj",
            "width",
            {
                "_z0x0": ("2", "parallel_MLP"),  # gate, value
                "_zx": ("2", "heads head_dim"),
                "_BC": ("2", "groups state"),
                "_dt": ("heads",),
            },
            bias="use_bias",
        ),
        *convolution(
            "conv1d", {"_x": ("heads head_dim",), "_BC": ("2", "groups state")}, bias="use_conv_bias"
        ),
        vector("dt_bias", "heads", role=DYNAMICS),
        vector("A_log", "heads", role=DYNAMICS),
        vector("D", "heads", role=DYNAMICS, when="D_per_head"),
        vector("D", "heads", "head_dim", role=DYNAMICS, when="D_has_hdim"),
        vector("norm.weight", "heads head_dim", when="rmsnorm"),
        *projection("out_proj", "mixed", {"": ("width",)}, bias="use_bias"),
    ),
    _mamba2_numbers,
)


def _attention_numbers(config: "Mamba2Config") -> Mapping[str, int]:
    attention = config.attn_cfg
    if attention is None:
        raise ValueError("Mamba2Config: an attention layer without attn_cfg; say what it looks like")
    return {
        "width": config.hidden_size,
        "query_heads": attention.num_heads,
        "key_heads": attention.num_heads_kv or 0,
        "head_dim": attention.head_dim or 0,
        "taps": attention.d_conv,
        "attention_MLP": attention.mlp_width,
        "mixed": attention.query_width + attention.mlp_width,  # the heads' channels, then the MLP's
        "qkv_proj_bias": attention.qkv_proj_bias,
        "out_proj_bias": attention.out_proj_bias,
        "joint": not attention.separate,
        "separate": attention.separate,
    }


_QKV = {"_q": ("query_heads head_dim",), "_k": ("key_heads head_dim",), "_v": ("key_heads head_dim",)}
_ATTENTION = Part(
    (
        *projection(
            "in_proj",
            "width",
            {**_QKV, "_mlp": ("2", "attention_MLP")},  # value, gate
            bias="qkv_proj_bias",
            when="joint",
        ),
        *convolution("conv1d", _QKV, bias="taps"),
        *projection("out_proj", "mixed", {"": ("width",)}, bias="out_proj_bias", when="joint"),
        *projection("q_proj", "width", {"": ("query_heads head_dim",)}, when="separate"),
        *projection("k_proj", "width", {"": ("key_heads head_dim",)}, when="separate"),
        *projection("v_proj", "width", {"": ("key_heads head_dim",)}, when="separate"),
        *projection("o_proj", "query_heads head_dim", {"": ("width",)}, when="separate"),
    ),
    _attention_numbers,
    options="attn_cfg",
)


def _mlp_numbers(width: int, mlp: MLPConfig | None) -> Mapping[str, int]:
    numbers = {"width": width, "MLP": 0 if mlp is None else mlp.width}
    return numbers | {layout: mlp is not None and layout == mlp.layout for layout in MLP_LAYOUTS}


def _mlp_tensors(layout: str) -> tuple[Tensor, ...]:
    """Declare the projections of an MLP; a pair of gate and value is one stored tensor."""
    names = MLP_LAYOUTS[layout]
    rows = ("2", "MLP") if names.pair else ("MLP",)
    inputs = [projection(name, "width", {"": rows}, when=layout) for name in names.inputs]
    return tuple(one for tensors in inputs for one in tensors) + projection(
        names.output, "MLP", {"": ("width",)}, when=layout
    )


_MLP_TENSORS = tuple(tensor for layout in MLP_LAYOUTS for tensor in _mlp_tensors(layout))
_MLP = Part(_MLP_TENSORS, lambda config: _mlp_numbers(config.hidden_size, config.mlp))
_SHARED_EXPERT = Part(_MLP_TENSORS, lambda config: _mlp_numbers(config.hidden_size, config.shared_mlp_cfg))


def _experts_numbers(config: "Mamba2Config") -> Mapping[str, int]:
    experts = config.experts_cfg
    if experts is None:
        raise ValueError("Mamba2Config: a layer with experts without experts_cfg; say what they look like")
    return {
        "width": config.hidden_size,
        "experts": experts.num_experts,
        "expert_input": experts.latent_size or config.hidden_size,
        "expert_width": experts.width,
        "gated": experts.gated,
        "not_gated": not experts.gated,
        "sigmoid": experts.router == "sigmoid",
        "latent": experts.latent_size,
    }


_EXPERTS = Part(
    (
        Tensor("router.weight", ROUTER, {"": ("experts",)}, ("width",)),
        vector("router.correction", "experts", role=CORRECTION, when="sigmoid"),
        *projection("fc1_latent", "width", {"": ("latent",)}, when="latent"),
        matrix_per_expert("up", "2", "expert_width", width="expert_input", when="gated"),
        matrix_per_expert("up", "expert_width", width="expert_input", when="not_gated"),
        matrix_per_expert("down", "expert_input", width="expert_width"),
        *projection("fc2_latent", "latent", {"": ("width",)}, when="latent"),
    ),
    _experts_numbers,
)


@dataclass(frozen=True)
class LayerKind:
    """Declaration of one kind of module in layers.

    Args:
        tensors: its tensors.
        attributes: the attributes of a block under which it may be.
        attends: it caches keys and values per token, and needs token positions.
    """

    tensors: Part
    attributes: tuple[str, ...]
    attends: bool = False


KINDS = {
    "mamba2": LayerKind(_MAMBA2, ("mixer",)),
    "attention": LayerKind(_ATTENTION, ("mixer", "attention"), attends=True),
    "mlp": LayerKind(_MLP, ("mlp",)),
    "shared_expert": LayerKind(_SHARED_EXPERT, ("shared_expert",)),
    "experts": LayerKind(_EXPERTS, ("experts",)),
}

_NORM = Part((vector("weight", "width"),), lambda config: {"width": config.hidden_size})
_MODEL = Part(
    (
        Tensor("embeddings.weight", EMBEDDING_TABLE, {"": ("vocabulary",)}, ("width",)),
        vector("norm_f.weight", "width"),
        Tensor(HEAD, OUTPUT_HEAD, {"": ("vocabulary",)}, ("width",)),
    ),
    lambda config: {"width": config.hidden_size, "vocabulary": config.vocab_size},
)


def checkpoint_table(config: "Mamba2Config", head: bool = True) -> tuple[StoredTensor, ...]:
    """List every tensor of a checkpoint with its shape and the model's leaves stored in it.

    Args:
        config: config of the model.
        head: whether the model has an output head (False: the bare Mamba2Model).

    Returns:
        The tensors under their canonical names, those of transformers' Mamba-2. `lm_head.weight` is always
        last; it has no leaves when the head is tied or `head` is False.
    """
    embedding, norm, output = _outside(config)
    if config.tie_word_embeddings or not head:
        output = dataclasses.replace(output, leaves=())
    table = [embedding]
    for index, layer in enumerate(config.layers):
        table += _at(config, index, layer)
    return (*table, norm, output)


def count_parameters(config: "Mamba2Config", active: bool = False) -> int:
    """Sum the sizes of all leaves; a tied head adds none. `active`: of the experts, only a token's own."""
    embedding, norm, output = _MODEL.stored(config)
    total = _count([embedding, norm] if config.tie_word_embeddings else [embedding, norm, output])
    for layer, layers in Counter(config.layers).items():
        tensors = [stored for _, stored in _layer(layer, config)]
        total += layers * _count(tensors)
        if active and (experts := config.experts_cfg) is not None:
            idle = experts.num_experts - experts.top_k
            total -= layers * sum(idle * math.prod(one.file_shape[1:]) for one in tensors if one.matrices)
    return total


def leaf_at(config: "Mamba2Config", path: str) -> Leaf | None:
    """Find the leaf whose name, below its layer or the model, is a suffix of a path.

    A path without a layer number, such as a path inside a mixer, may belong to any kind of layer in the
    model: leaves of one name have the same axes in all kinds.

    Returns:
        The leaf, with its path below the layer; None when no leaf matches, as for an adapter.

    >>> from mamba2_jax.config import Mamba2Config
    >>> leaf_at(Mamba2Config(), "moments.backbone.layers.3.mixer.A_log").axes
    ('heads',)
    """
    leaves = _leaves(config, _layer_at(config, path))
    return next((leaves[end] for end in _ends(path) if end in leaves), None)


def weight_at(config: "Mamba2Config", module: str) -> Leaf | None:
    """Find the first leaf of the weight of the module whose name is a suffix of a path."""
    leaves = _leaves(config, _layer_at(config, module)).values()
    found = (leaf for end in _ends(module) for leaf in leaves if leaf.path.startswith(f"{end}.weight"))
    return next(found, None)


def role_of(path: str) -> Role | None:
    """Return the role of the parameter at a path, for any config; None for an undeclared parameter."""
    return next((_ROLES[end] for end in _ends(path) if end in _ROLES), None)


_ROLES = {
    f"{at}.{tensor.name}{ending}" if at else f"{tensor.name}{ending}": tensor.role
    for at, part in [
        ("", _MODEL),
        *((norm, _NORM) for norm in NORMS),
        *((attribute, kind.tensors) for kind in KINDS.values() for attribute in kind.attributes),
    ]
    for tensor in part.tensors
    for ending in tensor.leaves
}


def _layer(layer: Layer, config: "Mamba2Config") -> list[tuple[str, StoredTensor]]:
    """List the tensors of one block, with names below it; each after the prefix that families rename."""
    tensors = []
    for norm, branch in zip(NORMS, layer, strict=False):
        modules = [
            (norm, norm, _NORM),
            *((slot.attribute, slot.kind, KINDS[slot.kind].tensors) for slot in branch),
        ]
        for attribute, kind, part in modules:
            tensors += [
                (f"{kind}.{stored.name}", stored.below(f"{attribute}.")) for stored in part.stored(config)
            ]
    return tensors


def _at(config: "Mamba2Config", index: int, layer: Layer) -> Iterator[StoredTensor]:
    """Yield the tensors of layer `index`, with the names that its family gives them in files."""
    family = FAMILIES.get(config.family)
    for name, stored in _layer(layer, config):
        file_name = family.name_inside(index, name) if family else ""
        yield stored.below(f"{BACKBONE}layers.{index}.", file_name)


def _outside(config: "Mamba2Config") -> Iterator[StoredTensor]:
    """Yield the tensors outside the layers: embedding, final norm and head."""
    family = FAMILIES.get(config.family)
    for stored in _MODEL.stored(config):
        at = "" if stored.name == HEAD else BACKBONE
        yield stored.below(at, family.name_outside(at + stored.name) if family else "")


def _layer_at(config: "Mamba2Config", path: str) -> Layer | None:
    """Return the layer whose number is in a path; None without a number of an existing layer."""
    number = re.search(r"\blayers\.(\d+)\.", path)
    if number is None or int(number[1]) >= config.num_hidden_layers:
        return None
    return config.layers[int(number[1])]


@functools.lru_cache(maxsize=64)
def _leaves(config: "Mamba2Config", layer: Layer | None) -> dict[str, Leaf]:
    """Map names to the leaves outside all layers and of one layer (None: all different layers of the model).

    The head is included also when tied, because its adapters are separate from the embedding's.
    """
    tensors = list(_MODEL.stored(config))
    for one in dict.fromkeys(config.layers) if layer is None else [layer]:
        tensors += [stored for _, stored in _layer(one, config)]
    return {leaf.path: leaf for stored in tensors for leaf in stored.leaves}


def _count(tensors: list[StoredTensor]) -> int:
    return sum(leaf.size for stored in tensors for leaf in stored.leaves)


def _ends(path: str) -> Iterator[str]:
    """Yield the path and its suffix after each dot, the longest first."""
    while path:
        yield path
        path = path.partition(".")[2]
