"""Models of the families on the Mamba-2 mixer: against transformers, and, where it is wrong, themselves."""

import copy
import shutil
from functools import partial

import family_models
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from mamba2_jax import Mamba2Cache, Mamba2Config, Mamba2ForCausalLM, generate
from mamba2_jax.cli.info import describe
from mamba2_jax.generation import PromptLookup
from mamba2_jax.lora import LoraConfig, add_lora, load_lora, lora_parameters, save_lora
from mamba2_jax.training import loss_and_cache, loss_fn
from mamba2_jax.weights import outgoing_weights

IDS = np.random.default_rng(0).integers(3, 64, (2, 13))
names = pytest.mark.parametrize("name", family_models.VARIANTS)
_models: dict[str, Mamba2ForCausalLM] = {}


def model_of(name):
    if name not in _models:
        _models[name] = Mamba2ForCausalLM.from_pretrained(family_models.folder(name))
    return _models[name]


def relative_error(got, want):
    want = np.asarray(want, np.float64)
    scale = np.abs(want).max() or 1.0  # the gradient of an expert that no token chose is 0
    return np.abs(np.asarray(got, np.float64) - want).max() / scale


@pytest.mark.parametrize("name", [*family_models.VARIANTS, *family_models.RARE])
def test_logits_are_those_of_transformers(name):
    with torch.no_grad():
        want = family_models.oracle(name)(torch.tensor(IDS)).logits.numpy()
    assert relative_error(model_of(name)(jnp.array(IDS)).logits, want) < 2e-5


@names
def test_gradients_are_those_of_autograd(name):
    theirs = family_models.oracle(name)
    theirs.zero_grad()
    logits = theirs(torch.tensor(IDS)).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, torch.tensor(IDS[:, 1:]).flatten(), reduction="sum").backward()
    want = in_files({path: parameter.grad.numpy() for path, parameter in theirs.named_parameters()})
    model = model_of(name)
    gradients = jax.jit(jax.grad(lambda model: loss_fn(model, {"input_ids": jnp.array(IDS)})[0]))(model)
    got = stored_arrays(gradients)
    corrections = {path for path in got if "e_score" in path}  # a buffer there; no gradient here
    assert got.keys() - corrections == want.keys()
    assert all((got[path] == 0).all() for path in corrections)
    for path, gradient in want.items():
        assert relative_error(got[path], gradient) < 1e-4, path


@pytest.mark.parametrize(
    "name", ["falcon", "granite", "bamba"]
)  # both mixers in a layer, no positions, rotary
def test_the_loss_of_pieces_adds_up_to_that_of_the_whole(name):
    model, ids = model_of(name), jnp.array(IDS)
    want, _ = jax.jit(loss_fn)(model, {"input_ids": ids})
    score = jax.jit(partial(loss_and_cache, rolling=True))
    cache, nats = Mamba2Cache.zeros(model.config, 2, capacity=12), 0.0
    for begin in range(0, 12, 4):
        piece = {"input_ids": ids[:, begin : begin + 4], "targets": ids[:, begin + 1 : begin + 5]}
        more, (_, cache) = score(model, piece, cache)
        nats += float(more)
    np.testing.assert_allclose(nats, want, rtol=1e-5)  # float32 sums in another order


def in_files(arrays):
    """Parameters of transformers 5 under the names, and in the shapes, that it gives them in files."""
    renamed = {}
    nemotron = any("mixer." in path for path in arrays)
    for path, array in arrays.items():
        if nemotron:
            path = path.replace("model.", "backbone.")
        for old, new in NAMES_IN_FILES.items():
            path = path.replace(old, new)
        if "mixer.experts." in path:
            stem, name = path.rsplit(".", 1)
            renamed |= {f"{stem}.{number}.{name}.weight": one for number, one in enumerate(array)}
        else:
            renamed[path] = array
    return renamed


NAMES_IN_FILES = {
    "block_sparse_moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.experts.down_proj": "block_sparse_moe.output_linear.weight",
    "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
}


PLACES = ("dtype", "_name_or_path")


def stored_arrays(model):
    """The tensors that a file of the model would have, by name."""
    return {
        tensor.name: np.concatenate([block.copy() for block in tensor.stored_blocks()]).reshape(tensor.shape)
        for tensor in outgoing_weights(model._arrays(), model.config)
    }


