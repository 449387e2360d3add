import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from mamba2_jax.config import AttentionConfig, Mamba2Config
from mamba2_jax.hub import EMBEDDED_MODEL

PUBLISHED = {
    "mamba2-130m": (128_989_632, 768, 24, 24, 3352, 1792),
    "mamba2-370m": (368_346_624, 1024, 48, 32, 4384, 2304),
    "mamba2-780m": (780_161_280, 1536, 48, 48, 6448, 3328),
    "mamba2-1.3b": (1_343_757_312, 2048, 48, 64, 8512, 4352),
    "mamba2-2.7b": (2_702_599_680, 2560, 64, 80, 10576, 5376),
    "codestral-7b": (7_285_403_648, 4096, 64, 128, 18560, 10240),
}
ATTENTION = {
    "causal": True,
    "d_conv": 4,
    "head_dim": 128,
    "num_heads": 30,
    "out_proj_bias": False,
    "qkv_proj_bias": False,
    "rotary_emb_dim": 64,
}
HYBRID = {
    "d_model": 2560,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [9, 18, 27, 36, 45, 56],
    "attn_cfg": ATTENTION,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
CODESTRAL_PARAMS = {
    "dim": 4096,
    "n_layers": 64,
    "vocab_size": 32768,
    "n_groups": 8,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 1,
    "tie_embeddings": False,
    "model_type": "mamba",
}
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "head_dim": 8,
    "num_heads": 8,
    "n_groups": 2,
    "state_size": 16,
    "num_hidden_layers": 3,
}


FOR_OTHERS = {"intermediate_size", "pad_vocab_size_multiple"}  # transformers has no such fields


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name):
    count, hidden_size, layers, heads, in_proj, channels = PUBLISHED[name]
    config = Mamba2Config.preset(name)
    assert config.num_parameters() == count
    assert (config.hidden_size, config.num_hidden_layers, config.num_heads) == (hidden_size, layers, heads)
    assert 2 * config.d_ssm + 2 * config.groups_state_size + heads == in_proj
    assert config.conv_dim == channels
    assert (config.head_dim, config.state_size, config.conv_kernel, config.expand) == (64, 128, 4, 2)
    assert config.norm_before_gate is False
    if name == "codestral-7b":
        assert (config.vocab_size, config.real_vocab_size, config.n_groups) == (32768, 32768, 8)
        assert (config.bos_token_id, config.eos_token_id, config.tie_word_embeddings) == (1, 2, False)
    else:
        assert (config.vocab_size, config.real_vocab_size, config.n_groups) == (50288, 50277, 1)
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 0)
        assert config.tie_word_embeddings


def test_preset_equals_its_state_spaces_file():
    file = {**HYBRID, "attn_layer_idx": [], "attn_cfg": {}}
    assert Mamba2Config.from_dict(file) == Mamba2Config.preset("mamba2-2.7b")


def test_preset_equals_its_mistral_file():
    assert Mamba2Config.from_dict(CODESTRAL_PARAMS) == Mamba2Config.preset("codestral-7b")


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match=r"mamba2-3b.*mamba2-130m.*codestral-7b"):
        Mamba2Config.preset("mamba2-3b")


def test_defaults_are_those_of_transformers():
    from transformers import Mamba2Config as Theirs
    from transformers import PreTrainedConfig

    ours, theirs = Mamba2Config(), Theirs()
    names = set(ours.to_dict()) - {"architectures", "model_type", *FOR_OTHERS}
    for name in names:
        expected = getattr(theirs, name)
        assert getattr(ours, name) == (tuple(expected) if isinstance(expected, list) else expected), name
    assert set(theirs.to_dict()) - set(PreTrainedConfig().to_dict()) <= names


