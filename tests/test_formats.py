"""Load, convert and upload every published form: state-spaces' pickles, Mistral's files, transformers."""

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from checkpoint_files import expected_leaves, random_model
from models import random_ids, relative
from safetensors.torch import load_file, save_file

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM
from mamba2_jax.cli import commands as cli
from mamba2_jax.hub import EMBEDDED_MODEL
from mamba2_jax.weights import CheckpointError, load_weights, open_checkpoint
from mamba2_jax.weights.convert import convert

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PRECISE = ("A_log", "dt_bias", ".D")
STATE_SPACES = {
    "d_model": 32,
    "d_intermediate": 0,
    "n_layer": 2,
    "vocab_size": 41,
    "ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_state": 8, "ngroups": 2},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
MISTRAL = {"dim": 32, "n_layers": 2, "vocab_size": 48, "n_groups": 1, "model_type": "mamba"}


def state_spaces_state(dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """A random model's tensors as mamba_ssm saves them: mixed types, the head sharing the embedding."""
    state = random_model(tie_word_embeddings=True).state_dict()
    state = {name: t if name.endswith(PRECISE) else (t * 0.3).to(dtype) for name, t in state.items()}
    embedding = state.pop("backbone.embeddings.weight")
    return {"backbone.embedding.weight": embedding, **state, "lm_head.weight": embedding}


@pytest.fixture(scope="module")
def state_spaces(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("state-spaces")
    (folder / "config.json").write_text(json.dumps(STATE_SPACES))
    torch.save(state_spaces_state(), folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Path:
    """Of one head's width of 64, which that form takes for granted."""
    folder = tmp_path_factory.mktemp("mistral")
    model = random_model(dtype=torch.bfloat16, num_heads=1, head_dim=64, state_size=128, n_groups=1)
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps(MISTRAL))
    return folder


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / "pytorch_model.bin").exists():
        return torch.load(folder / "pytorch_model.bin", weights_only=True)
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def test_state_spaces_weights_keep_their_mixed_types(state_spaces):
    config = Mamba2Config.from_pretrained(state_spaces)
    assert (config.vocab_size, config.unpadded_vocab_size) == (48, 41)
    arrays, report = load_weights(state_spaces, config)
    state = state_spaces_state()
    state["backbone.embeddings.weight"] = state.pop("backbone.embedding.weight")
    for path, leaf in expected_leaves(state, config).items():
        assert str(arrays[path].dtype) == str(leaf.dtype).removeprefix("torch."), path
        np.testing.assert_array_equal(np.asarray(arrays[path]), leaf.numpy())
    assert report.dtypes.keys() == {"float16", "float32"}
    assert "repeats the embedding" in report.notes[0]


def test_state_spaces_in_shards(state_spaces, tmp_path):
    state = state_spaces_state()
    names, files_of = list(state), {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: state[name] for name in part}, tmp_path / file)
        files_of |= dict.fromkeys(part, file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files_of}))
    shutil.copy(state_spaces / "config.json", tmp_path)
    config = Mamba2Config.from_pretrained(tmp_path)
    whole, parts = (load_weights(folder, config)[0] for folder in (state_spaces, tmp_path))
    for path, array in whole.items():
        np.testing.assert_array_equal(np.asarray(parts[path]), np.asarray(array))


@pytest.mark.parametrize("way", ["save_pretrained", "convert"])
def test_state_spaces_to_transformers_gives_the_same_logits_there(state_spaces, tmp_path, way):
    model = Mamba2ForCausalLM.from_pretrained(state_spaces, param_dtype="float32")
    if way == "convert":
        convert(state_spaces, tmp_path / "out", dtype="float32")
    else:
        model.save_pretrained(tmp_path / "out", dtype="float32")
    theirs = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = random_ids(2, 30, vocab=41)
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits
    assert relative(model(ids).logits, want) < 2e-5
    state = state_spaces_state()
    ours = stored(tmp_path / "out")
    for name, tensor in state.items():
        if name != "lm_head.weight":
            assert torch.equal(ours[name.replace("embedding.", "embeddings.")], tensor.float()), name


@pytest.mark.parametrize("way", ["save_pretrained", "convert"])
def test_there_and_back_in_state_spaces_form(state_spaces, tmp_path, way):
    if way == "convert":
        convert(state_spaces, tmp_path / "theirs", to="transformers")
        convert(tmp_path / "theirs", tmp_path / "out", to="state-spaces")
    else:
        Mamba2ForCausalLM.from_pretrained(state_spaces).save_pretrained(
            tmp_path / "out", format="state-spaces"
        )
    assert files(tmp_path / "out") == {"config.json", "generation_config.json", "pytorch_model.bin"}
    got = stored(tmp_path / "out")
    assert_same(got, state_spaces_state())
    assert list(got)[0] == "backbone.embedding.weight"
    # mamba_ssm loads strictly, into modules whose head is the embedding
    assert got["lm_head.weight"].data_ptr() == got["backbone.embedding.weight"].data_ptr()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == STATE_SPACES


