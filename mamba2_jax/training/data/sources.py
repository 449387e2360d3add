"""Reading of sources into records: files, folders of files, hub datasets and Python records."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mamba2_jax.files import first_line
from mamba2_jax.training.data.config import DataConfig
from mamba2_jax.training.data.files import Advance, missing_extra, read_file
from mamba2_jax.training.data.records import Record, Source, Text, Unusable

_SAVED = (("dataset_info.json", "state.json"), ("dataset_dict.json",))  # files that `save_to_disk` writes


def read_source(
    source: Source | Sequence[Mapping[str, Any]], config: DataConfig, advance: Advance = lambda count: None
) -> Iterator[Record | Text | Unusable]:
    """Yield the records of a source, in order.

    Args:
        source: a file, a folder of files (hidden ones are skipped), the id of a hub dataset, or records.
        config: data options.
        advance: receives numbers of bytes read.

    Raises:
        FileNotFoundError: neither a file, a folder with files, nor a hub dataset.
    """
    if isinstance(source, Mapping):
        source = [source]
    if not isinstance(source, str | pathlib.Path):
        for number, record in enumerate(source, start=1):
            yield Record(f"record {number}", record)
        return
    path = pathlib.Path(source).expanduser()
    if any(all((path / name).is_file() for name in names) for names in _SAVED):
        yield from _rows(_load("load_from_disk", str(path)), str(path), advance)
    elif path.exists():
        for file in local_files(path):
            yield from read_file(file, advance)
    else:
        yield from _read_hub(str(source), config, advance)


def local_files(path: pathlib.Path) -> list[pathlib.Path]:
    """List the file `path`, or the files below the folder `path` that are not hidden, sorted.

    Raises:
        FileNotFoundError: a folder without such files.
    """
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file())
    seen = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not seen:
        hidden = f" but {len(files)} hidden ones, which are skipped" if files else ""
        raise FileNotFoundError(f"{path}: the folder has no files{hidden}")
    return seen


def _read_hub(name: str, config: DataConfig, advance: Advance) -> Iterator[Record]:
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or pathlib.Path(name).suffix:
        raise FileNotFoundError(f"{name}: no such file or folder")
    options = {"split": config.split, "revision": config.revision}
    yield from _rows(_load("load_dataset", name, config.config, **options), name, advance)


def _load(function: str, name: str, *arguments: Any, **options: Any) -> Any:
    try:
        import datasets
        from datasets import config as settings
    except ImportError as error:
        raise missing_extra(
            f"{name}: no file or folder of that name; reading a dataset of the hub"
        ) from error
    if function == "load_dataset":  # without a network, the copy that `datasets` keeps
        options["streaming"] = not settings.HF_HUB_OFFLINE
    try:
        return getattr(datasets, function)(name, *arguments, **options)
    except (OSError, ValueError) as error:
        if function == "load_from_disk":
            raise ValueError(f"{name}: cannot be read as a saved dataset ({first_line(error)})") from error
        split, config = options["split"], arguments[0]
        which = "" if config is None else f" of its configuration {config!r}"
        hint = "; name one with data.config (--data.config)" if "config" in str(error).lower() else ""
        raise FileNotFoundError(
            f"{name}: no file or folder of that name here, and the Hugging Face hub did not give its split "
            f"{split!r}{which} ({type(error).__name__}: {first_line(error)}){hint}"
        ) from error


def _rows(rows: Any, name: str, advance: Advance) -> Iterator[Record]:
    if isinstance(rows, Mapping):
        raise ValueError(
            f"{name}: holds the splits {', '.join(map(str, rows))}; name the folder of one of them"
        )
    rows, number = iter(rows), 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # the libraries below raise many types when a connection breaks
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise OSError(f"{name}: could not be read on after {number:,} records ({reason})") from error
        if row is None:
            return
        advance(sum(len(value) for value in row.values() if isinstance(value, str)))
        yield Record(f"{name}[{number}]", row, filled=True)
        number += 1