def _random_fields(seed):
    rng = np.random.default_rng(seed)
    groups = int(rng.choice([1, 2, 8]))
    head_dim = int(rng.choice([4, 8]))
    heads = groups * int(rng.integers(1, 4))
    expand = 2
    hidden = heads * head_dim // expand
    eos = [None, 3, [3, 5]][rng.integers(3)]
    return {
        "num_heads": heads,
        "head_dim": head_dim,
        "hidden_size": hidden,
        "expand": expand,
        "n_groups": groups,
        "vocab_size": int(rng.integers(20, 99)),
        "state_size": int(rng.integers(1, 20)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "conv_kernel": int(rng.integers(2, 6)),
        "use_bias": bool(rng.integers(2)),
        "use_conv_bias": bool(rng.integers(2)),
        "tie_word_embeddings": bool(rng.integers(2)),
        "residual_in_fp32": bool(rng.integers(2)),
        "rescale_prenorm_residual": bool(rng.integers(2)),
        "hidden_act": str(rng.choice(["silu", "swish"])),
        "layer_norm_epsilon": float(rng.uniform(1e-6, 1e-3)),
        "initializer_range": float(rng.uniform(0.01, 0.2)),
        "time_step_limit": [(0.0, math.inf), (0.001, 0.25)][rng.integers(2)],
        "chunk_size": int(rng.choice([8, 64, 256])),
        "bos_token_id": [None, 1][rng.integers(2)],
        "pad_token_id": [None, 2][rng.integers(2)],
        "eos_token_id": eos,
    }


@pytest.mark.parametrize("seed", range(12))
def test_round_trip_and_parameter_count_against_transformers(seed, tmp_path):
    import torch
    from transformers import Mamba2Config as Theirs
    from transformers import Mamba2ForCausalLM

    fields = _random_fields(seed)
    theirs = Theirs(**fields)
    theirs.save_pretrained(tmp_path)
    ours = Mamba2Config.from_pretrained(tmp_path)
    for name, value in fields.items():
        assert getattr(ours, name) == (tuple(value) if isinstance(value, list) else value), name
    assert ours.time_step_rank == theirs.time_step_rank

    with torch.device("meta"):
        model = Mamba2ForCausalLM(theirs)
    assert ours.num_parameters() == model.num_parameters()

    # transformers reads what we write, and writes it the same
    written = ours.to_dict()
    file = tmp_path / "config.json"
    ignored = {"transformers_version", "architectures", "time_step_limit", *FOR_OTHERS}
    assert written["time_step_limit"] == list(fields["time_step_limit"])
    saved = {key: value for key, value in json.loads(file.read_text()).items() if key not in ignored}
    assert {key: value for key, value in written.items() if key not in ignored} == saved
    file.write_text(json.dumps(written))
    again = Theirs.from_pretrained(tmp_path)
    for name in fields:
        expected, got = getattr(theirs, name), getattr(again, name)
        assert (list(expected) == got) if isinstance(expected, tuple) else (expected == got), name
    assert Mamba2Config.from_pretrained(tmp_path) == ours


def test_padding_of_the_vocabulary_survives_transformers(tmp_path):
    from transformers import Mamba2Config as Theirs

    config = Mamba2Config(**SMALL, unpadded_vocab_size=90)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    Theirs.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert Mamba2Config.from_pretrained(tmp_path / "again") == config


def test_hybrid_is_read_and_counted():
    config = Mamba2Config.from_dict(HYBRID)
    assert config.num_parameters() == 2_697_590_880
    assert config.attn_cfg == AttentionConfig(**ATTENTION, num_heads_kv=30)
    hash(config)
    with pytest.raises(NotImplementedError, match="attn_layer_idx"):
        config.to_dict()


def test_features_of_the_original_are_named():
    config = Mamba2Config(
        **(SMALL | {"num_heads": 4, "d_ssm": 32}),
        D_has_hdim=True,
        rmsnorm=False,
        norm_before_gate=True,
        d_intermediate=100,
    )
    with pytest.raises(NotImplementedError, match="d_ssm=32.*D_has_hdim=True"):
        config.to_dict()
    # counted by hand from the original's layers: d=32, inner 64, ssm 32, gn=32, h=4, k=4, mlp 128
    in_proj = 32 * (2 * 64 + 2 * 32 + 4)
    layer = 32 + in_proj + (32 + 64) * 5 + 2 * 4 + 32 + 64 * 32 + 32 + 3 * 32 * 128
    assert config.num_parameters() == 3 * layer + 32 + 2 * 97 * 32


def test_ssm_cfg_reaches_every_field():
    ssm_cfg = {
        "layer": "Mamba2",
        "d_state": 32,
        "d_conv": 3,
        "expand": 4,
        "headdim": 16,
        "d_ssm": 128,
        "ngroups": 4,
        "D_has_hdim": True,
        "rmsnorm": False,
        "norm_before_gate": True,
        "dt_limit": [0.01, math.inf],
        "dt_min": 0.002,
        "dt_max": 0.2,
        "dt_init_floor": 1e-3,
        "bias": True,
        "conv_bias": False,
        "chunk_size": 64,
        "A_init_range": [1, 8],
    }
    config = Mamba2Config.from_dict({"d_model": 64, "n_layer": 2, "vocab_size": 101, "ssm_cfg": ssm_cfg})
    assert config == Mamba2Config(
        state_size=32,
        conv_kernel=3,
        expand=4,
        head_dim=16,
        d_ssm=128,
        num_heads=8,
        n_groups=4,
        D_has_hdim=True,
        rmsnorm=False,
        norm_before_gate=True,
        time_step_limit=(0.01, math.inf),
        time_step_min=0.002,
        time_step_max=0.2,
        time_step_floor=1e-3,
        use_bias=True,
        use_conv_bias=False,
        chunk_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        vocab_size=101,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.02,
        rescale_prenorm_residual=True,
    )


def test_codestral_in_transformers_form_ignores_its_wrong_norm_before_gate():
    file = {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "norm_before_gate": True,
        "rms_norm": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
        "hidden_size": 4096,
        "num_heads": 128,
        "n_groups": 8,
        "vocab_size": 32768,
        "time_step_rank": 256,
    }
    config = Mamba2Config.from_dict(file)
    assert config.norm_before_gate is False
    assert config.num_parameters() == PUBLISHED["codestral-7b"][0]


@pytest.mark.parametrize(
    "limit",
    [
        *("[0.0, Infinity]", '[0.0, {"__float__": "Infinity"}]', '[0.0, "Infinity"]'),
        *("[0, 1e308]", "[0, 1e999]", "[0.0, null]", "null"),
    ],
)
def test_spellings_of_infinity(limit, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(SMALL | {"model_type": "mamba2"})[:-1] + f', "time_step_limit": {limit}}}'
    )
    assert Mamba2Config.from_pretrained(tmp_path).time_step_limit == (0.0, math.inf)


FLA = {
    "model_type": "mamba2",
    "architectures": ["Mamba2ForCausalLM"],
    "hidden_size": 32,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "state_size": 16,
    "norm_eps": 1e-6,
    "dt_min": 0.002,
    "dt_max": 0.2,
    "dt_init_floor": 1e-3,
    "dt_limit": [0.01, math.inf],
    "norm_before_gate": True,
    "A_init_range": [1, 16],
    "fuse_norm": True,
    "fuse_cross_entropy": True,
    "fuse_linear_cross_entropy": False,
    "use_l2warp": False,
    "hidden_act": "swish",
}


def test_file_of_flash_linear_attention():
    expected = Mamba2Config(
        **(SMALL | {"n_groups": 1}),
        layer_norm_epsilon=1e-6,
        time_step_min=0.002,
        time_step_max=0.2,
        time_step_floor=1e-3,
        time_step_limit=(0.01, math.inf),
        norm_before_gate=True,
        initializer_range=0.02,
        rescale_prenorm_residual=True,
        hidden_act="swish",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    assert Mamba2Config.from_dict(FLA) == expected
    other = FLA | {"D_has_hdim": True, "rmsnorm": False, "n_groups": 2, "tie_word_embeddings": True}
    changed = {key: other[key] for key in ("D_has_hdim", "rmsnorm", "n_groups", "tie_word_embeddings")}
    assert Mamba2Config.from_dict(other) == expected.replace(**changed)


def test_older_file_of_flash_linear_attention():
    dt = {key: value for key, value in FLA.items() if not key.startswith("dt_") and "gate" not in key}
    older = dt | {"time_step_min": 0.003, "time_step_limit": [0.0, 0.5], "num_heads": 8, "rms_norm": True}
    config = Mamba2Config.from_dict(older)
    assert (config.time_step_min, config.time_step_limit, config.n_groups) == (0.003, (0.0, 0.5), 1)
    with pytest.raises(NotImplementedError, match="n_groups=2"):  # its norm had one group
        Mamba2Config.from_dict(older | {"n_groups": 2})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_norm": True}, "qk_norm=True"),
        ({"rms_norm": False}, "rms_norm=False"),
        ({"intermediate_size": 48}, "intermediate_size=48"),
        ({"norm_eps": 1e-6, "layer_norm_epsilon": 1e-5}, "norm_eps"),
        ({f"key_{i}": "x" * 9000 for i in range(99)}, "key_0=x.* and 91 more"),
    ],
)
def test_a_key_that_may_change_numbers_is_refused(change, message):
    file = SMALL | {"model_type": "mamba2", "tokenizer_class": "T", "intermediate_size": 64, "num_beams": 1}
    Mamba2Config.from_dict(file)
    with pytest.raises(NotImplementedError, match=message) as error:
        Mamba2Config.from_dict(file | change)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    "limit", [[0.0, {"__float__": "lots"}], [0.0, {"__float__": [1]}], [0.0, {}], 3, ["a", 1]]
)
def test_broken_limit_is_named(limit):
    with pytest.raises(ValueError, match="time_step_limit"):
        Mamba2Config.from_dict(SMALL | {"time_step_limit": limit})


