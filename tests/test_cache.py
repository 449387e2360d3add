"""States as values: rows picked and forked, files with the model's fingerprint, buckets."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import SIZES, random_ids, random_jax_model
from safetensors.numpy import save_file

from mamba2_jax import Mamba2Cache, Mamba2Config
from mamba2_jax.lora import add_lora
from mamba2_jax.models.cache import bucket
from mamba2_jax.models.cache_file import fingerprint, read_notes

CONFIG = Mamba2Config(**SIZES)
HYBRID = CONFIG.replace(attn_layer_idx=(1,), attn_cfg={"num_heads": 4, "head_dim": 8, "d_conv": 4})


@pytest.fixture(scope="module")
def model():
    return random_jax_model(HYBRID)


@pytest.fixture(scope="module")
def cache(model):
    return model(random_ids(3, 7)).cache


@pytest.mark.parametrize(
    ("rows", "want"),
    [
        (1, [1]),
        (np.int64(1), [1]),
        (np.uint8(2), [2]),
        (jnp.asarray(1), [1]),
        (-1, [2]),
        (slice(1, None), [1, 2]),
        ([2, 0, 0], [2, 0, 0]),
        (np.array([0, -1]), [0, 2]),
        (np.array([True, False, True]), [0, 2]),
        (jnp.array([2, 1]), [2, 1]),
    ],
    ids=repr,
)
def test_rows_are_picked(cache, rows, want):
    picked = cache[rows]
    assert picked.batch == len(want)
    for mine, whole in zip(jax.tree.leaves(picked), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(mine, np.asarray(whole)[want])


def test_rows_are_picked_by_tracers_and_forked(cache):
    picked = jax.jit(lambda cache, row: (cache[row], cache.repeat(2)))(cache, jnp.asarray(1))
    np.testing.assert_array_equal(picked[0].ssm[0], cache.ssm[0][1:2])
    np.testing.assert_array_equal(picked[1].ssm[0], np.asarray(cache.ssm[0])[[0, 0, 1, 1, 2, 2]])


@pytest.mark.parametrize("rows", [3, -4, np.int64(3), [0, 3], np.array([-4]), jnp.array([5])], ids=repr)
def test_a_row_outside_the_batch_is_named(cache, rows):
    with pytest.raises(IndexError, match=r"row -?\d of a batch of 3"):
        cache[rows]


@pytest.mark.parametrize("rows", [1.0, [0.5], "a", [[0, 1]], np.array([True]), None], ids=repr)
def test_what_is_no_row_is_named(cache, rows):
    with pytest.raises(IndexError, match="rows want integers"):
        cache[rows]


def test_buckets_waste_less_than_an_eighth_and_are_few():
    assert [bucket(n) for n in (1, 2, 16, 17, 32, 33, 100, 4097)] == [1, 16, 16, 18, 32, 36, 104, 4608]
    lengths = np.arange(17, 5000)
    buckets = np.array([bucket(n) for n in lengths])
    assert (buckets >= lengths).all()
    assert ((buckets - lengths) * 8 < lengths).all()
    assert len(set(buckets[lengths <= 4096])) == 64  # eight per octave


class TestFiles:
    def test_a_saved_state_goes_on_as_the_state_itself(self, tmp_path):
        model = random_jax_model(HYBRID, "bfloat16")  # and its states in bfloat16, float32 and int32
        cache = model(random_ids(2, 7)).cache
        cache.save(tmp_path / "a" / "state", model, notes={"who": "näme", "list": json.dumps([1])})
        again = Mamba2Cache.load(tmp_path / "a" / "state", model)
        assert jax.tree.structure(again) == jax.tree.structure(cache)
        for mine, whole in zip(jax.tree.leaves(again), jax.tree.leaves(cache), strict=True):
            assert mine.dtype == whole.dtype
            np.testing.assert_array_equal(mine, whole)
        more = random_ids(2, 3, seed=1)
        np.testing.assert_array_equal(model(more, cache=again).logits, model(more, cache=cache).logits)
        assert read_notes(tmp_path / "a" / "state") == {"who": "näme", "list": "[1]"}
        assert [file.name for file in (tmp_path / "a").iterdir()] == ["state"]
        (tmp_path / "ordinary").touch()
        modes = [(tmp_path / name).stat().st_mode for name in ("a/state", "ordinary")]
        assert modes[0] == modes[1]

    def test_the_fingerprint_is_that_of_what_decides_the_states(self, model):
        same = random_jax_model(HYBRID.replace(chunk_size=8, eos_token_id=5))
        assert fingerprint(same) == fingerprint(model)
        assert fingerprint(model.backbone) == fingerprint(model)
        other = random_jax_model(HYBRID)
        table = other.backbone.embeddings.weight
        table[...] = table[...].at[jnp.array([5, 6])].set(table[...][jnp.array([6, 5])])  # the same numbers
        changed = [
            other,
            random_jax_model(HYBRID.replace(layer_norm_epsilon=1e-6)),
            random_jax_model(HYBRID, "bfloat16"),
        ]
        adapted = random_jax_model(HYBRID)
        add_lora(adapted, rngs=nnx.Rngs(0))
        changed.append(adapted)
        assert len({fingerprint(one) for one in (model, *changed)}) == 5

    def test_another_models_state_is_refused(self, tmp_path, model, cache):
        cache.save(tmp_path / "state", model)
        with pytest.raises(ValueError, match="the state of another model .fingerprint"):
            Mamba2Cache.load(tmp_path / "state", random_jax_model(HYBRID, seed=1))
        for config in (CONFIG, HYBRID.replace(state_size=8), HYBRID.replace(num_hidden_layers=3)):
            with pytest.raises(ValueError, match="do not fit this model's config"):
                Mamba2Cache.load(tmp_path / "state", random_jax_model(config))

    def test_what_is_no_saved_state_is_named(self, tmp_path, model):
        with pytest.raises(FileNotFoundError, match="nothing: no such file"):
            Mamba2Cache.load(tmp_path / "nothing", model)
        (tmp_path / "junk").write_text("junk")
        save_file({"ssm.0": np.zeros(3, np.float32)}, tmp_path / "other")
        for name in ("junk", "other"):
            with pytest.raises(ValueError, match=f"{name}: not a saved state"):
                Mamba2Cache.load(tmp_path / name, model)


def test_a_float64_model_keeps_a_float64_state():
    with jax.enable_x64(True):
        cache = Mamba2Cache.zeros(Mamba2Config.preset("mamba2-130m"), 1, "float64")
        assert cache.ssm[0].dtype == cache.conv[0].x.dtype == "float64"
    assert Mamba2Cache.zeros(Mamba2Config.preset("mamba2-130m"), 1, "bfloat16").ssm[0].dtype == "float32"
