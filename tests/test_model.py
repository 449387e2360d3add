"""What a model promises: padding, packing and continuation change nothing; bad input is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import SIZES, random_ids, relative

from mamba2_jax import Mamba2Cache, Mamba2Config, Mamba2ForCausalLM, Mamba2Model

TOLERANCE = 1e-5  # float32 sums in another order
LENGTH = 24


def make(**changes) -> Mamba2ForCausalLM:
    config = Mamba2Config(**{**SIZES, **changes})
    return Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def ids():
    return random_ids(3, LENGTH)


@pytest.fixture(scope="module")
def whole(model, ids):
    return model(ids)


def caches_agree(got, want):
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if np.abs(other).max() > 0:
            assert relative(mine, other) < TOLERANCE


class TestContinuation:
    @pytest.mark.parametrize("cuts", [(1,), (23,), (7, 8, 9), (2, 16)], ids=str)
    def test_any_chunking_gives_the_same_numbers(self, model, ids, whole, cuts):
        cache, logits = None, []
        for start, end in zip((0, *cuts), (*cuts, LENGTH), strict=True):
            out = model(ids[:, start:end], cache=cache)
            cache = out.cache
            logits.append(out.logits)
        assert relative(jnp.concatenate(logits, 1), whole.logits) < TOLERANCE
        caches_agree(cache, whole.cache)

    def test_decays_and_steps_without_bounds(self, ids):
        """A of -inf, steps of 10000 and of 0: finite numbers, steps as the prefill, finite gradients."""
        model = make()
        for layer in model.backbone.layers:
            mixer = layer.mixer
            mixer.A_log[...] = mixer.A_log[...].at[jnp.array([0, 1, 2])].set(100.0)
            mixer.dt_bias[...] = mixer.dt_bias[...].at[jnp.array([1, 2, 3])].set(jnp.array([1e4, -1e4, 1e4]))
        mask = np.ones((3, LENGTH), bool)
        mask[1, :5] = False
        whole = model(ids, attention_mask=mask)
        cache, logits = None, []
        for t in range(LENGTH):
            out = model(ids[:, t : t + 1], attention_mask=mask[:, t : t + 1], cache=cache)
            cache = out.cache
            logits.append(out.logits)
        assert relative(jnp.concatenate(logits, 1)[mask], whole.logits[mask]) < TOLERANCE
        caches_agree(cache, whole.cache)
        gradients = nnx.grad(lambda model: model(ids, attention_mask=mask).logits.max())(model)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
            assert np.isfinite(leaf).all(), path

    @pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.01, 0.05)])
    def test_single_steps_equal_the_prefill_also_with_a_dt_limit(self, ids, limit):
        model = make(time_step_limit=limit, use_bias=True)
        whole = model(ids)
        cache, logits = None, []
        for t in range(LENGTH):
            out = model(ids[:, t : t + 1], cache=cache)
            cache = out.cache
            logits.append(out.logits)
        assert relative(jnp.concatenate(logits, 1), whole.logits) < TOLERANCE
        caches_agree(cache, whole.cache)

    def test_position_counts_tokens(self, model, ids, whole):
        assert whole.cache.position.tolist() == [LENGTH] * 3
        mask = np.ones((3, LENGTH), int)
        mask[1, 20:] = 0
        more = model(ids, attention_mask=mask, cache=whole.cache)
        assert more.cache.position.tolist() == [48, 44, 48]


class TestPadding:
    @pytest.mark.parametrize("changes", [{}, {"use_bias": True}, {"n_groups": 1}], ids=str)
    def test_a_padded_row_equals_the_row_alone(self, ids, changes):
        model = make(**changes)
        mask = np.ones((3, LENGTH), int)
        mask[0, :9] = 0  # left
        mask[1, 15:] = 0  # right
        mask[2, :4] = mask[2, 20:] = 0  # both
        padded = model(ids, attention_mask=mask)
        for row in range(3):
            valid = mask[row].astype(bool)
            alone = model(ids[row : row + 1, valid])
            assert relative(padded.logits[row, valid], alone.logits[0]) < TOLERANCE
            caches_agree(padded.cache[row], alone.cache)

    def test_decoding_after_a_right_padded_prefill(self, model, ids):
        mask = np.ones((3, LENGTH), int)
        mask[0, 15:] = 0
        cache = model(ids, attention_mask=mask).cache
        alone = model(ids[:1, :15]).cache
        for t in range(3):
            step, single = model(ids[:, t : t + 1], cache=cache), model(ids[:1, t : t + 1], cache=alone)
            cache, alone = step.cache, single.cache
            assert relative(step.logits[0], single.logits[0]) < TOLERANCE

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_behind_a_cache(self, model, ids, whole, side):
        new = random_ids(3, 6, seed=5)
        mask = np.ones((3, 6), int)
        mask[0, slice(0, 4) if side == "left" else slice(2, 6)] = 0
        padded = model(new, attention_mask=mask, cache=whole.cache)
        alone = model(new[:1, mask[0].astype(bool)], cache=whole.cache[0])
        assert relative(padded.logits[0, mask[0].astype(bool)], alone.logits[0]) < TOLERANCE
        caches_agree(padded.cache[0], alone.cache)

    def test_an_all_padding_row_changes_nothing_and_stays_finite(self, model, ids, whole):
        for length in (1, 6):
            mask = np.ones((3, length), int)
            mask[1] = 0
            out = model(ids[:, :length], attention_mask=mask, cache=whole.cache)
            assert np.isfinite(np.asarray(out.logits)).all()
            for after, before in zip(
                jax.tree.leaves(out.cache[1]), jax.tree.leaves(whole.cache[1]), strict=True
            ):
                np.testing.assert_array_equal(after, before)


class TestPacking:
    ROWS = [[5, 1, 12], [9, 6]]  # document lengths; the rest is padding

    def packed(self, ids):
        segments = np.zeros((2, LENGTH), int)
        for row, lengths in enumerate(self.ROWS):
            start = 0
            for number, length in enumerate(lengths):
                segments[row, start : start + length] = 7 - number  # any change starts a document
                start += length
        return segments

    def test_a_packed_row_equals_its_documents_alone(self, model, ids):
        segments = self.packed(ids)
        out = model(ids[:2], segment_ids=segments, labels=ids[:2])
        losses, counts = [], []
        for row, lengths in enumerate(self.ROWS):
            start = 0
            for length in lengths:
                document = ids[row : row + 1, start : start + length]
                alone = model(document, labels=document)
                assert relative(out.logits[row, start : start + length], alone.logits[0]) < TOLERANCE
                losses.append(float(alone.loss) * (length - 1))
                counts.append(length - 1)
                start += length
            caches_agree(out.cache[row], alone.cache)
            assert out.cache.position[row] == lengths[-1]
        assert relative(out.loss, sum(losses) / sum(counts)) < TOLERANCE

    def test_the_cache_belongs_to_the_first_document(self, model, ids, whole):
        new, segments = random_ids(3, 8, seed=6), np.array([[1] * 3 + [2] * 5] * 3)
        out = model(new, segment_ids=segments, cache=whole.cache)
        first, second = model(new[:, :3], cache=whole.cache), model(new[:, 3:])
        assert relative(out.logits[:, :3], first.logits) < TOLERANCE
        assert relative(out.logits[:, 3:], second.logits) < TOLERANCE
        caches_agree(out.cache, second.cache)

    def test_a_token_counts_when_mask_and_segments_both_say_so(self, model, ids):
        segments = np.ones((3, LENGTH), int)
        mask = np.ones((3, LENGTH), int)
        segments[:, :4], mask[:, 20:] = 0, 0
        out = model(ids, attention_mask=mask, segment_ids=segments)
        alone = model(ids[:, 4:20])
        assert relative(out.logits[:, 4:20], alone.logits) < TOLERANCE
        caches_agree(out.cache, alone.cache)


class TestOptions:
    def test_logits_to_keep(self, model, ids, whole):
        out = model(ids, logits_to_keep=2)
        assert relative(out.logits, whole.logits[:, -2:]) < TOLERANCE

    def test_inputs_embeds(self, model, ids, whole):
        embeds = model.backbone.embeddings.weight[...][ids]
        assert relative(model(inputs_embeds=embeds).logits, whole.logits) < TOLERANCE

    def test_hidden_states_end_with_the_normed_one(self, model, ids):
        out = model.backbone(ids, output_hidden_states=True)
        assert len(out.hidden_states) == SIZES["num_hidden_layers"] + 1
        np.testing.assert_array_equal(out.hidden_states[-1], out.last_hidden_state)
        assert model.backbone(ids).hidden_states is None

    def test_loss_ignores_marked_labels_and_padding(self, model, ids):
        labels = ids.copy()
        labels[:, :10] = -100
        mask = np.ones((3, LENGTH), int)
        mask[:, 18:] = 0
        logits = np.asarray(model(ids[:, :18]).logits, np.float64)[:, 9:17]
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        want = -np.take_along_axis(log_probabilities, ids[:, 10:18, None], -1).mean()
        assert relative(model(ids, attention_mask=mask, labels=labels).loss, want) < TOLERANCE

    def test_gradients_flow_to_every_parameter_and_are_those_of_padding_free_rows(self, model, ids):
        mask = np.ones((3, LENGTH), int)
        mask[:, 20:] = 0

        @jax.jit
        def gradient(model, ids, mask, labels):
            loss = lambda m: m(ids, attention_mask=mask, labels=labels).loss  # noqa: E731
            return jax.grad(loss)(model)

        padded = jax.tree.leaves(gradient(model, ids, mask, ids))
        alone = jax.tree.leaves(gradient(model, ids[:, :20], np.ones((3, 20), int), ids[:, :20]))
        for one, other in zip(padded, alone, strict=True):
            assert np.abs(other).max() > 0
            assert relative(one, other) < 1e-4  # sums over all tokens cancel

    def test_recurrent_implementation_by_name(self, model, ids, whole):
        recurrent = Mamba2ForCausalLM(model.config, ssd_implementation="recurrent", rngs=nnx.Rngs(0))
        assert relative(recurrent(ids).logits, whole.logits) < TOLERANCE

    def test_inside_the_users_own_jit_and_vmap(self, model, ids, whole):
        run = jax.jit(lambda model, ids: model(ids).logits)
        assert relative(run(model, jnp.asarray(ids)), whole.logits) < TOLERANCE
        rows = jax.vmap(lambda row: model(row[None]).logits[0])(jnp.asarray(ids))
        assert relative(rows, whole.logits) < TOLERANCE

    def test_lists_are_welcome(self, model, ids, whole):
        out = model(ids.tolist(), attention_mask=[[1] * LENGTH] * 3, labels=ids.tolist())
        np.testing.assert_array_equal(out.logits, whole.logits)

    def test_same_bits_every_time(self, model, ids, whole):
        np.testing.assert_array_equal(model(ids).logits, whole.logits)


class TestCache:
    def test_rows_can_be_picked_and_joined(self, whole):
        cache = whole.cache
        joined = Mamba2Cache.concatenate([cache[2], cache[:2]])
        assert joined.batch == 3
        caches_agree(joined, cache[[2, 0, 1]])
        with pytest.raises(IndexError, match="row 3 of a batch of 3"):
            cache[3]

    def test_it_is_a_pytree_that_survives_numpy(self, model, ids, whole):
        leaves, tree = jax.tree.flatten(whole.cache)
        restored = jax.tree.unflatten(tree, [np.array(leaf) for leaf in leaves])
        step = model(ids[:, :1], cache=restored)
        assert relative(step.logits, model(ids[:, :1], cache=whole.cache).logits) < 1e-7

    def test_zeros_is_what_a_model_begins_with(self, model, ids, whole):
        zeros = Mamba2Cache.zeros(model.config, 3)
        np.testing.assert_array_equal(model(ids, cache=zeros).logits, whole.logits)
        assert zeros.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(zeros))
        with pytest.raises(ValueError, match="batch=0"):
            Mamba2Cache.zeros(model.config, 0)


class TestInitialisation:
    config = Mamba2Config(**{**SIZES, "hidden_size": 64, "num_heads": 64, "head_dim": 2, "use_bias": True})

    def test_values_lie_where_the_original_puts_them(self):
        mixer = Mamba2Model(self.config, rngs=nnx.Rngs(0)).layers[0].mixer
        A = np.exp(mixer.A_log[...])
        assert 1 <= A.min() < 3
        assert 13 < A.max() <= 16
        dt = np.log1p(np.exp(np.asarray(mixer.dt_bias[...], np.float64)))
        assert 0.001 * 0.999 <= dt.min() < 0.003
        assert 0.05 < dt.max() <= 0.1 * 1.001
        assert (mixer.D[...] == 1).all()
        assert (mixer.norm.weight[...] == 1).all()
        assert (mixer.in_proj.bias_zx[...] == 0).all()
        bound = 1 / np.sqrt(64)
        assert 0.9 * bound < np.abs(mixer.in_proj.weight_zx[...]).max() <= bound

    def test_out_proj_shrinks_with_depth_when_asked(self):
        plain = Mamba2Model(self.config, rngs=nnx.Rngs(0)).layers[0].mixer.out_proj.weight[...]
        config = self.config.replace(rescale_prenorm_residual=True)
        scaled = Mamba2Model(config, rngs=nnx.Rngs(0)).layers[0].mixer.out_proj.weight[...]
        want = plain / np.sqrt(config.num_hidden_layers)
        # uniform on (-k, k), from a number on (0, 1) times 2 k, less k: near zero, k's rounding is left
        np.testing.assert_allclose(scaled, want, rtol=1e-6, atol=2**-24 * float(jnp.abs(plain).max()))

    def test_the_seed_decides_and_dtypes_are_kept(self):
        first, second = make(), make()
        for one, other in zip(
            jax.tree.leaves(nnx.state(first)), jax.tree.leaves(nnx.state(second)), strict=True
        ):
            np.testing.assert_array_equal(one, other)
        half = Mamba2Model(self.config, dtype="bfloat16", param_dtype="bfloat16", rngs=nnx.Rngs(0))
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("bfloat16")}
        out = half(random_ids(1, 5))
        assert out.last_hidden_state.dtype == jnp.bfloat16
        assert out.cache.ssm[0].dtype == jnp.float32
        assert out.cache.conv[0].x.dtype == jnp.bfloat16

    def test_parameters_are_counted_right_and_named_as_in_transformers(self):
        model = make(tie_word_embeddings=False)
        paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
        assert "backbone.layers.1.mixer.in_proj.weight_zx" in paths
        assert {"backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"} <= paths
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
        assert count == model.config.num_parameters()


GOOD = random_ids(2, 6)
BAD = {
    "rank": ({"input_ids": GOOD[0]}, "input_ids has rank 1"),
    "dtype": ({"input_ids": GOOD.astype(np.float32)}, "input_ids is float32"),
    "no tokens": ({"input_ids": GOOD[:, :0]}, "axis l is empty"),
    "no rows": ({"input_ids": GOOD[:0]}, "axis b is empty"),
    "id too large": ({"input_ids": np.full((2, 6), 96)}, r"input_ids\[0, 0\] = 96 lies outside"),
    "negative id": ({"input_ids": np.full((2, 6), -1)}, r"input_ids\[0, 0\] = -1 lies outside"),
    "neither": ({"input_ids": None}, "either input_ids or inputs_embeds"),
    "embeds": (
        {"input_ids": None, "inputs_embeds": np.ones((2, 6, 3), np.float32)},
        "inputs_embeds has shape",
    ),
    "hole": ({"attention_mask": [[1, 0, 1, 1, 1, 1]] * 2}, "attention_mask has a hole in row 0"),
    "mask values": ({"attention_mask": np.full((2, 6), 2)}, "attention_mask holds values other"),
    "mask dtype": ({"attention_mask": np.ones((2, 6))}, "attention_mask is float64"),
    "past + new": ({"attention_mask": np.ones((2, 30), int)}, r"mask covers the new tokens only"),
    "mask shape": ({"attention_mask": np.ones((2, 5), int)}, "attention_mask has shape"),
    "segments": ({"segment_ids": np.ones((2, 5), int)}, "segment_ids has shape"),
    "labels": ({"labels": np.ones((2, 5), int)}, "labels has shape"),
    "label range": ({"labels": np.full((2, 6), 96)}, r"labels\[0, 0\] = 96"),
    "keep": ({"logits_to_keep": 7}, "logits_to_keep=7"),
    "labels and keep": ({"labels": GOOD, "logits_to_keep": 1}, "labels need all logits"),
    "cache kind": ({"cache": {}}, "cache must be a Mamba2Cache"),
    "cache rows": ({"cache": Mamba2Cache.zeros(Mamba2Config(**SIZES), 3)}, "cache holds 3 rows"),
    "cache of another": (
        {"cache": Mamba2Cache.zeros(Mamba2Config(**{**SIZES, "state_size": 8}), 2)},
        "cache does not fit",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(model, name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=f"Mamba2ForCausalLM: .*{message}"):
        model(**{"input_ids": GOOD, **change})


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="ssd_implementation='cuda' is not one of"):
        Mamba2Model(Mamba2Config(**SIZES), ssd_implementation="cuda", rngs=nnx.Rngs(0))
