"""The models: embeddings, blocks, final norm and head, loaded from a checkpoint or newly initialised."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mamba2_jax.config import Mamba2Config
from mamba2_jax.layers.adaptable import Head
from mamba2_jax.layers.block import Mamba2Block
from mamba2_jax.layers.parts import Embedding, RMSNorm, scaled
from mamba2_jax.layers.state import EveryState, LayerState, Rolling, Rows
from mamba2_jax.models.cache import Mamba2Cache
from mamba2_jax.models.inputs import (
    batch_and_length,
    check_inputs,
    check_labels,
    join_rows,
    next_token_targets,
)
from mamba2_jax.models.pretrained import PretrainedModel
from mamba2_jax.ops.checks import check_choice
from mamba2_jax.ops.cross_entropy import IGNORED_LABEL, summed_cross_entropy
from mamba2_jax.ops.device import on_device_of
from mamba2_jax.ops.quantized import QuantizedWeight
from mamba2_jax.ops.scan.dispatch import IMPLEMENTATIONS
from mamba2_jax.ops.segments import document_index, document_positions
from mamba2_jax.sharding import token_sharding
from mamba2_jax.typing import Array, DTypeLike, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mamba2Output:
    """Output of `Mamba2Model`."""

    last_hidden_state: Float[Array, "b l d"]
    """Output of the final norm, in the compute dtype."""
    cache: Mamba2Cache
    """State after each row's last token that is not padding."""
    hidden_states: tuple[Float[Array, "b l d"], ...] | None = None
    """With `output_hidden_states`: the output of each block, then of the final norm."""
    expert_load: Float[Array, "n 2 e"] | None = None
    """Of `forward` with `output_expert_load`: that of each layer with experts."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mamba2CausalLMOutput:
    """Output of `Mamba2ForCausalLM`."""

    logits: Float[Array, "b l v"]
    """Logits of the next token over the padded vocabulary, float32."""
    cache: Mamba2Cache
    """State after each row's last token that is not padding."""
    hidden_states: tuple[Float[Array, "b l d"], ...] | None = None
    """With `output_hidden_states`: the output of each block, then of the final norm."""
    loss: Float[Array, ""] | None = None
    """With `labels`: mean cross entropy in nats over the tokens that have a label."""


