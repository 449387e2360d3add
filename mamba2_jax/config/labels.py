"""The labels of a classifier in `config.json`: transformers' `id2label`, `label2id` and `problem_type`."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

from mamba2_jax.config.layers import MAX_LAYERS

ProblemType: TypeAlias = Literal["regression", "single_label_classification", "multi_label_classification"]
PROBLEM_TYPES: tuple[ProblemType, ...] = get_args(ProblemType)
MAX_LABELS = MAX_LAYERS


def default_names(count: int) -> tuple[str, ...]:
    """Return the names that transformers gives labels without one: `LABEL_0`, ..."""
    return tuple(f"LABEL_{index}" for index in range(count))


def read_labels(content: Mapping[str, Any]) -> tuple[tuple[str, ...] | None, ProblemType | None]:
    """Return the names of the labels, None if the file has none, and the problem type.

    Raises:
        ValueError: labels that are not numbered from 0 on, or an unknown problem type.

    >>> read_labels({"id2label": {"0": "good", "1": "bad"}})
    (('good', 'bad'), None)
    """
    problem = content.get("problem_type")
    if problem is not None and problem not in PROBLEM_TYPES:
        raise ValueError(
            f"config: problem_type={str(problem)[:80]!r}, wants one of {', '.join(PROBLEM_TYPES)}"
        )
    names = content.get("id2label")
    if names is None:
        return None, problem
    if not isinstance(names, Mapping) or not 0 < len(names) <= MAX_LABELS:
        raise ValueError(f"config: id2label={str(names)[:80]}, wants an object of up to {MAX_LABELS} labels")
    by_number = {str(number): name for number, name in names.items()}
    numbers = [str(index) for index in range(len(by_number))]
    if by_number.keys() != set(numbers) or not all(isinstance(name, str) for name in by_number.values()):
        raise ValueError(f"config: id2label={str(names)[:80]}, wants texts numbered from 0 on")
    return tuple(by_number[number] for number in numbers), problem


def labels_dict(names: tuple[str, ...], problem: ProblemType | None) -> dict[str, Any]:
    """Return the keys of a `config.json` that `read_labels` reads."""
    written: dict[str, Any] = {
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }
    return written if problem is None else written | {"problem_type": problem}
