"""PEFT's adapter format: config fields, and conversion of tensors to and from its layout.

A projection's factors are `lora_A.weight (r, in)` and `lora_B.weight (out, r)`, an embedding's
`lora_embedding_A (r, v)` and `lora_embedding_B (d, r)`. The convolution's are `lora_A.weight (r, 1, k)` and
`lora_B.weight (channels, r, 1)`, whose product has the shape of the stored weight `(channels, 1, k)`; PEFT
itself refuses adapters on `conv1d` and `out_proj` of Mamba-2.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from mamba2_jax.layers.adaptable import Adapter
from mamba2_jax.lora.settings import LoraConfig, check_pattern
from mamba2_jax.lora.targets import Target, ends_in
from mamba2_jax.processes import fetch
from mamba2_jax.weights.files import (
    CheckpointError,
    read_json_inside,
    show,
)
from mamba2_jax.weights.table import as_rows

PREFIX = "base_model.model."
REFUSED_BY_PEFT = {"out_proj", "conv1d"}
REFUSING_FAMILIES = {"mamba2", "falcon_h1", "nemotron_h"}
_MAX_BYTES = 1 << 20
_READ = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern"),
    *("use_dora", "modules_to_save"),
}
_MEANINGLESS_HERE = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "megatron_core", "qalora_group_size", "runtime_config"),
}
_HARMLESS_INIT = (True, False, None, "gaussian", "orthogonal", "eva")  # base weights stay unchanged


MAGNITUDE = "lora_magnitude_vector"


def factor_shapes(target: Target, rank: int, dora: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a target's tensors in PEFT's layout, by key below the module name."""
    middle = (1,) * (len(target.stored.shape) - 2)  # a convolution has an axis of size 1
    A, B = (rank, *middle, target.in_size), (target.out_size, rank, *middle)
    if target.is_embedding:
        return {"lora_embedding_A": A, "lora_embedding_B": B}
    shapes = {"lora_A.weight": A, "lora_B.weight": B}
    return shapes | {MAGNITUDE: (target.out_size,)} if dora else shapes


def to_peft(target: Target, adapter: Adapter) -> dict[str, np.ndarray]:
    """Convert an adapter to its tensors in PEFT's layout, by key below the module name."""
    A = fetch(adapter.A[...]).T
    B = {name: np.ascontiguousarray(fetch(value[...])) for name, value in adapter.B.items()}
    if target.is_embedding:
        rows = [B["weight"].T]
    else:
        rows = [as_rows(leaf, B[leaf.name]) for leaf in target.stored.leaves]
    shapes = factor_shapes(target, adapter.rank)
    pair = zip(shapes.items(), (A, np.concatenate(rows)), strict=True)
    tensors = {key: np.ascontiguousarray(array).reshape(shape) for (key, shape), array in pair}
    if adapter.magnitude is not None:
        rows = [fetch(adapter.magnitude[leaf.name][...]).reshape(-1) for leaf in target.stored.leaves]
        tensors[MAGNITUDE] = np.concatenate(rows)
    return tensors


def magnitude_from_peft(target: Target, vector: np.ndarray) -> dict[str, np.ndarray]:
    """Convert DoRA's magnitudes from PEFT's layout to a dict by leaf name."""
    return {
        leaf.name: vector[slice(*leaf.rows)].reshape(np.delete(leaf.shape, leaf.role.input_axis))
        for leaf in target.stored.leaves
    }


