"""Read and write the options of a run as a JSON or YAML file."""

import dataclasses
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

OPTIONS_FILE = "options.json"

_T = TypeVar("_T")


def read_fields(path: str | pathlib.Path) -> dict[str, Any]:
    """Read options from a JSON or YAML file into a dict.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON or YAML, or not a mapping.
    """
    path = pathlib.Path(path).expanduser()
    import yaml  # YAML includes JSON

    if not path.is_file():
        raise FileNotFoundError(f"config={path}: no such file; name a JSON or YAML file of options")
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON or YAML ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: wants names and values of options, got a {type(fields).__name__}")
    return fields


def build(kind: type[_T], fields: Mapping[str, Any], where: str) -> _T:
    """Build a dataclass from plain values, recursively; converts integers to floats and lists to tuples.

    Args:
        kind: the dataclass.
        fields: values by field name; missing fields keep their defaults.
        where: source of the values, for error messages.

    Raises:
        ValueError: an unknown name, a value of the wrong type, or a missing field without a default.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise ValueError(f"{where}: there is no option {unknown[0]!r}; there are {', '.join(known)}")
    values = {name: _value(hints[name], value, f"{where}: {name}") for name, value in fields.items()}
    for name, option in known.items():
        if name not in values and option.default is option.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: {name} is missing")
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _value(arguments[0], value, where)
    if origin in (typing.Union, types.UnionType):
        for choice in sorted(arguments, key=lambda choice: choice is not type(value)):
            try:
                return _value(choice, value, where)
            except ValueError:
                continue
        raise ValueError(f"{where}={value!r} is none of {', '.join(map(_written, arguments))}")
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_value(arguments[0], item, where) for item in value)
    if origin is Literal and value in arguments:
        return value
    if hint is float and isinstance(value, str):  # YAML parses 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    fits = (
        isinstance(value, int | float)
        if hint is float
        else isinstance(hint, type) and isinstance(value, hint)
    )
    if not fits or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}={value!r} is not {_written(hint)}")
    return hint(value) if hint is float else value


def _written(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return "nothing" if hint is type(None) else getattr(hint, "__name__", str(hint))


def plain(value: Any) -> Any:
    """Convert an options dataclass to values that JSON can hold; inverts `build`."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, pathlib.PurePath) else value
