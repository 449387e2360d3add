"""What a parameter is: its name, what its axes count, the stored rows it takes, and what it is for.

The parts of a model (`config.kinds`) declare their tensors in words, without sizes; a config gives the words
sizes. Import and export, sharding, optimizer, adapters and the number of parameters all read the result.

An axis is named by what it counts, the outermost first: "heads head_dim" has `num_heads * head_dim` numbers
and may be cut between heads. Projections and convolutions are stored `(out, in)` and used `(in, out)`;
embeddings are `(v, d)` on both sides.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mamba2_jax.config.mamba2 import Mamba2Config


@dataclass(frozen=True)
class Role:
    """What a parameter is for, and what follows from it.

    Args:
        decays: weight decay acts on it.
        is_matrix: it maps between two widths of a block, input first, output last: Muon's.
        keep_precision: it is never narrowed below what is stored.
        rows_last: the stored rows are the leaf's last axes (the matrix is transposed), not its first.
        input_axis: the axis that is summed over; of an embedding, the one that is looked up.
    """

    decays: bool = False
    is_matrix: bool = False
    keep_precision: bool = False
    rows_last: bool = False
    input_axis: int = 0


PROJECTION = Role(decays=True, is_matrix=True, rows_last=True)
CONVOLUTION = Role(decays=True, rows_last=True)
EMBEDDING_TABLE = Role(decays=True)
OUTPUT_HEAD = Role(decays=True, input_axis=1)
DYNAMICS = Role(keep_precision=True)  # A_log, dt_bias, D
VECTOR = Role()  # weights of norms, and biases


@dataclass(frozen=True)
class Leaf:
    """One parameter of the model: rows `rows[0]` to `rows[1]` of a stored tensor.

    Args:
        path: dot-joined path in the model.
        axes: what each axis counts, in the words of the part that declares it.
        units: how many of the axis's first word each axis has: the most pieces it may be cut into.
        shape: its shape in the model.
        rows: begin and end along the stored tensor's first axis.
        role: what it is for.
    """

    path: str
    axes: tuple[str, ...]
    units: tuple[int, ...]
    shape: tuple[int, ...]
    rows: tuple[int, int]
    role: Role

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition(".")[2]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint under its canonical name, and the leaves that its rows fill, in order.

    `leaves` is empty for a head that the file may repeat but the model does not have. `reason` is the option
    that asks for a tensor which not every model has, in words; often empty.
    """

    name: str
    shape: tuple[int, ...]
    leaves: tuple[Leaf, ...]
    reason: str = ""

    def below(self, at: str) -> "StoredTensor":
        """The same tensor with `at` in front of its name and its leaves' paths."""
        leaves = tuple(dataclasses.replace(leaf, path=at + leaf.path) for leaf in self.leaves)
        return StoredTensor(at + self.name, self.shape, leaves, self.reason)


@dataclass(frozen=True)
class Tensor:
    """A stored tensor as a part of the model declares it, before a config gives it sizes.

    Args:
        name: below the layer.
        role: of its leaves.
        leaves: what each leaf adds to the name, and the axes that its rows count.
        row: the axes of one stored row; only the last is an axis of the model's leaf.
        when: the option or size without which there is no such tensor ("": there always is).
    """

    name: str
    role: Role
    leaves: Mapping[str, tuple[str, ...]]
    row: tuple[str, ...] = ()
    when: str = ""


@dataclass(frozen=True)
class Part:
    """A part of the model: its tensors, and the sizes and options that they are declared in.

    Args:
        tensors: in the order of checkpoints.
        numbers: of a config: each word's size, and each option as true or false.
        options: where a user sets the options, for messages.
    """

    tensors: tuple[Tensor, ...]
    numbers: "Callable[[Mamba2Config], Mapping[str, int]]"
    options: str = "the config"

    def stored(self, config: "Mamba2Config") -> Iterator[StoredTensor]:
        """Give the tensors their sizes. What would hold no number is left out."""
        numbers = self.numbers(config)
        for tensor in self.tensors:
            if tensor.when and not numbers[tensor.when]:
                continue
            row = tuple(_size(axis, numbers) for axis in tensor.row)
            leaves = tuple(_leaves(tensor, numbers))
            if leaves and math.prod(row):
                is_option = isinstance(numbers.get(tensor.when), bool)
                reason = f"{tensor.when} is true in {self.options}" if is_option else ""
                yield StoredTensor(tensor.name, (leaves[-1].rows[1], *row), leaves, reason)


def projection(
    name: str, width: str, leaves: Mapping[str, tuple[str, ...]], bias: str = ""
) -> tuple[Tensor, ...]:
    """Declare a matrix stored `(rows, width)`, and its bias where there is an option for one."""
    weight = Tensor(f"{name}.weight", PROJECTION, leaves, (width,))
    return (weight, Tensor(f"{name}.bias", VECTOR, leaves, when=bias)) if bias else (weight,)


def convolution(name: str, leaves: Mapping[str, tuple[str, ...]], bias: str) -> tuple[Tensor, ...]:
    """Declare a depthwise convolution stored `(rows, 1, taps)`, and its bias."""
    weight = Tensor(f"{name}.weight", CONVOLUTION, leaves, ("1", "taps"))
    return weight, Tensor(f"{name}.bias", VECTOR, leaves, when=bias)


def vector(name: str, *axes: str, role: Role = VECTOR, when: str = "") -> Tensor:
    """Declare what is stored as one row of numbers."""
    return Tensor(name, role, {"": axes}, when=when)


def _leaves(tensor: Tensor, numbers: Mapping[str, int]) -> Iterator[Leaf]:
    """Lay the leaves one after the other along the stored tensor's rows."""
    row = 0
    for ending, axes in tensor.leaves.items():
        end = row + math.prod(_size(axis, numbers) for axis in axes)
        if end > row:
            inner = tensor.row[-1:]
            axes = (*inner, *axes) if tensor.role.rows_last else (*axes, *inner)
            units = tuple(_size(axis.split()[0], numbers) for axis in axes)
            shape = tuple(_size(axis, numbers) for axis in axes)
            yield Leaf(tensor.name + ending, axes, units, shape, (row, end), tensor.role)
        row = end


def _size(axis: str, numbers: Mapping[str, int]) -> int:
    """Multiply the sizes of an axis's words; a digit stands for itself."""
    return math.prod(int(word) if word.isdecimal() else numbers[word] for word in axis.split())
