"""The one table between checkpoint tensors and the model's parameters, used in both directions.

A stored tensor splits by rows into the model's leaves: the rows of `in_proj.weight` are z, x, B, C and dt.
They become leaves by meaning, because only then can heads and groups be split over devices; so do q, k and v
of an attention layer. Projections and
the convolution are stored `(out, in)` and used `(in, out)`; embeddings are `(v, d)` on both sides.

>>> from mamba2_jax.config import Mamba2Config
>>> config = Mamba2Config.preset("mamba2-130m")
>>> table = {stored.name: stored for stored in checkpoint_table(config)}
>>> stored = table["backbone.layers.0.mixer.in_proj.weight"]
>>> stored.shape
(3352, 768)
>>> for leaf in stored.leaves:
...     print(leaf.path, leaf.shape, leaf.rows)
backbone.layers.0.mixer.in_proj.weight_zx (768, 2, 1536) (0, 3072)
backbone.layers.0.mixer.in_proj.weight_BC (768, 2, 128) (3072, 3328)
backbone.layers.0.mixer.in_proj.weight_dt (768, 24) (3328, 3352)
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from mamba2_jax.config import AttentionConfig, Mamba2Config

EMBEDDING = "backbone.embeddings.weight"
HEAD = "lm_head.weight"
_PREFIX = "backbone."


@dataclass(frozen=True)
class Leaf:
    """One parameter of the model: rows `rows[0]` to `rows[1]` of a stored tensor.

    Args:
        path: dot-joined path in the model.
        shape: its shape there.
        rows: begin and end along the stored tensor's first axis.
        rows_last: the stored rows are the leaf's last axes (the matrix is transposed), not its first.
        keep_precision: never narrowed below what is stored (A_log, dt_bias, D).
    """

    path: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    rows_last: bool = False
    keep_precision: bool = False

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition(".")[2]

    def as_rows(self, array: np.ndarray) -> np.ndarray:
        """View a contiguous array of the leaf's shape as `(rows, numbers per row)`, as the file orders them.

        Importing writes through this view, exporting reads through it.
        """
        count = self.rows[1] - self.rows[0]
        if self.rows_last:
            return array.reshape(-1, count).T
        return array.reshape(count, -1)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint under its canonical name, and the leaves that its rows fill, in order.

    `leaves` is empty for a head that the file may repeat but the model does not have.
    """

    name: str
    shape: tuple[int, ...]
    leaves: tuple[Leaf, ...]

    def assemble(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Build the stored tensor from arrays by leaf path: the way out, the inverse of reading."""
        parts = [leaf.as_rows(np.ascontiguousarray(arrays[leaf.path])) for leaf in self.leaves]
        return np.concatenate(parts).reshape(self.shape)


@dataclass(frozen=True)
class _Part:
    """A leaf before it has its place: name, shape, and how many of its last (or first) axes are rows."""

    path: str
    shape: tuple[int, ...]
    row_axes: int = 1
    rows_last: bool = False
    keep_precision: bool = False

    @property
    def num_rows(self) -> int:
        """How many stored rows it takes."""
        axes = (
            self.shape[len(self.shape) - self.row_axes :] if self.rows_last else self.shape[: self.row_axes]
        )
        return math.prod(axes)


def checkpoint_table(config: Mamba2Config, head: bool = True) -> tuple[StoredTensor, ...]:
    """List every tensor of a checkpoint with its shape and the parameters that it holds.

    Args:
        config: the model.
        head: whether the model has an output head (False: the bare Mamba2Model).

    Returns:
        The tensors by canonical name, transformers'. `lm_head.weight` is always last; it has no leaves when
        the head is tied or not wanted.
    """
    vocab = (config.vocab_size, config.hidden_size)
    table = [_store(EMBEDDING, vocab, _Part(EMBEDDING, vocab))]
    for index in range(config.num_hidden_layers):
        table += _layer(config, index)
    norm = f"{_PREFIX}norm_f.weight"
    table.append(_store(norm, (config.hidden_size,), _Part(norm, (config.hidden_size,))))
    own_head = head and not config.tie_word_embeddings
    table.append(_store(HEAD, vocab, *([_Part(HEAD, vocab)] if own_head else [])))
    return tuple(table)


def stored_names(name: str) -> tuple[str, ...]:
    """Every name under which a file may hold the tensor, the canonical one first.

    state-spaces writes `embedding` for `embeddings`, Mistral puts `model.` in front, and a bare Mamba2Model
    has no `backbone.`.
    """
    names = [name, name.replace("backbone.embeddings.", "backbone.embedding.")]
    names += [f"model.{other}" for other in names] + [other.removeprefix(_PREFIX) for other in names]
    return tuple(dict.fromkeys(names))


def written_name(name: str, form: str, head: bool) -> str:
    """Return the name that a form writes a tensor under; a bare Mamba2Model's have no `backbone.`."""
    if form == "state-spaces":
        return name.replace("backbone.embeddings.", "backbone.embedding.")
    return name if head else name.removeprefix(_PREFIX)


def match_names(
    table: tuple[StoredTensor, ...], present: Collection[str], tied: bool
) -> tuple[dict[str, str], list[str], list[str]]:
    """Find each tensor of the table among the names that a checkpoint has.

    Args:
        table: what the model needs, from `checkpoint_table`.
        present: the stored names.
        tied: head and embedding are one tensor: either may stand for both.

    Returns:
        `(found, missing, unexpected)`: canonical name -> stored name, and what is left over on each side. A
        second name for a tensor already found is unexpected.
    """
    found: dict[str, str] = {}
    missing = []
    for stored in table:
        name = next((name for name in stored_names(stored.name) if name in present), None)
        if name is not None:
            found[stored.name] = name
        elif stored.leaves:
            missing.append(stored.name)
    if tied and EMBEDDING in missing and HEAD in found:
        missing.remove(EMBEDDING)
        found[EMBEDDING] = found.pop(HEAD)
    unexpected = sorted(set(present) - set(found.values()))
    return found, missing, unexpected


def _layer(config: Mamba2Config, index: int) -> Iterator[StoredTensor]:
    """One block's tensors."""
    d, m, at = config.hidden_size, config.mlp_width, f"{_PREFIX}layers.{index}."
    yield _store(f"{at}norm.weight", (d,), _Part(f"{at}norm.weight", (d,)))
    if config.attn_cfg is not None and index in config.attn_layer_idx:
        yield from _attention_mixer(config.attn_cfg, d, f"{at}mixer.")
    else:
        yield from _mamba_mixer(config, f"{at}mixer.")
    if config.d_intermediate:
        yield _store(f"{at}norm2.weight", (d,), _Part(f"{at}norm2.weight", (d,)))
        yield from _matrix(f"{at}mlp.fc1.", (d,), False, ("", (2, m)))  # rows value, gate
        yield from _matrix(f"{at}mlp.fc2.", (m,), False, ("", (d,)))


def _mamba_mixer(config: Mamba2Config, at: str) -> Iterator[StoredTensor]:
    """The tensors of a Mamba-2 mixer; `at` is its path with the closing dot."""
    d, e, gn, h = config.hidden_size, config.d_ssm, config.groups_state_size, config.num_heads
    m = config.parallel_mlp_width
    rows = [("_zx", (2, e)), ("_BC", (2, gn)), ("_dt", (h,))]
    if m:
        rows.insert(0, ("_z0x0", (2, m)))
    yield from _matrix(f"{at}in_proj.", (d,), config.use_bias, *rows)
    taps = (1, config.conv_kernel)
    yield from _matrix(f"{at}conv1d.", taps, config.use_conv_bias, ("_x", (e,)), ("_BC", (2, gn)))
    for name in ("dt_bias", "A_log"):
        yield _store(f"{at}{name}", (h,), _Part(f"{at}{name}", (h,), keep_precision=True))
    skips = (h, config.head_dim) if config.D_has_hdim else (h,)
    part = _Part(f"{at}D", skips, row_axes=len(skips), keep_precision=True)
    yield _store(f"{at}D", (part.num_rows,), part)
    if config.rmsnorm:
        yield _store(f"{at}norm.weight", (e,), _Part(f"{at}norm.weight", (e,)))
    yield from _matrix(f"{at}out_proj.", (m + e,), config.use_bias, ("", (d,)))


def _attention_mixer(attention: AttentionConfig, d: int, at: str) -> Iterator[StoredTensor]:
    """The tensors of an attention mixer; `at` is its path with the closing dot."""
    query, key, m = attention.query_width, attention.key_width, attention.mlp_width
    heads = [("_q", (query,)), ("_k", (key,)), ("_v", (key,))]
    mlp = [("_mlp", (2, m))] if m else []  # value, gate
    yield from _matrix(f"{at}in_proj.", (d,), attention.qkv_proj_bias, *heads, *mlp)
    if attention.d_conv:
        yield from _matrix(f"{at}conv1d.", (1, attention.d_conv), True, *heads)
    yield from _matrix(f"{at}out_proj.", (query + m,), attention.out_proj_bias, ("", (d,)))


_Rows = tuple[str, tuple[int, ...]]
"""What a leaf's name ends with, and the shape of the rows it takes."""


def _matrix(at: str, inner: tuple[int, ...], bias: bool, *leaves: _Rows) -> Iterator[StoredTensor]:
    """A projection stored `(rows, in)` or a depthwise convolution `(rows, 1, taps)`, and its bias."""
    weights = [
        _Part(f"{at}weight{name}", (inner[-1], *shape), row_axes=len(shape), rows_last=True)
        for name, shape in leaves
    ]
    rows = sum(part.num_rows for part in weights)
    yield _store(f"{at}weight", (rows, *inner), *weights)
    if bias:
        biases = [_Part(f"{at}bias{name}", shape, row_axes=len(shape)) for name, shape in leaves]
        yield _store(f"{at}bias", (rows,), *biases)


def _store(name: str, shape: tuple[int, ...], *parts: _Part) -> StoredTensor:
    """Lay the parts one after the other along the stored tensor's rows."""
    leaves, row = [], 0
    for part in parts:
        end = row + part.num_rows
        leaves.append(Leaf(part.path, part.shape, (row, end), part.rows_last, part.keep_precision))
        row = end
    return StoredTensor(name, shape, tuple(leaves))