@names
def test_there_and_back_is_the_same_bytes(name, tmp_path):
    model_of(name).save_pretrained(tmp_path)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (family_models.folder(name), tmp_path)
    )
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.tobytes() == after[key].tobytes(), key
    kind, _ = family_models.VARIANTS[name]
    again = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(tmp_path)
    first, second = (model.config.to_dict() for model in (family_models.oracle(name), again))
    assert first | dict.fromkeys(PLACES) == second | dict.fromkeys(PLACES)
    with torch.no_grad():
        assert torch.equal(
            again(torch.tensor(IDS)).logits, family_models.oracle(name)(torch.tensor(IDS)).logits
        )


@names
def test_padding_packing_chunks_and_steps_change_nothing(name):
    model = model_of(name)
    alone = np.asarray(model(jnp.array(IDS)).logits)
    scale = np.abs(alone).max()

    def same(got, want):
        assert np.abs(np.asarray(got) - np.asarray(want)).max() < 1e-5 * scale

    row, other = IDS[0], IDS[1]
    right, left = np.pad(row, (0, 5)), np.pad(row, (5, 0))
    packed = np.concatenate([row[:13], other[:5]])  # the second document is continued below
    marks = np.array([[1] * 13 + [0] * 5, [0] * 5 + [1] * 13, [1] * 13 + [2] * 5])
    out = model(np.stack([right, left, packed]), segment_ids=marks)
    same(out.logits[0, :13], alone[0])
    same(out.logits[1, 5:], alone[0])
    same(out.logits[2, :13], alone[0])
    same(out.logits[2, 13:], alone[1, :5])
    # Decoding goes on: after padding at the right, at the left, and in the second document.
    longer = np.asarray(model(np.hstack([IDS[:, :12], [[9], [9]]])).logits)
    cut = np.stack(
        [np.pad(row[:12], (0, 6)), np.pad(row[:12], (6, 0)), np.concatenate([row[:6], other[:12]])]
    )
    marks = np.array([[1] * 12 + [0] * 6, [0] * 6 + [1] * 12, [1] * 6 + [2] * 12])
    cache = model(cut, segment_ids=marks).cache.reserve(20)
    step = model(np.full((3, 1), 9), cache=cache).logits[:, 0]
    same(step, longer[[0, 0, 1], -1])
    # A text in pieces.
    first = model(IDS[:, :8])
    second = model(IDS[:, 8:], cache=first.cache.reserve(16))
    same(first.logits, alone[:, :8])
    same(second.logits, alone[:, 8:])


@names
def test_an_untouched_config_says_the_same(name):
    config = model_of(name).config
    assert Mamba2Config.from_dict(config.to_dict()) == config
    buffers = [b for path, b in family_models.oracle(name).named_buffers() if "e_score" in path]
    arrays = [*family_models.oracle(name).parameters(), *buffers]
    assert config.num_parameters() == sum(array.numel() for array in arrays)
    other = config.replace(eos_token_id=(5, 6), vocab_size=72)
    assert Mamba2Config.from_dict(other.to_dict()) == other
    with pytest.raises(NotImplementedError, match="chunk_size differ from the file"):
        config.replace(chunk_size=64).to_dict()
    with pytest.raises(NotImplementedError, match="mamba_ssm has no .*family="):
        config.to_state_spaces_dict()


@pytest.mark.parametrize("name", ["bamba", "granite", "nemotron", "falcon"])
def test_limits_of_dt_hold_in_prefill_and_decoding(name):
    file = family_models.oracle(name).config.to_dict() | {"time_step_limit": [0.01, 0.05]}
    config = Mamba2Config.from_dict(file)
    assert config.time_step_limit == (0.01, 0.05)
    model = Mamba2ForCausalLM._from_arrays(config, model_of(name)._arrays(), dtype="float32")
    whole = np.asarray(model(jnp.array(IDS)).logits)
    assert relative_error(whole, model_of(name)(jnp.array(IDS)).logits) > 1e-4  # the limits matter
    cache = model(jnp.array(IDS[:, :-1])).cache.reserve(13)
    assert relative_error(model(jnp.array(IDS[:, -1:]), cache=cache).logits[:, -1], whole[:, -1]) < 1e-5


