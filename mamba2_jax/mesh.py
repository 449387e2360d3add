"""Device meshes: axis names, construction, and the checks that every op on a mesh shares."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

AXES: tuple[str, ...] = ("data", "fsdp", "sequence", "tensor")
"""Mesh axes, outermost first: devices that differ only in the last axis are neighbours."""

BATCH = ("data", "fsdp")
"""The mesh axes that shard batch rows."""


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
    """Build a device mesh with the axes `data`, `fsdp`, `sequence` and `tensor`.

    Args:
        data: number of devices along this axis; -1, allowed for one axis, takes all remaining devices.
        fsdp: see `data`.
        sequence: see `data`.
        tensor: see `data`.
        devices: the devices to use; None: all devices of all processes.

    Returns:
        A mesh with all axes of `AXES`, including those of size 1.

    Raises:
        ValueError: the product of the sizes is not the number of devices; the message lists sizes that fit.
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
    """Return the product of the sizes of the mesh axes; an axis missing from the mesh counts 1."""
    return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def check_mesh(op: str, mesh: Mesh) -> None:
    """Raise ValueError unless the mesh has all of `AXES` and only Auto axes; further axes shard nothing."""
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
    """Raise ValueError unless the mesh axes divide `size`; `name` stands for it in the message."""
    devices = axis_size(mesh, *axes)
    if size % devices:
        raise ValueError(
            f"{op}: {name}={size} is not a multiple of the mesh's {' x '.join(axes)} = {devices}; "
            f"make that axis smaller, or change {name}"
        )