def from_peft(target: Target, A: np.ndarray, B: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Convert tensors from PEFT's layout to `A (in, r)` and a dict of `B` by leaf name; inverts `to_peft`."""
    rank = A.shape[0]
    A, B = A.reshape(rank, -1).T, B.reshape(-1, rank)
    if target.is_embedding:
        return A, {"weight": B.T}
    parts = {}
    for leaf in target.stored.leaves:
        part = np.empty(target.shape_of_B(leaf, rank), B.dtype)
        as_rows(leaf, part)[...] = B[slice(*leaf.rows)]
        parts[leaf.name] = part
    return A, parts


def peft_config(
    adapters: Mapping[str, Adapter],
    modules: Iterable[str],
    base_model: str | None,
    task: str,
    modules_to_save: Iterable[str] = (),
) -> dict:
    """Build `adapter_config.json` for adapters by module path; `modules` are all possible targets."""
    ranks = {path: adapter.rank for path, adapter in adapters.items()}
    alphas = {path: adapter.alpha for path, adapter in adapters.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    first = next(iter(adapters.values()))
    last = {path: path.rpartition(".")[2] for path in modules}
    complete = set(last.values()) - {name for path, name in last.items() if path not in adapters}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.use_rslora,
        "target_modules": sorted({last[path] if last[path] in complete else path for path in adapters}),
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": list(modules_to_save) or None,
        "use_dora": first.magnitude is not None,
    }


def read_peft_config(folder: Path, name: str) -> tuple[LoraConfig, str | None]:
    """Read `adapter_config.json`; refuse, by name, unsupported options that would change results.

    Returns:
        The settings, and `target_modules` if it is one regular expression, else None.

    Raises:
        CheckpointError: unreadable or unsupported; the message lists every problem.
    """
    path = folder / name
    fields = read_json_inside(folder, name, "the config", _MAX_BYTES)
    problems = [
        f"{show(key)}={show(str(value))} is not supported; merge the adapter with PEFT and load the result"
        for key, value in fields.items()
        if value and not _understood(key, value)
    ]
    if fields.get("peft_type") != "LORA":
        problems.append(f"peft_type={show(str(fields.get('peft_type')))}; only 'LORA' is read")
    targets = fields.get("target_modules")
    if not (isinstance(targets, str) or (isinstance(targets, list) and _all(targets, str))) or not targets:
        problems.append(f"target_modules={show(str(targets))}; want names, or one regular expression")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(fields.get(key) or {}, dict):
            problems.append(f"{key}={show(str(fields[key]))}; want an object")
    for key in ("use_rslora", "use_dora"):
        if not isinstance(fields.get(key, False), bool):
            problems.append(f"{key}={show(str(fields[key]))}; want true or false")
    saved = fields.get("modules_to_save") or []
    if not (isinstance(saved, list) and _all(saved, str)):
        problems.append(f"modules_to_save={show(str(saved))}; want a list of names")
    if problems:
        raise CheckpointError(path, problems)
    pattern = targets if isinstance(targets, str) else None
    try:
        if pattern is not None:
            check_pattern("target_modules", pattern)
        settings = LoraConfig(
            rank=fields.get("r", 8),
            alpha=fields.get("lora_alpha", 8),
            targets=(targets,) if isinstance(targets, str) else tuple(targets or ()),
            dropout=fields.get("lora_dropout", 0.0),
            use_rslora=fields.get("use_rslora", False),
            rank_pattern=fields.get("rank_pattern") or {},
            alpha_pattern=fields.get("alpha_pattern") or {},
            use_dora=fields.get("use_dora", False),
            modules_to_save=tuple(saved),
        )
    except ValueError as error:
        raise CheckpointError(path, [str(error)]) from None
    return settings, pattern


def is_targeted(names: Iterable[str], settings: LoraConfig, pattern: str | None) -> bool:
    """Return whether the config targets a module, by any of the paths that it may have in files."""
    if pattern is not None:
        return any(re.fullmatch(pattern, name) for name in names)
    return any(ends_in(name, end) for name in names for end in settings.targets)


def _understood(key: str, value: object) -> bool:
    if key == "bias":
        return value == "none"
    if key == "init_lora_weights":
        return value in _HARMLESS_INIT
    return key in _READ or key in _MEANINGLESS_HERE


def _all(values: list, kind: type) -> bool:
    return all(isinstance(value, kind) and value for value in values)
