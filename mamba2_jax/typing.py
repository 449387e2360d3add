"""Shape annotations and their axis legend: a letter names the same axis in every shape of the package.

| letter | axis | letter | axis |
|---|---|---|---|
| `b` | batch | `q` `s` | target / source position inside a chunk; `s`: slot of an attention buffer |
| `l` | sequence | `d` | model width (`hidden_size`) |
| `h` | heads | `e` | inner width (`intermediate_size`) |
| `p` | head_dim | `k` | convolution taps |
| `g` | groups (of B and C) | `v` | vocabulary |
| `n` | state_dim | `r` | LoRA rank |
| `c` | chunks | `kv` | key and value heads of attention |

Signatures carry shapes as `Float[Array, "b l h p"]` (jaxtyping), which the tests check at run time.
"""

from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

__all__ = ["Array", "Bool", "DTypeLike", "Float", "Int"]
