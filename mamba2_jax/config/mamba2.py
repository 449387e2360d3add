"""What a Mamba-2 model looks like: every field, checked once, hashable, from any published config file.

>>> config = Mamba2Config.preset("mamba2-130m")
>>> config.intermediate_size, config.num_heads, config.conv_dim, config.vocab_size
(1536, 24, 1792, 50288)
>>> f"{config.num_parameters():,}"
'128,989,632'
>>> config.replace(num_hidden_layers=2).num_parameters() < config.num_parameters()
True
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from mamba2_jax import hub
from mamba2_jax.config import checks, forms
from mamba2_jax.config.attention import AttentionConfig, attention_config, attention_parameters
from mamba2_jax.files import CONFIG_FILES, read_json

__all__ = ["Mamba2Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """A Mamba-2 language model. Names and defaults are those of transformers' `Mamba2Config`.

    The defaults are Mamba-Codestral-7B's sizes. Beyond transformers' fields stand those that only
    the original implementation has, from `d_ssm` on.

    Args:
        num_heads: heads of the SSM; `num_heads * head_dim` is `d_ssm`.
        head_dim: channels per head.
        vocab_size: width of embedding and logits, padding included.
        hidden_size: width of the residual stream.
        state_size: state per channel.
        num_hidden_layers: number of blocks.
        layer_norm_epsilon: epsilon of every RMSNorm.
        pad_token_id: id or None. The tokenizer's ids win over these three.
        bos_token_id: id or None.
        eos_token_id: id, several ids, or None.
        expand: `intermediate_size / hidden_size`.
        conv_kernel: taps of the causal convolution.
        n_groups: groups that share B and C; also the groups of the gated norm.
        use_bias: bias of the input and output projections.
        use_conv_bias: bias of the convolution.
        hidden_act: activation after the convolution: "silu" or "swish", the same function.
        initializer_range: standard deviation of the embeddings at initialisation.
        residual_in_fp32: keep the residual stream in float32.
        time_step_rank: not used by Mamba-2; kept for transformers' file ("auto" becomes a number).
        time_step_min: smallest dt that dt_bias is initialised for.
        time_step_max: largest dt that dt_bias is initialised for.
        time_step_floor: lower bound of that dt.
        time_step_limit: (low, high) that dt is clamped to, in prefill and in decoding.
        rescale_prenorm_residual: divide out_proj by sqrt(num_hidden_layers) at initialisation.
        use_cache: kept for transformers' file; a cache is always returned.
        chunk_size: chunk length of the SSD algorithm; changes speed, not results.
        tie_word_embeddings: use the embedding as the output head.
        unpadded_vocab_size: number of real tokens when `vocab_size` is padded, else None.
        d_ssm: channels that go through the SSM, the rest are a gated MLP. None: `intermediate_size`.
        D_has_hdim: D is per channel instead of per head.
        rmsnorm: gated RMSNorm before the output projection; False: gate only.
        norm_before_gate: normalise before the gate. False for every published model.
        d_intermediate: width of an MLP after each mixer; 0: none.
        attn_layer_idx: layers whose mixer is attention.
        attn_cfg: what these layers look like; a mapping is turned into an `AttentionConfig`.

    Raises:
        ValueError: a field is out of range or contradicts another; every problem is listed.
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
    # None is accepted and becomes an integer, so that readers of the field always see one.
    d_ssm: int = None  # pyright: ignore[reportAssignmentType]
    D_has_hdim: bool = False
    rmsnorm: bool = True
    norm_before_gate: bool = False
    d_intermediate: int = 0
    attn_layer_idx: tuple[int, ...] = ()
    attn_cfg: AttentionConfig | None = None

    def __post_init__(self) -> None:
        """Bring fields to hashable canonical form, then check each and how they fit together."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= checks.derived_fields(fields)
        fields, problems = checks.canonical_fields(fields)
        if not problems:
            fields["attn_cfg"] = attention_config(fields["attn_cfg"], fields["hidden_size"])
            problems = checks.relation_problems(fields)
        if problems:
            raise ValueError("Mamba2Config: " + "; ".join(problems))
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def intermediate_size(self) -> int:
        """Inner width of a block, `expand * hidden_size`."""
        return self.expand * self.hidden_size

    @property
    def groups_state_size(self) -> int:
        """Width of B, and of C: `n_groups * state_size`."""
        return self.n_groups * self.state_size

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.d_ssm + 2 * self.groups_state_size

    @property
    def parallel_mlp_width(self) -> int:
        """Channels that go around the SSM, through a gated MLP beside it: `intermediate_size - d_ssm`."""
        return self.intermediate_size - self.d_ssm

    @property
    def mlp_width(self) -> int:
        """Width of the MLP after each mixer: `d_intermediate` rounded up to a multiple of 128."""
        return -(-self.d_intermediate // 128) * 128

    @property
    def real_vocab_size(self) -> int:
        """Number of ids that stand for a token: `vocab_size` without the padding."""
        return self.vocab_size if self.unpadded_vocab_size is None else self.unpadded_vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All end-of-sequence ids, possibly none."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    def replace(self, **changes: Any) -> "Mamba2Config":
        """Copy with other fields; `d_ssm` and `time_step_rank` follow `hidden_size` unless set apart."""
        if self.d_ssm == self.intermediate_size:
            changes.setdefault("d_ssm", None)
        if self.time_step_rank == math.ceil(self.hidden_size / 16):
            changes.setdefault("time_step_rank", "auto")
        return dataclasses.replace(self, **changes)

    def num_parameters(self) -> int:
        """Count the parameters; a tied head counts once.

        Per Mamba-2 layer, with e = d_ssm, f = intermediate_size, gn = n_groups * state_size:
        `d + d*(2f + 2gn + h) + (e + 2gn)*k + 2h + |D| + e + f*d`, plus the biases.
        """
        d, h, vocab = self.hidden_size, self.num_heads, self.vocab_size
        in_proj = 2 * self.intermediate_size + 2 * self.groups_state_size + h
        mamba = d * in_proj + self.intermediate_size * d
        mamba += self.conv_dim * (self.conv_kernel + self.use_conv_bias)
        mamba += 2 * h + (self.d_ssm if self.D_has_hdim else h)  # dt_bias, A_log, D
        mamba += self.d_ssm * self.rmsnorm + self.use_bias * (in_proj + d)
        shared = d + (d + 3 * d * self.mlp_width if self.d_intermediate else 0)  # norm, norm2, fc1, fc2
        num_attention = len(self.attn_layer_idx)
        total = self.num_hidden_layers * shared + (self.num_hidden_layers - num_attention) * mamba
        if num_attention and self.attn_cfg is not None:
            total += num_attention * attention_parameters(self.attn_cfg, d)
        return total + d + vocab * d * (1 if self.tie_word_embeddings else 2)

    @classmethod
    def preset(cls, name: str) -> "Mamba2Config":
        """Build a published size: "mamba2-130m", "-370m", "-780m", "-1.3b", "-2.7b", or "codestral-7b"."""
        return cls(**forms.preset_fields(name))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Mamba2Config":
        """Read a parsed config file: transformers', the older `-av`, state-spaces' or Mistral's form.

        Args:
            config: the parsed JSON; the form is recognised by its keys.

        Raises:
            ValueError: not a Mamba-2, no known form, or fields that do not fit together.
            NotImplementedError: something this package does not have, such as quantized weights.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"Mamba2Config.from_dict: wants a mapping, got {type(config).__name__}")
        return cls(**forms.parse_fields(config))

    @classmethod
    def from_pretrained(
        cls, path: str | pathlib.Path | None = None, revision: str | None = None
    ) -> "Mamba2Config":
        """Read the config of a checkpoint.

        When the file does not say how much of the vocabulary is padding and a `tokenizer.json` lies beside
        it, `unpadded_vocab_size` comes from there, so that sampling never picks an id without a token.

        Args:
            path: a folder with `config.json` or `params.json`, or a hub id; None: the embedded model.
            revision: branch, tag or commit on the hub.

        Raises:
            FileNotFoundError: no such folder, or neither file in it.
            ValueError: the file is broken or is not a Mamba-2's; the message names the file.
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
        num_tokens = _count_tokens(folder / "tokenizer.json")
        if config.unpadded_vocab_size is None and num_tokens and num_tokens < config.vocab_size:
            config = config.replace(unpadded_vocab_size=num_tokens)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Write a `config.json` that transformers loads.

        Raises:
            NotImplementedError: the model has something that transformers' Mamba-2 lacks.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        own = {name: fields.pop(name) for name in ("d_ssm", *_ORIGINAL_ONLY)}
        beyond = [f"{name}={own[name]}" for name, default in _ORIGINAL_ONLY.items() if own[name] != default]
        if self.d_ssm != self.intermediate_size:
            beyond.insert(0, f"d_ssm={self.d_ssm}")
        if beyond:
            raise NotImplementedError(
                f"Mamba2Config.to_dict: transformers' Mamba-2 has no {', '.join(beyond)}; such a model "
                "can be written in the form 'state-spaces'"
            )
        if self.unpadded_vocab_size is None:
            del fields["unpadded_vocab_size"]
        return forms.transformers_dict(fields)

    def to_state_spaces_dict(self) -> dict[str, Any]:
        """Write a `config.json` that mamba_ssm loads. It has no place for the special token ids.

        Raises:
            NotImplementedError: the model has something that mamba_ssm's config cannot say.
        """
        if self.layer_norm_epsilon != 1e-5:
            raise NotImplementedError(
                f"Mamba2Config.to_state_spaces_dict: layer_norm_epsilon={self.layer_norm_epsilon}, mamba_ssm "
                "knows only 1e-5; such a model can be written in the form 'transformers'"
            )
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["attn_cfg"] = None if self.attn_cfg is None else dataclasses.asdict(self.attn_cfg)
        return forms.state_spaces_dict(fields)


# What transformers' Mamba-2 does not have, and the value at which it agrees.
_ORIGINAL_ONLY: dict[str, Any] = {
    "D_has_hdim": False,
    "rmsnorm": True,
    "norm_before_gate": False,
    "d_intermediate": 0,
    "attn_layer_idx": (),
    "attn_cfg": None,
}


def _count_tokens(file: pathlib.Path) -> int | None:
    """Number of ids a `tokenizer.json` knows (its largest id + 1), or None if it does not say."""
    if not file.is_file():
        return None
    content = read_json(file)
    try:
        vocab = content["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, Mapping) else list(range(len(vocab)))
        ids += [token["id"] for token in content.get("added_tokens") or ()]
        return max(ids) + 1
    except (KeyError, TypeError, ValueError, AttributeError):
        return None  # load_tokenizer says what is wrong with it; the config stands without it
