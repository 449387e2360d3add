import fnmatch
import importlib
import pathlib

import huggingface_hub
import pytest
from huggingface_hub import errors

from mamba2_jax.hub import EMBEDDED_MODEL, resolve_folder

HTTP_ERROR = errors.HfHubHTTPError.__bases__[0]  # of the HTTP library that huggingface_hub uses
CODESTRAL = [
    "README.md",
    "config.json",
    "params.json",
    "tokenizer.json",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "model.safetensors.index.json",
    "consolidated.safetensors",
    "modeling_x.py",
]


class FakeHub:
    """Answers snapshot_download as the hub does: a folder per commit, only the files asked for."""

    def __init__(self, root, files):
        self.folder = root / "models--org--name" / "snapshots" / "0123abc"
        self.folder.mkdir(parents=True)
        self.files = files
        self.calls = []

    def __call__(self, repository, *, revision=None, allow_patterns):
        self.calls.append((repository, revision, allow_patterns))
        for name in self.files:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (self.folder / name).touch()
        return str(self.folder)


def _fake_hub(monkeypatch, tmp_path, files):
    hub = FakeHub(tmp_path, files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def test_embedded_model_is_the_default():
    assert resolve_folder() == resolve_folder(None) == EMBEDDED_MODEL
    assert (EMBEDDED_MODEL / "model.safetensors").is_file()


def test_a_local_folder_wins_over_the_hub(tmp_path, monkeypatch):
    hub = _fake_hub(monkeypatch, tmp_path / "hub", CODESTRAL)
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_folder("org/name") == pathlib.Path("org/name")
    assert resolve_folder(tmp_path / "org" / "name") == tmp_path / "org" / "name"
    assert resolve_folder("~/org/name") == tmp_path / "org" / "name"
    assert resolve_folder("./org") == pathlib.Path("org")
    assert hub.calls == []


@pytest.mark.parametrize("path", ["./nope", "/nope", "~/nope", "a/b/c", "../nope/x", "nope/", "a b", "C:\\x"])
def test_a_missing_folder_is_named_without_asking_the_hub(path, tmp_path, monkeypatch):
    hub = _fake_hub(monkeypatch, tmp_path / "hub", CODESTRAL)
    monkeypatch.chdir(tmp_path / "hub" / "models--org--name" / "snapshots" / "0123abc")
    with pytest.raises(FileNotFoundError, match="no such folder; pass the folder that holds") as error:
        resolve_folder(path)
    assert path in str(error.value)
    assert hub.calls == []


def test_a_missing_path_object_is_never_a_hub_id(tmp_path, monkeypatch):
    hub = _fake_hub(monkeypatch, tmp_path, CODESTRAL)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        resolve_folder(pathlib.Path("org/name"))
    assert hub.calls == []


def test_empty_path_and_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="the path is empty"):
        resolve_folder("")
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(NotADirectoryError, match="pass the folder that holds the checkpoint"):
        resolve_folder(file)


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        (CODESTRAL, [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]),
        (["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.json"], ["model.safetensors"]),
        (["config.json", "pytorch_model.bin"], ["pytorch_model.bin"]),
        (["params.json", "consolidated.safetensors", "tokenizer.model.v3"], ["consolidated.safetensors"]),
        (["config.json"], []),
    ],
)
def test_one_form_of_the_weights_is_downloaded(files, weights, tmp_path, monkeypatch):
    hub = _fake_hub(monkeypatch, tmp_path, files)
    folder = resolve_folder("org/name", revision="main")
    got = sorted(file.name for file in folder.iterdir())
    small = [name for name in files if name.endswith(".json") or name.startswith("tokenizer")]
    assert got == sorted(small + weights)
    # after the first answer the commit is asked for, not the branch, so that one load is one version
    assert [revision for _, revision, _ in hub.calls] == ["main"] + ["0123abc"] * (len(hub.calls) - 1)


def test_given_patterns_are_the_only_download(tmp_path, monkeypatch):
    hub = _fake_hub(monkeypatch, tmp_path, CODESTRAL)
    resolve_folder("name", allow_patterns=["config.json"])
    assert hub.calls == [("name", None, ["config.json"])]
    assert [file.name for file in hub.folder.iterdir()] == ["config.json"]


def _response(status):
    http = importlib.import_module(HTTP_ERROR.__module__.split(".")[0])
    return http.Response(status, request=http.Request("GET", "https://hub"))


@pytest.mark.parametrize(
    "failure",
    [
        lambda: errors.LocalEntryNotFoundError("Got: ConnectError: name not known\nsecond line"),
        lambda: errors.RepositoryNotFoundError("404 not found", response=_response(404)),
        lambda: errors.GatedRepoError("403 gated", response=_response(403)),
        lambda: errors.OfflineModeIsEnabled("offline"),
        lambda: errors.HFValidationError("bad id"),
        lambda: HTTP_ERROR("connection broke"),
        lambda: OSError(28, "No space left on device"),
        lambda: ConnectionError(),
    ],
)
def test_failures_of_the_hub_say_what_to_do(failure, monkeypatch):
    def fail(*args, **kwargs):
        raise failure()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError) as error:
        resolve_folder("org/name")
    message = str(error.value)
    assert message.startswith(
        "org/name: no folder of that name here, and the Hugging Face hub did not give it"
    )
    for way_out in ("spelling", "pass a downloaded folder", "HF_HUB_OFFLINE=1", "hf auth login"):
        assert way_out in message
    assert "\n" not in message


def test_unknown_revision_is_named(monkeypatch):
    def fail(*args, **kwargs):
        raise errors.RevisionNotFoundError("404", response=_response(404))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match="no revision 'v9'"):
        resolve_folder("org/name", revision="v9")


def test_offline_finds_what_is_cached_and_only_that(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE=1"):
        resolve_folder("org/name")
    repository = tmp_path / "models--org--name"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x")
    assert resolve_folder("org/name") == folder
