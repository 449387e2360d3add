"""Configuration of a Mamba-2 model: immutable, hashable, checked, and read from any published config file.

>>> config = Mamba2Config.preset("mamba2-130m")
>>> config.intermediate_size, config.num_heads, config.conv_dim, config.vocab_size
(1536, 24, 1792, 50288)
>>> f"{config.num_parameters():,}"
'128,989,632'
>>> config.replace(num_hidden_layers=2).num_parameters() < config.num_parameters()
True
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from mamba2_jax import hub
from mamba2_jax.config import checks, families, forms, kinds, mamba2_file, table
from mamba2_jax.config.attention import AttentionConfig, attention_config
from mamba2_jax.config.experts import ExpertsConfig
from mamba2_jax.config.layers import Layer, Slot, layer_of
from mamba2_jax.config.mlp import MLPConfig, Multipliers
from mamba2_jax.config.options import OPTIONS
from mamba2_jax.config.vocabulary import count_token_ids
from mamba2_jax.files import CONFIG_FILES, read_json
from mamba2_jax.weight_types import TypeName

__all__ = ["Mamba2Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Configuration of a Mamba-2 language model, with the field names and defaults of transformers.

    The default sizes are those of Mamba-Codestral-7B. The fields from `d_ssm` on are options of the original
    implementation that transformers lacks.

    Args:
        num_heads: heads of the SSM; `num_heads * head_dim` is `d_ssm`.
        head_dim: channels per head.
        vocab_size: width of embedding and logits, including padding.
        hidden_size: width of the residual stream.
        state_size: size of the state per channel.
        num_hidden_layers: number of blocks.
        layer_norm_epsilon: epsilon of every RMSNorm.
        pad_token_id: id or None. A tokenizer's pad, bos and eos ids override these fields.
        bos_token_id: id or None.
        eos_token_id: id, several ids, or None.
        expand: `intermediate_size / hidden_size`.
        conv_kernel: taps of the causal convolution.
        n_groups: groups of heads that share B and C; also the groups of the gated norm.
        use_bias: bias of the input and output projections.
        use_conv_bias: bias of the convolution.
        hidden_act: activation after the convolution: "silu" or "swish", the same function.
        initializer_range: standard deviation of the embeddings at initialisation.
        residual_in_fp32: keep the residual stream in float32.
        time_step_rank: unused by Mamba-2; kept for transformers' file ("auto" becomes a number).
        time_step_min: smallest dt drawn to initialise dt_bias.
        time_step_max: largest dt drawn to initialise dt_bias.
        time_step_floor: lower bound of the drawn dt.
        time_step_limit: (low, high) that dt is clamped to, in prefill and in decoding.
        rescale_prenorm_residual: divide out_proj by sqrt(num_hidden_layers) at initialisation.
        use_cache: kept for transformers' file; a cache is always returned.
        chunk_size: chunk length of the SSD algorithm; changes speed, not results.
        tie_word_embeddings: use the embedding as the output head.
        unpadded_vocab_size: number of token ids in use when `vocab_size` is padded, else None.
        d_ssm: channels of the SSM; the other inner channels are a gated MLP. None: `intermediate_size`.
        D_has_hdim: D is per channel instead of per head.
        rmsnorm: gated RMSNorm before the output projection; False: gate only.
        norm_before_gate: normalise before the gate. False for every published model.
        d_intermediate: width of an MLP after each mixer; 0: none.
        attn_layer_idx: indices of the layers whose mixer is attention.
        attn_cfg: options of the attention layers; a mapping is converted to an `AttentionConfig`.
        quantization: type of the quantized weights, "int8" or "int4"; None: all weights are floats.
        family: whose layout and files the model has: "mamba2", or a key of `config.families.FAMILIES`. The
            fields from here on are set by the readers of the families' files.
        layer_pattern: one letter per layer, a key of `config.layers.LAYERS`. None: from `attn_layer_idx`.
        feed_forward: modules after every mixer, under a norm of their own. None: an MLP if `d_intermediate`.
        mlp_cfg: options of the MLPs of a family; None: those of `d_intermediate`.
        shared_mlp_cfg: options of the MLP in the layers with experts that every token goes through.
        experts_cfg: options of the mixtures of experts.
        multipliers: constant factors on activations.
        source: the JSON of the file that the config was read from, if its family has files of its own; not
            part of the config's identity.

    Raises:
        ValueError: a field is out of range or contradicts another; the message lists every problem.
    """

    num_heads: int = 128
    head_dim: int = 64
    vocab_size: int = 32768
    hidden_size: int = 4096
    state_size: int = 128
    num_hidden_layers: int = 64
    layer_norm_epsilon: float = 1e-5
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2
    expand: int = 2
    conv_kernel: int = 4
    n_groups: int = 8
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    initializer_range: float = 0.1
    residual_in_fp32: bool = True
    time_step_rank: int | str = "auto"
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    rescale_prenorm_residual: bool = False
    use_cache: bool = True
    chunk_size: int = 256
    tie_word_embeddings: bool = False
    unpadded_vocab_size: int | None = None
    # Here and below, None is accepted although the type says otherwise: `__post_init__` replaces it.
    d_ssm: int = None  # pyright: ignore[reportAssignmentType]
    D_has_hdim: bool = False
    rmsnorm: bool = True
    norm_before_gate: bool = False
    d_intermediate: int = 0
    attn_layer_idx: tuple[int, ...] = ()
    attn_cfg: AttentionConfig | None = None
    quantization: TypeName | None = None
    family: str = "mamba2"
    layer_pattern: str = None  # pyright: ignore[reportAssignmentType]
    feed_forward: tuple[str, ...] = None  # pyright: ignore[reportAssignmentType]
    mlp_cfg: MLPConfig | None = None
    shared_mlp_cfg: MLPConfig | None = None
    experts_cfg: ExpertsConfig | None = None
    multipliers: Multipliers = Multipliers()
    source: str | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Convert the fields to canonical hashable values, then check each field and their relations."""
        fields = {name: getattr(self, name) for name in OPTIONS}
        fields |= checks.derived_fields(fields)
        fields, problems = checks.canonical_fields(fields)
        if not problems:
            fields |= checks.derived_layers(fields)
            fields["attn_cfg"] = attention_config(fields["attn_cfg"], fields["hidden_size"])
            problems = checks.relation_problems(fields)
        if problems:
            raise ValueError("Mamba2Config: " + "; ".join(problems))
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def intermediate_size(self) -> int:
        """Return the inner width of a block, `expand * hidden_size`."""
        return self.expand * self.hidden_size

    @property
    def inner_width(self) -> int:
        """Return the input width of a mixer's output projection: SSM and the MLP in parallel to it."""
        return self.d_ssm + self.parallel_mlp_width

    @property
    def groups_state_size(self) -> int:
        """Return the width of B, and of C: `n_groups * state_size`."""
        return self.n_groups * self.state_size

    @property
    def conv_dim(self) -> int:
        """Return the number of channels of the convolution: those of x, B and C."""
        return self.d_ssm + 2 * self.groups_state_size

    @property
    def parallel_mlp_width(self) -> int:
        """Return the width of the gated MLP in parallel to the SSM: `intermediate_size - d_ssm`.

        Only the original implementation has such an MLP.
        """
        return self.intermediate_size - self.d_ssm if self.family == "mamba2" else 0

    @property
    def mlp(self) -> MLPConfig | None:
        """Return the options of the MLP in layers or after mixers; None without one.

        mamba_ssm rounds `d_intermediate` up to a multiple of 128.
        """
        if self.mlp_cfg is None and self.d_intermediate:
            return MLPConfig(width=-(-self.d_intermediate // 128) * 128, layout="fc1_fc2")
        return self.mlp_cfg

    @functools.cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Return the branches of each layer, with their modules."""
        recipes = {letter: layer_of(letter, self.feed_forward) for letter in set(self.layer_pattern)}
        return tuple(recipes[letter] for letter in self.layer_pattern)

    @property
    def attends(self) -> bool:
        """Return whether any layer caches keys and values per token, and so needs token positions."""
        return any(kinds.KINDS[slot.kind].attends for slot in self.slots)

    @property
    def slots(self) -> frozenset[Slot]:
        """Return the different modules that the layers have."""
        return frozenset(slot for layer in set(self.layers) for branch in layer for slot in branch)

    @property
    def real_vocab_size(self) -> int:
        """Return the number of token ids in use: `vocab_size` without the padding."""
        return self.vocab_size if self.unpadded_vocab_size is None else self.unpadded_vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Return all end-of-sequence ids as a tuple, empty without any."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def replace(self, **changes: Any) -> "Mamba2Config":
        """Return a copy with changed fields; fields that were derived from others are computed anew."""
        for name, value in self._defaults().items():
            if name in _DERIVED and getattr(self, name) == value:
                changes.setdefault(name, _DERIVED[name])
        return dataclasses.replace(self, **changes)

    def _defaults(self) -> dict[str, Any]:
        """Return the default of every option, derived from the other options of this config where it is."""
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name in OPTIONS}
        fields = {name: getattr(self, name) for name in OPTIONS} | _DERIVED
        return defaults | checks.derived_fields(fields) | checks.derived_layers(fields)

    def _beyond(self, *, transformers: bool) -> list[str]:
        """List, as "name=value", the options that a form lacks and that differ from their default."""
        defaults = self._defaults()
        lacks = {
            name
            for name, option in OPTIONS.items()
            if not (option.in_transformers if transformers else option.in_state_spaces)
        }
        return [f"{n}={getattr(self, n)}" for n in OPTIONS if n in lacks and getattr(self, n) != defaults[n]]

    def num_parameters(self, *, active: bool = False) -> int:
        """Count the parameters of the model; a tied head adds none.

        Args:
            active: leave out the experts that a token is not sent to.
        """
        return table.count_parameters(self, active)

    @classmethod
    def preset(cls, name: str) -> "Mamba2Config":
        """Build the config of "mamba2-130m", "-370m", "-780m", "-1.3b", "-2.7b", or "codestral-7b"."""
        return cls(**forms.preset_fields(name))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Mamba2Config":
        """Build a config from a parsed file in the transformers, `-av`, state-spaces or Mistral form.

        Args:
            config: the parsed JSON; the form is recognised by its keys.

        Raises:
            ValueError: not a Mamba-2, no known form, or invalid or contradictory fields.
            NotImplementedError: the model needs a feature that this package lacks, such as quantized weights.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"Mamba2Config.from_dict: wants a mapping, got {type(config).__name__}")
        try:
            others = {key: value for key, value in config.items() if key != "quantization"}
            return cls(**forms.parse_fields(others), quantization=config.get("quantization"))
        except (ValueError, NotImplementedError) as error:
            if len(text := str(error)) <= _MAX_MESSAGE:
                raise
            raise type(error)(f"{text[:_MAX_MESSAGE]}... ({len(text)} characters)") from None

    @classmethod
    def from_pretrained(
        cls, path: str | pathlib.Path | None = None, revision: str | None = None
    ) -> "Mamba2Config":
        """Read the config of a checkpoint from a folder, the hub or the package.

        When the config file does not state how much of the vocabulary is padding, `unpadded_vocab_size` is
        read from the tokenizer in the same folder, so that sampling never picks a padding id.

        Args:
            path: a folder with `config.json` or `params.json`, or a hub id; None: the embedded model.
            revision: branch, tag or commit on the hub.

        Raises:
            FileNotFoundError: the folder does not exist or has neither file.
            ValueError: the file is corrupt or describes another model; the message names the file.
        """
        folder = hub.resolve_folder(path, revision, allow_patterns=["*.json"])
        files = [folder / name for name in CONFIG_FILES]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"{folder}: neither config.json nor params.json in it; "
                "pass the folder of a Mamba-2 checkpoint"
            )
        content = read_json(file)
        try:
            config = cls.from_dict(content)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(f"{file}: {error}") from error
        num_tokens = count_token_ids(folder)
        if config.unpadded_vocab_size is None and num_tokens and num_tokens < config.vocab_size:
            config = config.replace(unpadded_vocab_size=num_tokens)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a `config.json` that transformers loads.

        Raises:
            NotImplementedError: the model uses an option that transformers' Mamba-2 lacks.
        """
        if self.quantization is not None:
            return self.replace(quantization=None).to_dict() | {"quantization": self.quantization}
        if self.family != "mamba2":
            return families.family_dict(self)
        if beyond := self._beyond(transformers=True):
            raise NotImplementedError(
                f"Mamba2Config.to_dict: transformers' Mamba-2 has no {', '.join(beyond)}; such a model "
                "can be written in the form 'state-spaces'"
            )
        fields = {name: getattr(self, name) for name, option in OPTIONS.items() if option.in_transformers}
        if self.unpadded_vocab_size is None:
            del fields["unpadded_vocab_size"]
        return mamba2_file.mamba2_dict(fields)

    def to_state_spaces_dict(self) -> dict[str, Any]:
        """Return the content of a `config.json` that mamba_ssm loads, without the special token ids.

        Raises:
            NotImplementedError: the model uses an option that mamba_ssm's config lacks.
        """
        if beyond := self._beyond(transformers=False):
            raise NotImplementedError(
                f"Mamba2Config.to_state_spaces_dict: mamba_ssm has no {', '.join(beyond)}; such a model can "
                "be written in the form 'transformers'"
            )
        fields = {name: getattr(self, name) for name in OPTIONS}
        fields["attn_cfg"] = None if self.attn_cfg is None else self.attn_cfg.original_fields()
        return forms.state_spaces_dict(fields)


_MAX_MESSAGE = 3000  # of a file that may hold anything

# Fields that are derived from others, with the value that asks for it.
_DERIVED: dict[str, Any] = {
    "d_ssm": None,
    "time_step_rank": "auto",
    "layer_pattern": None,
    "feed_forward": None,
}