@pytest.mark.parametrize(
    "fields",
    [
        {"time_step_limit": (0.001, 0.1), "use_bias": True, "tie_word_embeddings": False},
        {"D_has_hdim": True, "d_ssm": 32, "num_heads": 2, "rmsnorm": False, "d_intermediate": 100},
        {"attn_layer_idx": (1,), "attn_cfg": {"num_heads": 2, "head_dim": 16}, "unpadded_vocab_size": 47},
        {
            "n_groups": 8,
            "conv_kernel": 3,
            "expand": 4,
            "num_heads": 8,
            "time_step_limit": (0.01, float("inf")),
        },
    ],
)
def test_state_spaces_config_says_all_of_a_model(fields):
    base = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "num_hidden_layers": 2, "vocab_size": 48}
    base["n_groups"] = 1
    config = Mamba2Config(**base | fields)
    written = json.loads(json.dumps(config.to_state_spaces_dict()))
    again = Mamba2Config.from_dict(written)
    ids = {"bos_token_id", "eos_token_id", "pad_token_id"}
    new = {"initializer_range", "rescale_prenorm_residual"}  # of new models
    for name in set(Mamba2Config.__dataclass_fields__) - ids - new:
        if name != "unpadded_vocab_size" or config.unpadded_vocab_size is None:
            assert getattr(again, name) == getattr(config, name), name
    assert written.keys() == STATE_SPACES.keys()  # MambaConfig(**written) takes no other


def test_state_spaces_config_refuses_what_it_cannot_say():
    with pytest.raises(NotImplementedError, match=r"layer_norm_epsilon=1e-06.*'transformers'"):
        Mamba2Config(layer_norm_epsilon=1e-6).to_state_spaces_dict()
    with pytest.raises(NotImplementedError, match=r"D_has_hdim=True.*'state-spaces'"):
        Mamba2Config(D_has_hdim=True).to_dict()


@pytest.mark.parametrize("embedding", ["embedding", "embeddings"])
def test_mistral_form(mistral, tmp_path, embedding):
    tensors = load_file(mistral / "consolidated.safetensors")
    want = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    tensors[f"model.backbone.{embedding}.weight"] = tensors.pop("model.backbone.embeddings.weight")
    save_file(tensors, tmp_path / "consolidated.safetensors")
    shutil.copy(mistral / "params.json", tmp_path)
    convert(tmp_path, tmp_path / "out")
    assert_same(stored(tmp_path / "out"), want)
    config = Mamba2Config.from_pretrained(tmp_path / "out")
    assert (config.eos_token_id, config.num_heads, config.tie_word_embeddings) == (2, 1, False)
    arrays, _ = load_weights(tmp_path, config)
    for path, leaf in expected_leaves(want, config).items():
        np.testing.assert_array_equal(np.asarray(arrays[path], np.float32), leaf.float().numpy())


def test_of_two_forms_the_index_wins(mistral, tmp_path):
    config = Mamba2Config.from_pretrained(mistral)
    convert(mistral, tmp_path / "both", max_shard_size="9KB")
    shutil.copy(mistral / "params.json", tmp_path / "both")
    (tmp_path / "both" / "consolidated.safetensors").write_bytes(b"not looked at")
    with open_checkpoint(tmp_path / "both") as checkpoint:
        assert all(file.name.startswith("model-0") for file in checkpoint.files)
    assert Mamba2Config.from_pretrained(tmp_path / "both").num_parameters() == config.num_parameters()


