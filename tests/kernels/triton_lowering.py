"""Lower a forward and a backward pass through jax_triton for a GPU that is not here. Run as a script."""

import os
import sys

import jax
import jax.numpy as jnp


def main() -> None:
    """Print how many launches the lowered program holds, and TRITON_CACHE_DIR, which jax_triton empties."""
    from mamba2_jax.pallas.triton_gpu import call as triton_call
    from mamba2_jax.pallas.triton_gpu import scan as triton_gpu

    library = triton_call.jax_triton().triton_lib
    # the one question that jax_triton asks the device
    library.triton_kernel_call_lib.get_compute_capability = lambda device: int(sys.argv[1])

    def loss(x, dt, A, B, C, D, state, documents):
        y, state = triton_gpu.ssd(x, dt, A, B, C, D, state, documents)
        return y.astype(jnp.float32).sum() + state.sum()

    b, l, h, p, g, n = 1, 600, 4, 64, 1, 128
    shapes = [((b, l, h, p), jnp.bfloat16), ((b, l, h), jnp.float32), ((h,), jnp.float32)]
    shapes += [((b, l, g, n), jnp.bfloat16)] * 2 + [((h,), jnp.float32), ((b, h, p, n), jnp.float32)]
    inputs = [jax.ShapeDtypeStruct(*shape) for shape in [*shapes, ((b, l), jnp.int32)]]
    gradient = jax.jit(jax.value_and_grad(loss, argnums=range(7)))
    text = gradient.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    print(text.count("triton_kernel_call"), os.environ.get("TRITON_CACHE_DIR"))


if __name__ == "__main__":
    main()
