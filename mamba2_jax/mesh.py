"""The axes of a mesh of devices, and the checks that every user of a mesh needs."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

AXES: tuple[str, ...] = ("data", "fsdp", "sequence", "tensor")
"""Mesh axes, the farthest apart first: devices that differ in the last axis only are neighbours."""


BATCH = ("data", "fsdp")
"""The mesh axes that split rows of a batch."""


SEQUENCE = "sequence"
TENSOR = "tensor"


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    sequence: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Arrange devices in a mesh of the four axes.

    Args:
        data: devices along the axis; -1, for at most one axis, is all that the others leave.
        fsdp: see `data`.
        sequence: see `data`.
        tensor: see `data`.
        devices: None: all devices of all processes.

    Returns:
        A mesh with the axes `AXES`, those of size 1 too.

    Raises:
        ValueError: sizes that do not multiply to the number of devices; says what would fit.
    """
    sizes: dict[str, int] = dict(zip(AXES, (data, fsdp, sequence, tensor), strict=True))
    devices = jax.devices() if devices is None else list(devices)
    for name, size in sizes.items():
        if type(size) is not int or (size < 1 and size != -1):
            raise ValueError(f"make_mesh: {name}={size!r} must be a positive integer, or -1 for the rest")
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"make_mesh: {' and '.join(rest)} are both -1; one axis can take the rest")
    given = math.prod(size for size in sizes.values() if size != -1)
    if rest and len(devices) % given == 0:
        sizes[rest[0]] = len(devices) // given
    if math.prod(sizes.values()) != len(devices):
        product = " x ".join(f"{name} {size}" for name, size in sizes.items() if size not in (1, -1))
        divisors = [str(size) for size in range(1, len(devices) + 1) if len(devices) % size == 0]
        raise ValueError(
            f"make_mesh: {product or 'data 1'} makes {given} devices, but there are {len(devices)}; "
            f"the sizes must multiply to {len(devices)}, each one of {', '.join(divisors)}"
        )
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def axis_size(mesh: Mesh, *axes: str) -> int:
    """Count the devices along the axes together; an axis that the mesh does not have counts 1."""
    return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def check_mesh(op: str, mesh: Mesh) -> None:
    """Raise ValueError unless the mesh has the four axes; others may be there too, and split nothing."""
    missing = [axis for axis in (*BATCH, SEQUENCE, TENSOR) if axis not in mesh.shape]
    if missing:
        raise ValueError(
            f"{op}: the mesh has axes {tuple(mesh.shape)}, and lacks {', '.join(missing)}; "
            f"make it with all of {', '.join(AXES)}, of size 1 where nothing is split: see make_mesh"
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"{op}: the mesh's axes are {mesh.axis_types}, want AxisType.Auto for each: see make_mesh"
        )


def check_divides(op: str, mesh: Mesh, name: str, size: int, *axes: str) -> None:
    """Raise ValueError unless `size`, called `name`, splits evenly over the axes."""
    devices = axis_size(mesh, *axes)
    if size % devices:
        raise ValueError(
            f"{op}: {name}={size} is not a multiple of the mesh's {' x '.join(axes)} = {devices}; "
            f"make that axis smaller, or change {name}"
        )