def test_av_form_has_one_group(tmp_path):
    model = random_model(n_groups=1, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["n_groups"], config["tie_word_embeddings"]
    config |= {"tie_embedding_weights": True, "A_initializer_range": [1, 16]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    arrays, _ = load_weights(tmp_path, Mamba2Config.from_pretrained(tmp_path))
    np.testing.assert_array_equal(
        np.asarray(arrays["backbone.layers.1.mixer.conv1d.weight_BC"]),
        model.state_dict()["backbone.layers.1.mixer.conv1d.weight"][64:, 0].T.reshape(4, 2, 8).numpy(),
    )
    config["n_groups"] = 8  # transformers' default, which is wrong for these files
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_heads": 8, "head_dim": 8}))
    with pytest.raises(CheckpointError, match=r"conv1d.weight' .* has shape \(80, 1, 4\), the config wants"):
        load_weights(tmp_path, Mamba2Config.from_pretrained(tmp_path))


def run(*arguments: str) -> int:
    try:
        return cli.main(list(arguments))
    except SystemExit as error:
        return error.code


def test_convert_on_the_command_line(state_spaces, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert run("convert", str(state_spaces), out, "--tokenizer", str(EMBEDDED_MODEL)) == 2
    assert "ids up to 4095" in capsys.readouterr().err
    vocabulary = {"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 0, "b": 40}}}
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(vocabulary))
    tokenizer = ["--tokenizer", str(tmp_path / "tokenizer")]
    assert run("convert", str(state_spaces), out, "--dtype", "bfloat16", *tokenizer) == 0
    err = capsys.readouterr().err
    assert "saving weights" in err
    assert f"wrote {out}" in err.replace("\n", "")
    for name, tensor in stored(tmp_path / "out").items():
        assert tensor.dtype == (torch.float32 if name.endswith(PRECISE) else torch.bfloat16), name
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == vocabulary
    assert Mamba2Config.from_pretrained(out).unpadded_vocab_size == 41
    assert run("convert", str(state_spaces), out) == 2
    assert "not empty; name another folder" in capsys.readouterr().err
    assert run("convert", out, out) == 2
    assert "this is the source itself" in capsys.readouterr().err
    assert run("convert", str(state_spaces), out, "--overwrite", "--to", "state-spaces") == 0
    assert_same(stored(tmp_path / "out"), state_spaces_state())


@pytest.mark.parametrize("form", ["state-spaces", "mistral"])
def test_info_of_every_form(form, state_spaces, mistral, capsys):
    assert run("info", str(state_spaces if form == "state-spaces" else mistral)) == 0
    out = capsys.readouterr().out
    assert ("pytorch_model.bin" if form == "state-spaces" else "consolidated.safetensors") in out
    assert ("F16" if form == "state-spaces" else "BF16") in out


def test_a_checkpoint_without_tokenizer_names_the_way_to_one(state_spaces, capsys):
    assert run("generate", "x", "--model", str(state_spaces)) == 2
    assert "--tokenizer EleutherAI/gpt-neox-20b" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_convert_refuses_what_is_not_finite(mistral, tmp_path, value):
    tensors = load_file(mistral / "consolidated.safetensors")
    tensors["model.backbone.norm_f.weight"][3] = value
    save_file(tensors, tmp_path / "consolidated.safetensors")
    shutil.copy(mistral / "params.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"'model.backbone.norm_f.weight' in consolidated.*NaN or inf"):
        convert(tmp_path, tmp_path / "out")
    assert "out" not in files(tmp_path)
    convert(tmp_path, tmp_path / "out", allow_non_finite=True)
    assert not torch.isfinite(stored(tmp_path / "out")["backbone.norm_f.weight"][3])


@pytest.mark.parametrize("version", [None, "2.9.1+cpu"])
def test_without_pytorch_the_message_says_how_to_install_it(state_spaces, monkeypatch, version):
    if version is None:
        monkeypatch.setitem(sys.modules, "torch", None)
    else:
        monkeypatch.setattr(torch, "__version__", version)
    config = Mamba2Config.from_pretrained(state_spaces)
    with pytest.raises(ImportError) as error:
        load_weights(state_spaces, config)
    for words in ("pytorch_model.bin", "mamba2-jax-flax[torch]", "pip install 'torch==2.13.0+cpu'"):
        assert words in str(error.value)
    assert (version or "needs PyTorch") in str(error.value)


class FakeHub:
    def __init__(self):
        self.calls = []

    def create_repo(self, repository, *, private, exist_ok):
        self.calls.append(("create_repo", repository, private, exist_ok))
        return huggingface_hub.RepoUrl(f"https://hub.invalid/{repository}", endpoint="https://hub.invalid")

    def create_branch(self, repository, *, branch, exist_ok):
        self.calls.append(("create_branch", repository, branch, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message):
        shutil.copytree(folder_path, self.target)
        self.calls.append(("upload_folder", repo_id, revision, commit_message))
        return type("Commit", (), {"commit_url": "the commit"})


def test_push_to_hub(tmp_path, monkeypatch):
    hub = FakeHub()
    hub.target = tmp_path / "pushed"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    model = Mamba2ForCausalLM.from_pretrained()
    assert model.push_to_hub("org/name", private=True, revision="v2", dtype="float32") == "the commit"
    assert hub.calls == [
        ("create_repo", "org/name", True, True),
        ("create_branch", "org/name", "v2", True),
        ("upload_folder", "org/name", "v2", "Upload Mamba-2"),
    ]
    assert files(hub.target) == files(EMBEDDED_MODEL)
    assert stored(hub.target)["backbone.norm_f.weight"].dtype == torch.float32
    with pytest.raises(ValueError, match="not a hub id"):
        model.push_to_hub("../name")

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(hub, "create_repo", fail)
    with pytest.raises(ConnectionError, match=r"org/name: .* did not take it \(OSError: no network\)"):
        model.push_to_hub("org/name")
