"""Resolve a path or Hugging Face hub id to a local folder, and upload a folder to the hub."""

import pathlib
import re
from collections.abc import Sequence
from typing import cast

from mamba2_jax.files import WEIGHT_FILES, first_line

__all__ = ["EMBEDDED_MODEL", "resolve_folder", "upload_folder"]

EMBEDDED_MODEL = pathlib.Path(__file__).parent / "assets" / "tiny-python"
"""Folder of the embedded model: a small Mamba-2, trained with this package on Python's standard library."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL_FILES = ["*.json", "tokenizer*"]


def resolve_folder(
    path_or_id: str | pathlib.Path | None = None,
    revision: str | None = None,
    allow_patterns: Sequence[str] | None = None,
) -> pathlib.Path:
    """Return the local folder of a checkpoint, downloading from the Hugging Face hub if needed.

    Args:
        path_or_id: a folder, or a hub id such as "AntonV/mamba2-130m-hf"; an existing folder of that name
            takes precedence. None: the embedded model.
        revision: branch, tag or commit on the hub; ignored for a folder.
        allow_patterns: glob patterns of the files to download. None: config, tokenizer and one form of the
            weights.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: no such folder, no such repository on the hub, or the hub cannot be reached.
        NotADirectoryError: `path_or_id` is a file.
    """
    if path_or_id is None:
        return EMBEDDED_MODEL
    if not str(path_or_id):
        raise FileNotFoundError(
            "resolve_folder: the path is empty; pass a folder or a hub id like 'org/name'"
        )
    folder = pathlib.Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{path_or_id}: this is a file; pass the folder that holds the checkpoint")
    if isinstance(path_or_id, pathlib.Path) or not _HUB_ID.fullmatch(path_or_id):
        raise FileNotFoundError(
            f"{path_or_id}: no such folder; pass the folder that holds config.json, "
            "or a hub id like 'org/name'"
        )
    if allow_patterns is not None:
        return _download(path_or_id, revision, list(allow_patterns))
    folder = _download(path_or_id, revision, _SMALL_FILES)
    # One kind of weight files is enough: Codestral ships its 14.6 GB twice.
    for patterns in (list(files.patterns) for files in WEIGHT_FILES):
        # pin the commit, not the branch: a push between two downloads must not mix two versions
        folder = _download(
            path_or_id, folder.name if folder.parent.name == "snapshots" else revision, patterns
        )
        if any(True for pattern in patterns for _ in folder.glob(pattern)):
            break
    return folder


def upload_folder(
    folder: pathlib.Path, repository: str, *, private: bool, revision: str | None, message: str
) -> str:
    """Upload a folder to the Hugging Face hub, creating the repository and the branch if needed.

    Returns:
        The URL of the commit.

    Raises:
        ConnectionError: the hub refuses the upload or cannot be reached.
        ValueError: `repository` is not a hub id.
    """
    import huggingface_hub
    from huggingface_hub import errors

    if not _HUB_ID.fullmatch(repository):
        raise ValueError(f"{repository}: not a hub id; want one like 'name' or 'org/name'")
    failures = cast("tuple[type[Exception], ...]", (ValueError, *errors.HfHubHTTPError.__bases__))
    try:
        api = huggingface_hub.HfApi()
        url = api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, revision=revision, commit_message=message
        )
        return commit.commit_url
    except failures as error:
        raise ConnectionError(
            f"{repository}: the Hugging Face hub did not take it ({type(error).__name__}: "
            f"{first_line(error)}). Run `hf auth login` with a token that may write there, and try again"
        ) from error


def _download(repository: str, revision: str | None, patterns: list[str]) -> pathlib.Path:
    import huggingface_hub
    from huggingface_hub import errors

    # A broken connection raises an error of the HTTP library below huggingface_hub. Which library that is
    # depends on the version, but its error is a base of HfHubHTTPError. All else is OSError or ValueError.
    failures = cast("tuple[type[Exception], ...]", (ValueError, *errors.HfHubHTTPError.__bases__))
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns)
        )
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{repository}: the hub has no revision {revision!r} of it; pass a branch, a tag or a commit"
        ) from error
    except failures as error:
        raise FileNotFoundError(
            f"{repository}: no folder of that name here, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {first_line(error)}). Check the spelling; without a network pass a "
            "downloaded folder, or set HF_HUB_OFFLINE=1 if the model is in the hub's cache; for a private or "
            "gated model run `hf auth login`"
        ) from error
