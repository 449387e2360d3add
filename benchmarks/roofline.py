"""The least that a scan can cost: bytes that must move, operations that must be done, and what devices can.

    forward    T (4HP + 2H + 4GN) + 4bHPN bytes      T (2LNG + H (2LP + 4NP)) operations
    backward   T (6HP + 4H + 8GN) bytes              T (6LNG + H (4LP + 10NP)) operations

for `T = b l` tokens in 16-bit numbers: x, B, C and dt are read once, y written once, and the final state in
float32; backward, x, B, C, dt and dy are read, and their gradients written. `L` is the chunk's length.
"""

import dataclasses

CHUNK = 64  # the shortest chunk that fills a tensor core's tile, so the fewest operations


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call of the scan."""

    name: str
    b: int
    l: int
    h: int
    g: int
    p: int = 64
    n: int = 128
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"b{self.b} l{self.l} h{self.h} p{self.p} n{self.n} g{self.g} {self.dtype}"


SHAPES = (
    Shape("A: a layer of Codestral", 1, 4096, 128, 8),
    Shape("B: a layer of the 2.7b, training", 8, 2048, 80, 1),
    Shape("C: the 2.7b, a very long row", 1, 131072, 80, 1),
    Shape("130m, training", 8, 2048, 24, 1),
    Shape("130m, a long row", 1, 8192, 24, 1),
    Shape("130m, a longer row", 1, 65536, 24, 1),
    Shape("2.7b, a long row", 1, 8192, 80, 1),
    Shape("2.7b, a longer row", 1, 65536, 80, 1),
)
# Bytes and bfloat16 operations per second, by what is in the device's name. H100 (SXM) and H200: measured,
# by a device-to-device copy and an 8192 x 8192 x 8192 product; the others: NVIDIA's data sheets, not sparse.
DEVICES = {
    "H200": (4.3e12, 788e12),
    "H100": (3.0e12, 798e12),
    "A100": (2.0e12, 312e12),
    "L4": (0.30e12, 121e12),
    "RTX 4090": (1.01e12, 165e12),
}


def forward_bytes(s: Shape) -> int:
    tokens = s.b * s.l
    return tokens * (4 * s.h * s.p + 2 * s.h + 4 * s.g * s.n) + 4 * s.b * s.h * s.p * s.n


def backward_bytes(s: Shape) -> int:
    return s.b * s.l * (6 * s.h * s.p + 4 * s.h + 8 * s.g * s.n)


def forward_operations(s: Shape, chunk: int = CHUNK) -> int:
    return s.b * s.l * (2 * chunk * s.n * s.g + s.h * (2 * chunk * s.p + 4 * s.n * s.p))


def backward_operations(s: Shape, chunk: int = CHUNK) -> int:
    return s.b * s.l * (6 * chunk * s.n * s.g + s.h * (4 * chunk * s.p + 10 * s.n * s.p))


def bytes_of(s: Shape, what: str) -> int:
    """Bytes of `"forward"` or of `"forward + backward"`."""
    return forward_bytes(s) + (backward_bytes(s) if "backward" in what else 0)


def floor(s: Shape, what: str, device: str) -> float | None:
    """The least seconds on a device, or None if it is not in the table."""
    found = next((peaks for name, peaks in DEVICES.items() if name in device), None)
    if found is None:
        return None
    bandwidth, speed = found
    seconds = max(forward_bytes(s) / bandwidth, forward_operations(s) / speed)
    if "backward" in what:
        seconds += max(backward_bytes(s) / bandwidth, backward_operations(s) / speed)
    return seconds
