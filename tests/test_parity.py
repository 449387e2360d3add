"""The numbers PyTorch gives: logits, hidden states and loss against transformers on its own checkpoints."""

import inspect

import numpy as np
import pytest
from models import SIZES, checkpoint, jax_model, random_ids, relative, torch_model

from mamba2_jax import Mamba2Model

torch = pytest.importorskip("torch")

# Rounding of float32 sums in another order, through two layers.
TOLERANCE = 2e-5

VARIANTS = {
    "default": {},
    "one group": {"n_groups": 1},
    "eight groups": {"n_groups": 8},
    "tied": {"tie_word_embeddings": True},
    "projection bias": {"use_bias": True},
    "no convolution bias": {"use_conv_bias": False},
    "both biases, tied": {"use_bias": True, "tie_word_embeddings": True},
    "finite dt limit": {"time_step_limit": (0.01, 0.06)},
    "residual in compute dtype": {"residual_in_fp32": False},
    # transformers 5.23 divides out_proj once more when it loads such a checkpoint; here is what it wrote.
    "rescaled residual": {"rescale_prenorm_residual": True},
    "three taps": {"conv_kernel": 3},
    "chunk 8": {"chunk_size": 8},
    "chunk 64": {"chunk_size": 64},
    "chunk 256": {"chunk_size": 256},
}


def both(variant: str):
    changes = VARIANTS[variant]
    return torch_model(**changes), jax_model(**changes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_hidden_states_and_loss(variant):
    theirs, ours = both(variant)
    ids = random_ids(2, 65)
    want = theirs(torch.tensor(ids), labels=torch.tensor(ids), output_hidden_states=True)
    got = ours(ids, labels=ids, output_hidden_states=True)
    assert relative(got.logits, want.logits) < TOLERANCE
    assert relative(got.loss, want.loss) < TOLERANCE
    assert len(got.hidden_states) == len(want.hidden_states) == SIZES["num_hidden_layers"] + 1
    for mine, their in zip(got.hidden_states, want.hidden_states, strict=True):
        assert relative(mine, their) < TOLERANCE


@pytest.mark.parametrize("length", [1, 2, 63, 64, 257])
def test_any_length(length):
    theirs, ours = both("default")
    ids = random_ids(1, length, seed=length)
    assert relative(ours(ids).logits, theirs(torch.tensor(ids)).logits) < TOLERANCE


@pytest.mark.parametrize("variant", ["default", "one group", "eight groups", "tied", "no convolution bias"])
def test_left_padding(variant):
    theirs, ours = both(variant)
    ids = random_ids(2, 65)
    mask = np.ones_like(ids)
    mask[1, :17] = 0
    want = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True)
    got = ours(ids, attention_mask=mask, output_hidden_states=True)
    valid = mask.astype(bool)
    assert relative(np.asarray(got.logits)[valid], want.logits.numpy()[valid]) < TOLERANCE
    for mine, their in zip(got.hidden_states, want.hidden_states, strict=True):
        assert relative(np.asarray(mine)[valid], their.numpy()[valid]) < TOLERANCE


def their_cache_of(out):
    """The state that transformers returns: `cache` since 5.24, `cache_params` before."""
    return out.cache if "cache" in out else out.cache_params


def test_states_after_a_prefill():
    theirs, ours = both("default")
    ids = random_ids(2, 65)
    want = their_cache_of(theirs(torch.tensor(ids), use_cache=True))
    got = ours(ids).cache
    inner = SIZES["num_heads"] * SIZES["head_dim"]
    for layer in range(SIZES["num_hidden_layers"]):
        assert relative(got.ssm[layer], want.get_recurrent_state(layer, state_idx=0)) < TOLERANCE
        conv = want.get_conv_state(layer, state_idx=0).numpy()[..., -3:].swapaxes(1, 2)  # (b, 3, channels)
        assert relative(got.conv[layer].x, conv[..., :inner]) < TOLERANCE
        BC = np.asarray(got.conv[layer].BC).reshape(2, 3, -1)
        assert relative(BC, conv[..., inner:]) < TOLERANCE


def test_decoding_with_their_cache_and_ours():
    theirs, ours = both("default")
    ids = random_ids(2, 24)
    their_cache = their_cache_of(theirs(torch.tensor(ids[:, :20]), use_cache=True))
    argument = "cache" if "cache" in inspect.signature(theirs.forward).parameters else "cache_params"
    cache = ours(ids[:, :20]).cache
    for t in range(20, 24):
        want = theirs(torch.tensor(ids[:, t : t + 1]), use_cache=True, **{argument: their_cache})
        got = ours(ids[:, t : t + 1], cache=cache)
        their_cache, cache = their_cache_of(want), got.cache
        assert relative(got.logits, want.logits) < TOLERANCE


def test_the_backbone_alone():
    ids = random_ids(2, 30)
    ours = Mamba2Model.from_pretrained(checkpoint(), dtype="float32")
    want = torch_model().backbone(torch.tensor(ids)).last_hidden_state
    assert relative(ours(ids).last_hidden_state, want) < TOLERANCE


@pytest.mark.parametrize("variant", ["default", "eight groups"])
def test_bfloat16_is_no_further_from_the_truth_than_theirs(variant):
    changes = VARIANTS[variant]
    theirs, ours = torch_model("bfloat16", **changes), jax_model("bfloat16", **changes)
    ids = random_ids(4, 100)
    # The truth is computed in float32 from the weights as bfloat16 stores them.
    truth_model = type(ours).from_pretrained(checkpoint("bfloat16", **changes), dtype="float32")
    truth = np.asarray(truth_model(ids).logits)
    want = theirs(torch.tensor(ids)).logits.float().numpy()
    got = np.asarray(ours(ids).logits)
    distance = lambda logits: np.linalg.norm(logits - truth)  # noqa: E731
    assert distance(got) <= 1.2 * distance(want)
    assert distance(got) > 0  # it did compute in bfloat16


def test_stored_dtypes_are_kept_and_computed_with():
    ours = type(jax_model()).from_pretrained(checkpoint("bfloat16"), dtype="float32")
    assert ours.backbone.layers[0].mixer.A_log[...].dtype == "bfloat16"
    ids = random_ids(1, 40)
    want = torch_model("bfloat16").float()
    try:
        assert relative(ours(ids).logits, want(torch.tensor(ids)).logits) < TOLERANCE
    finally:
        want.to(torch.bfloat16)
