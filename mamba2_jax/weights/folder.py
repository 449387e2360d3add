"""A folder that is whole or absent: written beside its place, then moved there.

>>> import tempfile, pathlib
>>> target = pathlib.Path(tempfile.mkdtemp()) / "model"
>>> with new_folder(target) as folder:
...     _ = (folder / "config.json").write_text("{}")
...     target.exists()
False
>>> [file.name for file in target.iterdir()]
['config.json']
"""

import contextlib
import fnmatch
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from mamba2_jax.files import CONFIG_FILES, GENERATION_CONFIG, TOKENIZER_FILES, WEIGHT_FILES

_CHECKPOINT_FILES = (
    *(*CONFIG_FILES, GENERATION_CONFIG),
    *(pattern for files in WEIGHT_FILES for pattern in (f"{files.stem}*{files.suffix}", files.index)),
)
"""What a new checkpoint replaces in a folder that holds an old one; all else in it is kept."""


@contextlib.contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place when the block ends well.

    A folder that is there already stays as it is until then. The files of its old checkpoint are dropped,
    of any form, so that no old shard is taken for a new one; every other file in it is kept. When anything
    fails the new folder is removed. After a power cut there may be two folders with a dot in front beside
    the place, and nothing in it: the old and the new, each whole.

    Raises:
        NotADirectoryError: `target` is a file.
        ValueError: `target` cannot be moved: it is the current folder, or a mount point.
    """
    target = _check_target(Path(target).expanduser())
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.parent / f".{target.name}.new-{secrets.token_hex(4)}"
    new.mkdir()
    try:
        yield new
        if target.exists():
            _keep_other_files(target, new)
        _sync_folder(new)
        _move_into_place(new, target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _check_target(target: Path) -> Path:
    """Follow links, and refuse a place that a rename cannot put a folder into."""
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target}: this is a file; name a folder for the checkpoint")
    if target.is_dir() and (Path.cwd().is_relative_to(target) or os.path.ismount(target)):
        what = "a mount point" if os.path.ismount(target) else "the current folder or around it"
        raise ValueError(f"{target}: this is {what}, which cannot be replaced; name a folder in it")
    return target


def _keep_other_files(old: Path, new: Path) -> None:
    """Give `new` the entries of `old` that no checkpoint has: links to the same files, no bytes copied."""
    has_tokenizer = any(True for pattern in TOKENIZER_FILES for _ in new.glob(pattern))
    replaced = _CHECKPOINT_FILES + (TOKENIZER_FILES if has_tokenizer else ())
    for entry in old.iterdir():
        if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in replaced):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(entry, new / entry.name)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _move_into_place(new: Path, target: Path) -> None:
    """Rename `new` to `target`; an old folder there is set aside first and removed last."""
    old = None
    if target.exists():
        old = target.parent / f".{target.name}.old-{secrets.token_hex(4)}"
        os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        if old is not None:
            os.rename(old, target)
        raise
    _sync_folder(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Make the folder's entries last through a power cut, where the system lets one."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