def test_older_av_form():
    file = {
        "A_initializer_range": [1, 16],
        "emb_initializer_range": 0.02,
        "model_type": "mamba2",
        "hidden_size": 1024,
        "num_hidden_layers": 48,
        "num_heads": 24,  # stale: that class works it out from the width
        "head_dim": 64,
        "vocab_size": 50288,
        "tie_embedding_weights": True,
        "time_step_limit": [0.0, math.inf],
        "use_triton_kernels": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    config = Mamba2Config.from_dict(file)
    assert (config.n_groups, config.num_heads, config.tie_word_embeddings) == (1, 32, True)
    assert config.num_parameters() == PUBLISHED["mamba2-370m"][0]
    assert Mamba2Config.from_dict(file | {"n_groups": 2}).n_groups == 2
    assert not Mamba2Config.from_dict(file | {"tie_embedding_weights": False}).tie_word_embeddings


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"model_type": "llama", "hidden_size": 64}, "'llama'"),
        ({"model_type": "mamba", "hidden_size": 64}, "Mamba-1"),
        ({"some": 1, "thing": 2}, "none of the known forms.*'some', 'thing'"),
        ({"d_model": 64, "n_layer": 2, "vocab_size": 100, "ssm_cfg": {}}, "'Mamba1'"),
        ({"d_model": 64, "n_layer": 2, "ssm_cfg": {"layer": "Mamba2"}}, "vocab_size.* missing"),
        ({"d_model": 64, "n_layer": 2, "vocab_size": 9, "ssm_cfg": {"layer": "Mamba2", "dd": 1}}, "dd"),
        ({"d_model": 64, "n_layer": 2, "vocab_size": 9, "ssm_cfg": ["Mamba2"]}, "ssm_cfg"),
        (
            {"d_model": "64", "n_layer": 2, "vocab_size": 9, "ssm_cfg": {"layer": "Mamba2"}},
            "hidden_size='64'",
        ),
        ({"d_model": 64, "n_layer": 2, "vocab_size": None, "ssm_cfg": {"layer": "Mamba2"}}, "vocab_size"),
        (HYBRID | {"attn_cfg": {"heads": 3}}, "attn_cfg has the keys.*heads.*num_heads"),
        (HYBRID | {"attn_cfg": ATTENTION | {"qk_norm": True}}, "qk_norm"),
        (HYBRID | {"attn_cfg": ATTENTION | {"mlp_dim": -8}}, "mlp_dim=-8"),
        (HYBRID | {"attn_cfg": ATTENTION | {"d_conv": 1}}, "d_conv=1"),
        (HYBRID | {"attn_cfg": ATTENTION | {"softmax_scale": 0}}, "softmax_scale=0"),
        (HYBRID | {"attn_cfg": ATTENTION | {"rotary_emb_base": None}}, "rotary_emb_base=None"),
        (HYBRID | {"attn_cfg": ATTENTION | {"causal": False}}, "causal=False"),
        (HYBRID | {"attn_cfg": {"num_heads": 30}}, "causal=False"),
        (HYBRID | {"attn_cfg": {"num_heads": 3, "causal": True}}, "head_dim=None"),
        (HYBRID | {"attn_cfg": ATTENTION | {"rotary_emb_dim": 130}}, "rotary_emb_dim=130"),
        (HYBRID | {"attn_cfg": ATTENTION | {"num_heads_kv": 7}}, "num_heads_kv=7"),
        (HYBRID | {"attn_cfg": {}}, "without attn_cfg"),
        (HYBRID | {"attn_layer_idx": [64]}, "beyond num_hidden_layers"),
        ([1, 2], "wants a mapping, got list"),
    ],
)
def test_other_files_are_refused_with_a_reason(file, message):
    with pytest.raises(ValueError, match=message):
        Mamba2Config.from_dict(file)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"hidden_size": 64, "quantization_config": {"bits": 4}}, "quantized"),
        (CODESTRAL_PARAMS | {"rms_norm": False}, "LayerNorm"),
        (CODESTRAL_PARAMS | {"sliding_window": 4096}, "sliding_window=4096"),
        (HYBRID | {"norm_after": True}, "norm_after=True"),
    ],
)
def test_what_does_not_exist_here_is_not_implemented(file, message):
    with pytest.raises(NotImplementedError, match=message):
        Mamba2Config.from_dict(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 7}, r"num_heads \* head_dim is 7 \* 8 = 56 but expand \* hidden_size is 64"),
        ({"n_groups": 3}, "num_heads=8 is not a multiple of n_groups=3"),
        ({"hidden_size": 0}, "hidden_size=0, wants a positive integer"),
        ({"hidden_size": 32.0}, "hidden_size=32.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"state_size": "16"}, "state_size='16'"),
        ({"conv_kernel": 1}, "conv_kernel=1, wants an integer of at least 2"),
        ({"hidden_act": "relu"}, "hidden_act='relu', wants 'silu' or 'swish'"),
        ({"time_step_limit": (0.5, 0.1)}, "time_step_limit"),
        ({"time_step_limit": (-1.0, 0.1)}, "time_step_limit"),
        ({"time_step_limit": (0.0, math.nan)}, "time_step_limit"),
        ({"time_step_limit": (0.0,)}, "time_step_limit"),
        ({"time_step_min": 0.2}, "time_step_min=0.2 is above time_step_max=0.1"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon='1e-5'"),
        ({"initializer_range": math.inf}, "initializer_range"),
        ({"use_bias": 1}, "use_bias=1, wants true or false"),
        ({"d_ssm": 128, "num_heads": 16}, "d_ssm=128 is more than"),
        ({"d_intermediate": -1}, "d_intermediate=-1"),
        ({"unpadded_vocab_size": 98}, "unpadded_vocab_size=98 is more than vocab_size=97"),
        ({"eos_token_id": 97}, "eos_token_id=97 is outside the vocabulary of 97"),
        ({"eos_token_id": [2, -1]}, "eos_token_id"),
        ({"pad_token_id": "x"}, "pad_token_id='x'"),
        ({"attn_layer_idx": (1,)}, "without attn_cfg"),
        ({"attn_layer_idx": (-1,)}, "attn_layer_idx"),
        ({"attn_cfg": 3}, "attn_cfg=3"),
        ({"time_step_rank": "many"}, "time_step_rank='many'"),
    ],
)
def test_bad_fields_are_named(change, message):
    with pytest.raises(ValueError, match=message) as error:
        Mamba2Config(**(SMALL | change))
    assert str(error.value).startswith("Mamba2Config: ")


