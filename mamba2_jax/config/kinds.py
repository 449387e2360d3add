"""The kinds of modules in layers, with the tensors of each.

`Mamba2Config.layers` names a key of `KINDS` for each module. A new kind declares its tensors here, and its
module in `mamba2_jax.layers.kinds`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mamba2_jax.config.leaves import (
    CORRECTION,
    DYNAMICS,
    ROUTER,
    Part,
    Tensor,
    convolution,
    matrix_per_expert,
    projection,
    vector,
)
from mamba2_jax.config.mlp import MLP_LAYOUTS, MLPConfig

if TYPE_CHECKING:
    from mamba2_jax.config.mamba2 import Mamba2Config


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
