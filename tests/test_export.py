"""`jax.export` with a symbolic batch size: one program for any number of rows."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from models import SIZES, random_ids, random_jax_model, relative

from mamba2_jax import Mamba2Config, generate

HYBRID = Mamba2Config(**SIZES).replace(
    attn_layer_idx=(1,), attn_cfg={"num_heads": 4, "head_dim": 8, "d_conv": 4}
)


def rows_of(length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*export.symbolic_shape("b"), length), jnp.int32)


def test_a_forward_pass_runs_any_number_of_rows():
    model = random_jax_model(HYBRID)
    program = export.export(jax.jit(lambda ids: model(ids).logits))(rows_of(9))
    if importlib.util.find_spec("flatbuffers"):
        program = export.deserialize(program.serialize())
    for batch in (1, 3):
        ids = random_ids(batch, 9).astype(np.int32)
        assert relative(program.call(ids), model(ids).logits) < 1e-5


def test_generate_runs_any_number_of_rows():
    model = random_jax_model(HYBRID)

    @jax.jit
    def tokens(ids, mask):
        options = {"eos_token_id": 5, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}
        return generate(model, ids, mask, max_new_tokens=6, key=jax.random.key(0), **options).tokens

    rows = rows_of(9)
    program = export.export(tokens)(rows, rows)
    ids, mask = random_ids(3, 9).astype(np.int32), np.ones((3, 9), np.int32)
    mask[0, :4] = 0
    np.testing.assert_array_equal(program.call(ids, mask), tokens(ids, mask))