def test_all_problems_are_listed_at_once():
    with pytest.raises(ValueError, match=r"head_dim=-8.*conv_kernel=0.*use_bias='no'"):
        Mamba2Config(**(SMALL | {"head_dim": -8, "conv_kernel": 0, "use_bias": "no"}))


def test_config_is_hashable_and_static_in_jit():
    given = {"eos_token_id": [2, 3], "time_step_limit": [0, 1], "num_heads": np.int64(8)}
    config = Mamba2Config(**(SMALL | given))
    assert config.eos_token_ids == (2, 3)
    assert type(config.num_heads) is int
    traces = []

    def scale(x, config):
        traces.append(config)
        return x * config.num_heads

    jitted = jax.jit(scale, static_argnums=1)
    assert float(jitted(2.0, config)) == 16.0
    jitted(2.0, Mamba2Config.from_dict(config.to_dict()))
    assert len(traces) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_heads = 4


def test_replace_keeps_what_follows_from_other_fields():
    config = Mamba2Config(**SMALL).replace(hidden_size=64, num_heads=16)
    assert (config.d_ssm, config.time_step_rank) == (128, 4)
    assert Mamba2Config(**SMALL, d_ssm=64).d_ssm == Mamba2Config(**SMALL, d_ssm=None).d_ssm == 64