def test_nemotron_knows_no_floor_of_dt():
    """transformers 5.24 floors dt at `time_step_min` in prefill, but not in decoding; we go by the limit."""
    file = family_models.oracle("nemotron").config.to_dict() | {"time_step_min": 0.09, "time_step_max": 0.1}
    config = Mamba2Config.from_dict(file)
    model = Mamba2ForCausalLM._from_arrays(config, model_of("nemotron")._arrays(), dtype="float32")
    assert (
        np.asarray(model(jnp.array(IDS)).logits) == np.asarray(model_of("nemotron")(jnp.array(IDS)).logits)
    ).all()


OLD = {  # spellings of files of transformers 4 and of the models' own code
    "bamba": {
        "attn_layer_indices": [1],
        "rope_theta": 10000.0,
        "layers_block_type": None,
        "rope_parameters": None,
    },
    "granite": {
        "layer_types": ["mamba", "attention", "mamba"],
        "rope_theta": 10000.0,
        "rope_parameters": None,
    },
    "nemotron": {
        **{"hybrid_override_pattern": "M-M*M-", "layers_block_type": None, "rms_norm_eps": 1e-5},
        **{"attention_head_dim": 16, "time_step_rank": 256, "attention_bias": False, "rope_theta": 10000.0},
    },
    "falcon": {"rope_theta": 10000.0, "rope_scaling": None, "rope_parameters": None, "mamba_use_mlp": True},
}


@pytest.mark.parametrize("name", OLD)
def test_older_spellings_of_a_config(name):
    file = family_models.oracle(name).config.to_dict() | OLD[name]
    file = {key: value for key, value in file.items() if value is not None}
    if name == "nemotron":
        del file["head_dim"]
    assert Mamba2Config.from_dict(file) == model_of(name).config.replace(
        **{key: None for key in ("pad_token_id",) if name == "granite" and key not in file}
    )


REFUSED = {
    "bamba": [
        {"attention_bias": True},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"qk_norm": True},
    ],
    "granite": [
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"hidden_act": "gelu"},
        {"sliding_window": 64},
    ],
    "nemotron": [{"mlp_bias": True}, {"mlp_hidden_act": "silu"}, {"sliding_window": 128}],
    "falcon": [{"projectors_bias": True}, {"mamba_use_mlp": False}, {"attention_sink": 4}],
}


@pytest.mark.parametrize("name", REFUSED)
def test_keys_that_would_change_numbers_are_refused(name):
    file = family_models.oracle(name).config.to_dict()
    for change in REFUSED[name]:
        with pytest.raises(
            NotImplementedError, match=next(iter(change)) if "rope" not in str(change) else "rope_type"
        ):
            Mamba2Config.from_dict(file | change)
    Mamba2Config.from_dict(file | {"some_new_flag": False, "another": None, "_attn_implementation": "sdpa"})
    with pytest.raises(NotImplementedError, match="quantiz"):
        Mamba2Config.from_dict(file | {"quantization_config": {"quant_method": "fp8"}})


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("zamba2", "shared between layers"),
        ("plamo2", "norms after"),
        ("nemotron_h_omni", "vision"),
        ("mamba", "Mamba-1"),
    ],
)
def test_relatives_are_refused_by_name(model_type, reason):
    with pytest.raises(ValueError, match=f"{model_type}.*{reason}.*'nemotron_h'"):
        Mamba2Config.from_dict({"model_type": model_type, "hidden_size": 32})


def test_names_with_another_prefix_are_read(tmp_path):
    """transformers 5 calls Nemotron's backbone `model` in memory; a bare model's file has no prefix."""
    tensors = load_file(family_models.folder("nemotron") / "model.safetensors")
    for prefix in ("model.", ""):
        folder = tmp_path / f"with {prefix}"
        shutil.copytree(family_models.folder("nemotron"), folder)
        renamed = {name.replace("backbone.", prefix, 1): array for name, array in tensors.items()}
        save_file(renamed, folder / "model.safetensors")
        again = Mamba2ForCausalLM.from_pretrained(folder)
        assert all((again._arrays()[path] == a).all() for path, a in model_of("nemotron")._arrays().items())