class Mamba2Model(PretrainedModel):
    """Mamba-2 without a head: embeddings, blocks and the final norm.

    Args:
        config: sizes and options.
        dtype: compute dtype of matrix products and activations.
        param_dtype: dtype of the initial parameters.
        ssd_implementation: `implementation` of `ops.ssd`, and `preferred` of `ops.mixer_step`, which decodes.
        rngs: source of the initial values, such as `nnx.Rngs(0)`.
    """

    _checkpoint_prefix = "backbone."
    _has_head = False

    def __init__(
        self,
        config: Mamba2Config,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        ssd_implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        check_choice(type(self).__name__, "ssd_implementation", ssd_implementation, (None, *IMPLEMENTATIONS))
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.embeddings = Embedding(
            config.vocab_size, config.hidden_size, config.initializer_range, param_dtype, rngs
        )
        self.layers = nnx.List(
            Mamba2Block(
                config,
                layer=layer,
                dtype=dtype,
                param_dtype=param_dtype,
                ssd_implementation=ssd_implementation,
                rngs=rngs,
            )
            for layer in config.layers
        )
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon, param_dtype)
        self.mesh: Mesh | None = None

    def __call__(
        self,
        input_ids: Int[Array, "b l"] | None = None,
        attention_mask: Int[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        cache: Mamba2Cache | None = None,
        inputs_embeds: Float[Array, "b l d"] | None = None,
        output_hidden_states: bool = False,
    ) -> Mamba2Output:
        """Run all blocks on `(b, l)` tokens; jitted, compiled once per input shape, callable inside a `jit`.

        Args:
            input_ids: `(b, l)` token ids.
            attention_mask: `(b, l)` of 0/1 for these tokens (not the cached ones); padding at the left
                or the right end of a row. Padding does not change the results of a row.
            segment_ids: `(b, l)`; 0 is padding, any change starts a document independent of all others.
            cache: the state to continue from, with any number of new tokens.
            inputs_embeds: `(b, l, d)` instead of `input_ids`: rows of the embedding table.
            output_hidden_states: also return every block's output.

        Raises:
            ValueError: an invalid argument; the message names it.
        """
        inputs = check_inputs(
            type(self).__name__, self.config, input_ids, attention_mask, segment_ids, cache, inputs_embeds
        )
        with self.on_its_device():
            return _run_backbone(self, *inputs, output_hidden_states=output_hidden_states)

    def on_its_device(self) -> AbstractContextManager:
        """Return a context that traces computations for the device to which the parameters are committed."""
        return on_device_of(self.norm_f.weight[...])

    def forward(
        self,
        input_ids,
        attention_mask,
        segment_ids,
        cache,
        inputs_embeds,
        output_hidden_states=False,
        wrap_block: Callable[[Callable], Callable] | None = None,
        every_state: bool = False,
        output_expert_load: bool = False,
        rolling: bool = False,
    ) -> Mamba2Output:
        """Run `__call__` without argument checks and without `jit`, for callers that are jitted themselves.

        `wrap_block` transforms the function that runs one block; training passes remat policies. With
        `every_state` the cache holds the states after each token, for `Mamba2Cache.after_token`. With
        `rolling`, full buffers of attention layers drop a document's first tokens: `layers.state.Rolling`.
        """
        run_block = _run_block_with_load if output_expert_load else _run_block
        run_block = run_block if wrap_block is None else wrap_block(run_block)
        rows = join_rows(attention_mask, segment_ids)
        hidden = self.first_hidden(input_ids, inputs_embeds)
        batch, length = hidden.shape[:2]
        if self.mesh is not None:
            hidden = jax.lax.with_sharding_constraint(hidden, token_sharding(self.mesh, batch, length))
        if cache is None:
            cache = Mamba2Cache.zeros(self.config, batch, self.dtype)

        if self.config.attends:
            rows = rows._replace(past=cache.position, positions=_positions(cache.position, rows, length))
        if rolling:
            rows = rows._replace(rolling=Rolling())
        if every_state:
            rows = rows._replace(every_state=EveryState())

        states, hidden_states, loads = [], [], []
        for block, *before in zip(self.layers, cache.conv, cache.ssm, cache.attention, strict=True):
            hidden, state, *load = run_block(block, hidden, LayerState._make(before), rows)
            loads += [one for one in load if one is not None]
            states.append(state)
            hidden_states.append(hidden)
        hidden = self.norm_f(hidden).astype(self.dtype)
        conv, ssm, attention = zip(*states, strict=True)
        after = _advance(cache.position, rows, length)
        if every_state:
            after = cache.position[:, None] + 1 + jnp.arange(length)
        cache = Mamba2Cache(conv, ssm, after, attention)
        return Mamba2Output(
            last_hidden_state=hidden,
            cache=cache,
            hidden_states=(*hidden_states, hidden) if output_hidden_states else None,
            expert_load=jnp.stack(loads) if loads else None,
        )

    def first_hidden(self, input_ids, inputs_embeds) -> Float[Array, "b l d"]:
        """Return the residual stream before the first block."""
        if inputs_embeds is None:
            inputs_embeds = self.embeddings(input_ids, dtype=self.dtype)
        return scaled(inputs_embeds.astype(self.dtype), self.config.multipliers.embedding)


class Mamba2ForCausalLM(PretrainedModel):
    """Mamba-2 with a language-model head: `Mamba2Model`, then logits of the next token; same arguments.

    >>> model = Mamba2ForCausalLM.from_pretrained()  # the model inside the package
    >>> model(jnp.array([[1, 2, 3]])).logits.shape
    (1, 3, 4096)
    """

    def __init__(
        self,
        config: Mamba2Config,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        ssd_implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.backbone = Mamba2Model(
            config, dtype=dtype, param_dtype=param_dtype, ssd_implementation=ssd_implementation, rngs=rngs
        )
        shape = (config.vocab_size, config.hidden_size)
        tied = config.tie_word_embeddings
        std = None if config.family == "mamba2" else config.initializer_range  # the original's is linear
        self.lm_head = None if tied else Embedding(*shape, std, param_dtype, rngs)
        self.head = Head()  # no weights of its own
        self.head.multiplier = config.multipliers.logits

    def __call__(
        self,
        input_ids: Int[Array, "b l"] | None = None,
        attention_mask: Int[Array, "b l"] | None = None,
        segment_ids: Int[Array, "b l"] | None = None,
        cache: Mamba2Cache | None = None,
        inputs_embeds: Float[Array, "b l d"] | None = None,
        labels: Int[Array, "b l"] | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
    ) -> Mamba2CausalLMOutput:
        """Compute the next-token logits `(b, l, v)`; jitted, compiled once per input shape.

        Args:
            input_ids: `(b, l)` token ids.
            attention_mask: `(b, l)` of 0/1 for these tokens (not the cached ones); padding at the left
                or the right end of a row. Padding does not change the results of a row.
            segment_ids: `(b, l)`; 0 is padding, any change starts a document independent of all others.
            cache: the state to continue from, with any number of new tokens.
            inputs_embeds: `(b, l, d)` instead of `input_ids`: rows of the embedding table.
            labels: `(b, l)`, usually `input_ids`: the loss at position t is that of label t + 1. A label of
                -100, a padding token, and the first token of a document are not in the loss.
            logits_to_keep: compute logits for this many last positions only; 0: for all positions.
            output_hidden_states: also return every block's output.

        Raises:
            ValueError: an invalid argument; the message names it.
        """
        name = type(self).__name__
        inputs = check_inputs(name, self.config, input_ids, attention_mask, segment_ids, cache, inputs_embeds)
        batch, length = batch_and_length(inputs[0], inputs_embeds)
        if not 0 <= logits_to_keep <= length:
            raise ValueError(f"{name}: logits_to_keep={logits_to_keep} must lie in 0..{length} (0 keeps all)")
        if labels is not None:
            if logits_to_keep:
                raise ValueError(f"{name}: labels need all logits; leave logits_to_keep at 0")
            labels = check_labels(name, self.config, labels, batch, length)
        with self.backbone.on_its_device():
            return _run_causal_lm(
                self,
                *inputs,
                labels,
                logits_to_keep=logits_to_keep,
                output_hidden_states=output_hidden_states,
            )

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
        """Compute float32 logits `(..., v)` of hidden states `(..., d)`."""
        return self.head(hidden, self.output_weight, dtype=self.dtype)

    @property
    def output_weight(self) -> Float[Array, "v d"] | QuantizedWeight:
        """Return the matrix `(v, d)` of the head, or of the embedding when the head is tied."""
        table = self.backbone.embeddings if self.lm_head is None else self.lm_head
        return table.weight[...]


@partial(jax.jit, static_argnames="output_hidden_states")
def _run_backbone(model: Mamba2Model, *inputs, output_hidden_states: bool) -> Mamba2Output:
    return model.forward(*inputs, output_hidden_states=output_hidden_states)


@partial(jax.jit, static_argnames=("logits_to_keep", "output_hidden_states"))
def _run_causal_lm(
    model: Mamba2ForCausalLM, *inputs, logits_to_keep: int, output_hidden_states: bool
) -> Mamba2CausalLMOutput:
    *inputs, labels = inputs
    _, attention_mask, segment_ids, _, _ = inputs
    out = model.backbone.forward(*inputs, output_hidden_states=output_hidden_states)
    logits = model.logits(out.last_hidden_state[:, -logits_to_keep:])
    loss = (
        None if labels is None else _next_token_loss(logits, labels, join_rows(attention_mask, segment_ids))
    )
    return Mamba2CausalLMOutput(logits, out.cache, out.hidden_states, loss)


# Layers of one kind have equal shapes: under `jit` this is traced once and called per layer.
_run_block = jax.jit(lambda block, hidden, state, rows: block.mix(hidden, state, rows))
_run_block_with_load = jax.jit(lambda block, hidden, state, rows: block.with_load(hidden, state, rows))


def _next_token_loss(logits: Array, labels: Array, rows: Rows) -> Float[Array, ""]:
    """Compute the mean cross entropy in nats of label t + 1 at position t, over labels not ignored."""
    targets = next_token_targets(labels, rows)
    count = (targets != IGNORED_LABEL).sum()
    return summed_cross_entropy(logits, targets) / jnp.maximum(count, 1)


def _positions(past: Int[Array, " b"], rows: Rows, length: int) -> Int[Array, "b l"]:
    """Compute each token's position in its document, `(b, l)`."""
    if rows.marks is None:
        return past[:, None] + jnp.arange(length)
    return document_positions(rows.marks.astype(jnp.int32), past)


def _advance(position: Int[Array, " b"], rows: Rows, length: int) -> Int[Array, " b"]:
    """Update `position`, the token count of each row's current document, by `length` new tokens."""
    if rows.mask is None:
        return position + length
    if rows.segment_ids is None:
        return position + rows.mask.sum(axis=1, dtype=jnp.int32)
    documents = document_index(rows.segment_ids)
    last = documents[:, -1:]
    count = (rows.mask & (documents == last)).sum(axis=1, dtype=jnp.int32)
    return jnp.where(last[:, 0] == 1, position + count, count)
