"""Layers as data: which modules a layer has, in which branches.

A layer is a sequence of branches. A branch normalises the residual stream, gives the result to its modules,
and adds the sum of their outputs to the stream:

    for branch in layer:
        normed = norm(stream)
        stream = stream + sum(module(normed) for module in branch)

`Mamba2Config.layer_pattern` has one letter per layer, a key of `LAYERS`; `Mamba2Config.feed_forward` is the
second branch of every layer that mixes tokens.

>>> layer_of("M", ("mlp",))
((Slot(attribute='mixer', kind='mamba2'),), (Slot(attribute='mlp', kind='mlp'),))
"""

from typing import NamedTuple, TypeAlias


class Slot(NamedTuple):
    """A module of a layer: its attribute in the block, and its kind, a key of `config.kinds.KINDS`."""

    attribute: str
    kind: str


Layer: TypeAlias = tuple[tuple[Slot, ...], ...]

# Letter -> the modules of the first branch. The letters are those of Nemotron-H's `hybrid_override_pattern`;
# H, Mamba-2 and attention side by side, is Falcon-H1's only layer.
LAYERS: dict[str, tuple[str, ...]] = {
    "M": ("mamba2",),
    "*": ("attention",),
    "H": ("mamba2", "attention"),
    "-": ("mlp",),
    "E": ("experts", "shared_expert"),
}
MAX_LAYERS = 1 << 14
"""Largest number of layers; a file that claims more is broken, and would be slow to refuse later."""
MAX_SIZE = (1 << 31) - 1
"""Largest size of an axis, and largest token id."""
NORMS = ("norm", "norm2")
"""Attribute of the norm before each branch."""

_MIXERS = ("mamba2", "attention")


def layer_of(letter: str, feed_forward: tuple[str, ...]) -> Layer:
    """Return the branches of a layer; `feed_forward` is added only to layers that mix tokens."""
    first = LAYERS[letter]
    branches = [first, feed_forward] if feed_forward and first[0] in _MIXERS else [first]
    return tuple(
        tuple(Slot(_attribute(kind, index), kind) for index, kind in enumerate(branch)) for branch in branches
    )


def _attribute(kind: str, index: int) -> str:
    """Return a module's attribute: the first mixer of a layer is `mixer`, others have their kind's name."""
    return "mixer" if kind in _MIXERS and index == 0 else kind