def test_predictors_of_several_tokens_are_left_out_with_a_note(tmp_path):
    shutil.copytree(family_models.folder("nemotron"), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"mtp.layers.0.norm.weight": np.ones(32, "float32")}, tmp_path / "model.safetensors")
    reports = []
    Mamba2ForCausalLM.from_pretrained(tmp_path, report=reports.append)
    assert "1 tensors of mtp are not used" in str(reports[0].notes)


@pytest.mark.parametrize("name", ["granite", "nemotron", "falcon"])
def test_text_is_generated_and_streamed(name):
    tokens = generate(model_of(name), jnp.array(IDS), max_new_tokens=5, eos_token_id=None).tokens
    with torch.no_grad():
        ids = torch.tensor(IDS)
        for _ in range(5):  # by hand: transformers' own cache differs, see the limits above
            ids = torch.cat([ids, family_models.oracle(name)(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert (np.asarray(tokens)[:, -5:] == ids[:, -5:].numpy()).all()


def test_info_says_what_a_model_is_made_of(capsys):
    describe(str(family_models.folder("nemotron, groups, latent")))
    text = " ".join(capsys.readouterr().out.split())
    config = model_of("nemotron, groups, latent").config
    idle = 2 * 2 * 24 * 16  # of two experts: two matrices between 24 and 16 channels
    for expected in (
        "family Nemotron-H",
        f"{config.num_parameters():,}, of which a token uses {config.num_parameters() - idle:,}",
        "layers 3: 1 Mamba-2, 1 experts, 1 attention",
        "experts 4, 2 per token, of 24 channels on 16 channels",
        "expert of all tokens 40 channels",
        "KV cache per token, bfloat16 128 bytes",  # keys and values of 2 heads of 16 channels
    ):
        assert expected in text, text
    describe(str(family_models.folder("granite, experts")))
    assert "layers 3: 2 Mamba-2, 1 attention; each then experts + mlp" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("granite, experts", ("in_proj", "out_proj", "q_proj", "o_proj", "input_linear")),
        ("nemotron", ("in_proj", "v_proj", "up_proj", "down_proj")),
        ("falcon", ("in_proj", "self_attn.k_proj", "gate_proj", "down_proj")),
    ],
)
def test_adapters_have_the_names_that_peft_gives_them(name, targets, tmp_path):
    model = Mamba2ForCausalLM.from_pretrained(family_models.folder(name))
    add_lora(model, LoraConfig(rank=2, targets=targets), rngs=nnx.Rngs(0))
    parameters = lora_parameters(model)
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    nnx.update(model, jax.tree.map(lambda a: 0.2 * jax.random.normal(next(keys), a.shape), parameters))
    want = np.asarray(model(jnp.array(IDS)).logits)
    assert relative_error(model_of(name)(jnp.array(IDS)).logits, want) > 1e-3
    save_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(family_models.oracle(name)), tmp_path)
    with torch.no_grad():
        assert relative_error(theirs(torch.tensor(IDS)).logits.numpy(), want) < 2e-5
    again = Mamba2ForCausalLM.from_pretrained(family_models.folder(name))
    theirs.save_pretrained(tmp_path / "theirs")
    load_lora(again, tmp_path / "theirs")
    assert (np.asarray(again(jnp.array(IDS)).logits) == want).all()


def test_drafts_of_a_hybrid_are_checked_in_one_call(tmp_path):
    """Falcon-H1's layers have both kinds of states; going back to an accepted token takes all of them."""
    model = model_of("falcon")
    plain = generate(model, jnp.array(IDS), max_new_tokens=8, eos_token_id=None)
    drafted = generate(model, jnp.array(IDS), max_new_tokens=8, eos_token_id=None, draft=PromptLookup(2))
    assert (plain.tokens == drafted.tokens).all()
    assert relative_error(drafted.cache.ssm[0], plain.cache.ssm[0]) < 1e-5
    read = int(plain.cache.position[0])  # the slots behind are unused
    drafted_keys, keys = (out.cache.attention[0].keys[:, :read] for out in (drafted, plain))
    assert relative_error(drafted_keys, keys) < 1e-5
    drafted.cache.save(tmp_path / "state", model)
    again = Mamba2Cache.load(tmp_path / "state", model)
    assert (again.ssm[1] == drafted.cache.ssm[1]).all()
