"""Names of tensors that wrappers of a model have changed, and one sentence for many problems of one cause.

>>> unwrap(["module.lm_head.weight", "module.norm_f.weight"])
({'lm_head.weight': 'module.lm_head.weight', 'norm_f.weight': 'module.norm_f.weight'}, 'module.')
"""

import re
from collections.abc import Collection, Iterator, Mapping

from mamba2_jax.weights.files import show

# What DistributedDataParallel, torch.compile, FSDP and activation checkpointing call the module that they
# wrap, at any depth; no tensor of a model has such a name.
_WRAPPER = re.compile(r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_LAYER = re.compile(r"\blayers\.(\d+)\.")
_NUMBERS = re.compile(r"(?<=layers\.)\d+|(?<=experts\.)\d+|(?<=-)\d+(?=-of-)")
_MANY = 4


def unwrap(names: Collection[str]) -> tuple[dict[str, str], str]:
    """Take the names of wrappers out of tensor names.

    Returns:
        The names without wrappers -> the stored names, and the wrappers that were found; "" if there are
        none, or if two tensors would have the same name.
    """
    clean = {_WRAPPER.sub("", name): name for name in names}
    found = "".join(dict.fromkeys(wrapper for name in names for wrapper in _WRAPPER.findall(name)))
    if not found or len(clean) < len(names):
        return {name: name for name in names}, ""
    return clean, found


def without_model(names: Mapping[str, str]) -> dict[str, str]:
    """Take `model.`, the attribute of a trainer's own module, off all names; unchanged if one lacks it."""
    if not all(name.startswith("model.") for name in names):
        return dict(names)
    return {name.removeprefix("model."): stored for name, stored in names.items()}


def foreign_prefix(missing: Collection[str], unexpected: Collection[str]) -> str:
    """Return the unknown prefix under which files hold the missing tensors, whose names have none; or ""."""
    wanted = next((name for name in missing if _LAYER.search(name)), None)
    if wanted is None:
        return ""
    prefixes = {name.removesuffix(wanted) for name in unexpected if name.endswith(f".{wanted}")}
    return prefixes.pop() if len(prefixes) == 1 else ""


def other_layers(
    missing: Collection[str], unexpected: Collection[str], found: Collection[str], count: int
) -> str:
    """Explain that the files have another number of layers than the config; "" if that is not the cause.

    Args:
        missing: names of the missing tensors.
        unexpected: names of the tensors in files that the model lacks.
        found: names of the tensors that both have.
        count: the config's number of layers.
    """
    wrong = [*missing, *unexpected]
    held = max(_layers_of(found), default=-1) + 1
    beyond = len(list(_layers_of(wrong))) == len(wrong) >= _MANY and min(_layers_of(wrong)) >= held > 0
    if beyond and (held < count) == (not unexpected) == bool(missing):
        held = max(held, *_layers_of(unexpected), -1) + bool(unexpected)
        return f"num_hidden_layers={count}, but the files hold {held} layers"
    return ""


def condense(problems: Collection[str]) -> list[str]:
    """Join the problems that differ only in a layer's, an expert's or a file's number, if there are many.

    >>> condense([f"tensor 'layers.{i}.D' is missing" for i in range(64)])
    ["tensor 'layers.0.D' is missing; the same holds for 63 more"]
    """
    groups: dict[str, list[str]] = {}
    for problem in problems:
        groups.setdefault(_NUMBERS.sub("#", problem), []).append(problem)
    joined = []
    for group in groups.values():
        many = len(group) >= _MANY
        joined += [f"{group[0]}; the same holds for {len(group) - 1} more"] if many else group
    return joined


def prefix_problem(prefix: str, count: int) -> str:
    """Format the problem of an unknown prefix that so many names begin with."""
    return (
        f"the names of {count} tensors begin with {show(prefix)}, which is not known; take it off these names"
    )


def _layers_of(names: Collection[str]) -> Iterator[int]:
    return (int(found[1]) for name in names if (found := _LAYER.search(name)))
