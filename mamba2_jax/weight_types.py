"""Types of quantized weights: how rows of numbers become narrow values and scales, and numbers again.

A row holds the weights of one output channel. It is divided into groups, and each number is stored as a
level: `number = level * scale of its group`. The functions work on NumPy and on JAX arrays, inside `jit` too.

>>> import numpy as np
>>> rows = np.linspace(-1, 1, 128, dtype=np.float32).reshape(1, 128)
>>> values, scales = WEIGHT_TYPES["int4"].quantize(rows)
>>> values.shape, values.dtype.name, scales.shape
((1, 64), 'uint8', (1, 2))
>>> bool(abs(dequantize(values, scales) - rows).max() < 0.1)
True
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

TypeName: TypeAlias = Literal["int8", "int4"]


@dataclass(frozen=True)
class WeightType:
    """One type of quantized weights.

    Args:
        name: its name in options and in `config.json`.
        dtype: NumPy dtype of the values.
        stored: dtype of the values in safetensors files.
        levels: the smallest and the largest level.
        group: numbers of a row that share a scale; 0: the whole row.
        per_value: levels that one value holds.
        of_tables: name of the type that embedding and head get beside it.
    """

    name: TypeName
    dtype: str
    stored: str
    levels: tuple[int, int]
    group: int = 0
    per_value: int = 1
    of_tables: TypeName = "int8"

    def groups(self, width: int) -> int:
        """Return the number of groups of a row of `width` numbers.

        Raises:
            ValueError: groups of at least 16 numbers do not divide the row.
        """
        size = math.gcd(width, self.group) if self.group else width
        if self.group and size < _SMALLEST_GROUP:
            raise ValueError(
                f"quantize: rows of {width} numbers are not a multiple of {_SMALLEST_GROUP}, the smallest "
                f"group of {self.name}; use int8"
            )
        return width // size

    def quantize(self, rows: Any) -> tuple[Any, Any]:
        """Round rows to the nearest levels.

        Args:
            rows: `(..., width)`, NumPy or JAX, any float dtype, finite.

        Returns:
            Values `(..., width / per_value)` and float32 scales `(..., groups)`.
        """
        groups = rows.astype("float32").reshape(*rows.shape[:-1], self.groups(rows.shape[-1]), -1)
        scales = self.scales(groups)
        return self.pack(self.nearest(groups, scales[..., None])), scales

    def scales(self, groups: Any) -> Any:
        """Return the scale of each group `(..., size)`: its largest number gets an outermost level."""
        xp, (low, high) = groups.__array_namespace__(), self.levels
        if low == -high:
            return xp.abs(groups).max(-1) * (1 / high)  # as XLA divides by a constant
        # There is one more level below zero than above, which the largest number gets, whatever its sign.
        top, bottom = groups.max(-1), groups.min(-1)
        return xp.where(top > -bottom, top, bottom) / low

    def nearest(self, numbers: Any, scales: Any) -> Any:
        """Return the levels nearest to numbers, as integers in float32; with a scale next to 0 they are 0."""
        xp = numbers.__array_namespace__()
        # The inverse, because XLA divides so: NumPy and XLA then round alike.
        inverse = 1 / xp.where(xp.abs(scales) < _NEXT_TO_0, 1, scales)
        return xp.clip(xp.round(numbers * inverse), *self.levels)

    def pack(self, levels: Any) -> Any:
        """Pack levels `(..., groups, size)` into values `(..., groups * size / per_value)`.

        Of two levels in a byte, the lower four bits are of the first half of the group, the upper four of the
        second.
        """
        if self.per_value == 2:
            codes, half = (levels - self.levels[0]).astype(self.dtype), levels.shape[-1] // 2
            codes = codes[..., :half] | (codes[..., half:] << 4)
        else:
            codes = levels.astype(self.dtype)
        return codes.reshape(*levels.shape[:-2], -1)

    def unpack(self, values: Any, groups: int) -> list[Any]:
        """Return the levels of each part of the groups, `(..., groups, size / per_value)`, as int8."""
        values = values.reshape(*values.shape[:-1], groups, -1)
        if self.per_value == 1:
            return [values]
        return [codes.astype("int8") + self.levels[0] for codes in (values & 15, values >> 4)]


_SMALLEST_GROUP = 16
_NEXT_TO_0 = 1e-30

WEIGHT_TYPES: dict[TypeName, WeightType] = {
    "int8": WeightType("int8", "int8", "I8", (-127, 127)),
    "int4": WeightType("int4", "uint8", "U8", (-8, 7), group=64, per_value=2),
}
"""Types by name."""


def type_of(values: Any) -> WeightType:
    """Return the type whose values have the dtype of an array."""
    return next(one for one in WEIGHT_TYPES.values() if one.dtype == values.dtype.name)


def dequantize(values: Any, scales: Any) -> Any:
    """Return the float32 numbers `(..., width)` of values and scales."""
    parts = type_of(values).unpack(values, scales.shape[-1])
    levels = values.__array_namespace__().concatenate(parts, axis=-1)
    return (levels.astype("float32") * scales[..., None]).reshape(*values.shape[:-1], -1)
