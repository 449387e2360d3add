"""Write a folder atomically: fill a temporary folder beside the target, then rename it.

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
import threading
from collections.abc import Iterator
from pathlib import Path

from mamba2_jax.files import CONFIG_FILES, GENERATION_CONFIG, TOKENIZER_FILES, WEIGHT_FILES

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_THREADS = threading.Lock()
_CHECKPOINT_FILES = (
    *(*CONFIG_FILES, GENERATION_CONFIG),
    *(pattern for files in WEIGHT_FILES for pattern in (f"{files.stem}*{files.suffix}", files.index)),
)
"""Patterns of the files that a new checkpoint replaces in an existing folder; other files are kept."""


@contextlib.contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces `target` when the `with` block ends without an error.

    Several threads and processes may write into one `target`: the last one that ends wins, whole. An existing
    `target` is unchanged until then. Its checkpoint files, of every form, are dropped, so that no
    old shard is taken for a new one; its other files are kept. On an error the temporary folder is removed.
    A power cut between the two renames leaves no `target`, but the complete folders `.NAME.old-*` and
    `.NAME.new-*` beside it.

    Raises:
        NotADirectoryError: `target` is a file.
        ValueError: `target` cannot be renamed: it is or holds the current folder, or it is a mount point.
    """
    target = _check_target(Path(target).expanduser())
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.parent / f".{target.name}.new-{secrets.token_hex(4)}"
    new.mkdir()
    try:
        yield new
        with locked(target.parent):
            if target.exists():
                _keep_other_files(target, new)
            _sync_folder(new)
            _move_into_place(new, target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which threads and processes of this machine respect; it leaves no file.

    Without locks in the operating system or the file system, only the threads of this process exclude each
    other.
    """
    with _THREADS:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except OSError:  # Windows opens no folders
            yield
            return
        try:
            with contextlib.suppress(OSError):
                if fcntl is not None:
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)  # which gives the lock back


def _check_target(target: Path) -> Path:
    """Resolve symlinks in `target`, and refuse a path that a folder cannot be renamed to."""
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target}: this is a file; name a folder for the checkpoint")
    if target.is_dir() and (Path.cwd().is_relative_to(target) or os.path.ismount(target)):
        what = "a mount point" if os.path.ismount(target) else "the current folder or around it"
        raise ValueError(f"{target}: this is {what}, which cannot be replaced; name a folder in it")
    return target


def _keep_other_files(old: Path, new: Path) -> None:
    """Hard-link into `new` the entries of `old` that are not checkpoint files."""
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
    """Rename `new` to `target`; an existing `target` is renamed first and removed last."""
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
    """Fsync the folder, where the system allows, so that its entries survive a power cut."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
