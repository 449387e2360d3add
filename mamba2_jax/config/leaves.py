"""Declarations of parameters: name, named axes, range of stored rows, and role.

`config.kinds` declares the tensors of a model with named axes, and a config gives each name its size.
Import and export, sharding, optimizer, adapters and the parameter count all read the result.

An axis is named by what it counts, the outermost first: "heads head_dim" has size `num_heads * head_dim` and
may be sharded between heads. Projections and convolutions are stored `(out, in)` and used `(in, out)`;
embeddings are `(v, d)` both in files and in the model.
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
    """Role of a parameter, which decides its training, precision and layout.

    Args:
        decays: weight decay applies.
        is_matrix: maps between two widths of a block, input axis first, output axes last; Muon trains these.
        keep_precision: never cast to a narrower dtype than the stored one.
        rows_last: the stored rows are the leaf's last axes (the matrix is transposed), not its first.
        input_axis: the contracted axis; for an embedding, the axis of the lookup.
        quantized: how a quantized model holds it: "" as floats, "matrix" in the model's weight type, "table"
            in that type's `of_tables`.
    """

    decays: bool = False
    is_matrix: bool = False
    keep_precision: bool = False
    rows_last: bool = False
    input_axis: int = 0
    quantized: str = ""


PROJECTION = Role(decays=True, is_matrix=True, rows_last=True, quantized="matrix")
CONVOLUTION = Role(decays=True, rows_last=True)
ROUTER = Role(decays=True, rows_last=True)
EXPERTS = Role(decays=True, quantized="matrix")  # one matrix per expert, kept as stored
CORRECTION = Role(keep_precision=True)  # of a router's choice
EMBEDDING_TABLE = Role(decays=True, quantized="table")
OUTPUT_HEAD = Role(decays=True, input_axis=1, quantized="table")
SCORES = Role(decays=True, rows_last=True)  # of a classifier's labels
DYNAMICS = Role(keep_precision=True)  # A_log, dt_bias, D
VECTOR = Role()  # weights of norms, and biases
QUANTIZED = Role(keep_precision=True)  # values and scales


@dataclass(frozen=True)
class Leaf:
    """One parameter of the model: stored rows `rows[0]` to `rows[1]` of a stored tensor.

    Args:
        path: dot-joined path in the model.
        axes: name of each axis, in the words of the declaring `Part`.
        units: size of the first word of each axis name: the largest number of shards along that axis.
        shape: shape in the model.
        rows: begin and end along the stored tensor's first axis.
        role: role of the parameter.
    """

    path: str
    axes: tuple[str, ...]
    units: tuple[int, ...]
    shape: tuple[int, ...]
    rows: tuple[int, int]
    role: Role

    @property
    def name(self) -> str:
        """Return the last component of the path."""
        return self.path.rpartition(".")[2]

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint under its canonical name, with the leaves in the order of its stored rows.

    `name` is the path of the leaves up to the suffix of each; `file_name` is what the family's files call the
    tensor. `leaves` is empty for a head that the file may contain but the model lacks. `reason` says, for
    messages, which option requires an optional tensor; "" for other tensors. `matrices`: the stored rows are
    those of so many equal matrices, of which files may have one tensor each; 0: it is one tensor. `dtype` is
    the safetensors name of the stored dtype; "": any float type.
    """

    name: str
    shape: tuple[int, ...]
    leaves: tuple[Leaf, ...]
    reason: str = ""
    file_name: str = ""
    matrices: int = 0
    dtype: str = ""

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Return the shape in files, where matrices have an axis of their own."""
        if not self.matrices:
            return self.shape
        return (self.matrices, self.shape[0] // self.matrices, *self.shape[1:])

    def below(self, at: str, file_name: str = "") -> "StoredTensor":
        """Return a copy with the prefix `at` on the tensor's name and on the leaves' paths.

        `file_name` is the name in files; "": the same name.
        """
        leaves = tuple(dataclasses.replace(leaf, path=at + leaf.path) for leaf in self.leaves)
        name = at + self.name
        return dataclasses.replace(self, name=name, leaves=leaves, file_name=file_name or name)


@dataclass(frozen=True)
class Tensor:
    """Declaration of a stored tensor, before a config gives its axes sizes.

    Args:
        name: name below the layer.
        role: role of the leaves.
        leaves: suffix of each leaf's name -> the axes along its stored rows.
        row: the axes of one stored row; only the last is an axis of the model's leaf.
        when: option or size that must be nonzero for the tensor to exist ("": the tensor always exists).
        each: axis of the stored rows that counts matrices, see `StoredTensor`; "": none.
    """

    name: str
    role: Role
    leaves: Mapping[str, tuple[str, ...]]
    row: tuple[str, ...] = ()
    when: str = ""
    each: str = ""


@dataclass(frozen=True)
class Part:
    """A group of tensor declarations, with the sizes and options that the declarations name.

    Args:
        tensors: declarations in the order of checkpoints.
        numbers: function from a config to the size of each axis word and the value of each option.
        options: where a user sets the options, for messages.
    """

    tensors: tuple[Tensor, ...]
    numbers: "Callable[[Mamba2Config], Mapping[str, int]]"
    options: str = "the config"

    def stored(self, config: "Mamba2Config") -> Iterator[StoredTensor]:
        """Yield the tensors with the sizes of a config; tensors and leaves of size 0 are left out."""
        numbers = self.numbers(config)
        for tensor in self.tensors:
            if tensor.when and not numbers[tensor.when]:
                continue
            row = tuple(_size(axis, numbers) for axis in tensor.row)
            leaves = tuple(_leaves(tensor, numbers))
            if leaves and math.prod(row):
                is_option = isinstance(numbers.get(tensor.when), bool)
                reason = f"{tensor.when} is true in {self.options}" if is_option else ""
                shape, matrices = (leaves[-1].rows[1], *row), numbers[tensor.each] if tensor.each else 0
                yield StoredTensor(tensor.name, shape, leaves, reason, matrices=matrices)


def projection(
    name: str, width: str, leaves: Mapping[str, tuple[str, ...]], bias: str = "", when: str = ""
) -> tuple[Tensor, ...]:
    """Declare a matrix stored `(rows, width)`, if the option `when` is set, and its bias, if `bias` is."""
    weight = Tensor(f"{name}.weight", PROJECTION, leaves, (width,), when)
    return (weight, Tensor(f"{name}.bias", VECTOR, leaves, when=bias)) if bias else (weight,)


def convolution(name: str, leaves: Mapping[str, tuple[str, ...]], bias: str) -> tuple[Tensor, ...]:
    """Declare a depthwise convolution stored `(rows, 1, taps)`, and its bias under the option `bias`."""
    weight = Tensor(f"{name}.weight", CONVOLUTION, leaves, ("1", "taps"))
    return weight, Tensor(f"{name}.bias", VECTOR, leaves, when=bias)


def matrix_per_expert(name: str, *rows: str, width: str, when: str = "") -> Tensor:
    """Declare the experts' matrices `(experts, *rows, width)`, stored rows of `width` numbers.

    Files have them as one tensor `(experts, rows, width)`, or as one tensor per expert.
    """
    return Tensor(name, EXPERTS, {"": ("experts", *rows)}, (width,), when, each="experts")


def vector(name: str, *axes: str, role: Role = VECTOR, when: str = "") -> Tensor:
    """Declare a tensor with one number per stored row."""
    return Tensor(name, role, {"": axes}, when=when)


def _leaves(tensor: Tensor, numbers: Mapping[str, int]) -> Iterator[Leaf]:
    """Yield the leaves of a tensor, with consecutive ranges of its stored rows."""
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
    """Return the size of an axis: the product of its words' sizes, where a literal number is its own size."""
    return math.prod(int(word) if word.isdecimal() else numbers[word] for word in axis.split())