def test_embedded_model_is_the_default():
    config = Mamba2Config.from_pretrained()
    assert config == Mamba2Config.from_dict(json.loads((EMBEDDED_MODEL / "config.json").read_text()))
    assert config.num_parameters() == 2_776_928


def test_params_json_and_config_json(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(CODESTRAL_PARAMS))
    assert Mamba2Config.from_pretrained(tmp_path).n_groups == 8
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert Mamba2Config.from_pretrained(str(tmp_path)).n_groups == 2


def test_tokenizer_says_how_much_of_the_vocabulary_is_padding(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    vocab = {chr(97 + i): i for i in range(20)}
    tokenizer = {"model": {"vocab": vocab}, "added_tokens": [{"id": 24, "content": "<x>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert Mamba2Config.from_pretrained(tmp_path).real_vocab_size == 25
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"vocab_size": 25}))
    assert Mamba2Config.from_pretrained(tmp_path).unpadded_vocab_size is None
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    assert Mamba2Config.from_pretrained(tmp_path).unpadded_vocab_size is None


@pytest.mark.parametrize("content", [b'{"hidden_size": 3', b"", b"\xff\xfe{}", b"[" * 200_000])
def test_broken_json_names_the_file(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: cannot be read as JSON"):
        Mamba2Config.from_pretrained(tmp_path)


def test_errors_of_a_folder_name_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither config\.json nor params\.json") as error:
        Mamba2Config.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"config\.json: .*'gpt2'"):
        Mamba2Config.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "quantization_config": {"bits": 4}}')
    with pytest.raises(NotImplementedError, match=r"config\.json: .*quantized"):
        Mamba2Config.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: .*mapping"):
        Mamba2Config.from_pretrained(tmp_path)
