"""Saved states: one safetensors file with a tensor per state and the fingerprint of the model."""

import dataclasses
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from mamba2_jax.files import refuse_remote
from mamba2_jax.lora.attach import sites_of
from mamba2_jax.typing import Array
from mamba2_jax.weights.safetensors_file import write_arrays

_FORMAT = "mamba2_jax state 1"
# Fields of the config that leave the states of given tokens as they are.
_WITHOUT_EFFECT = frozenset(
    [
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "unpadded_vocab_size",
        "initializer_range",
        "rescale_prenorm_residual",
        "time_step_min",
        "time_step_max",
        "time_step_floor",
        "time_step_rank",
        "use_cache",
        "chunk_size",
        "tie_word_embeddings",
        "source",
    ]
)


def save_states(
    file: str | os.PathLike[str], states: Mapping[str, Array], model: Any, notes: Mapping[str, str]
) -> None:
    """Write named states, the model's fingerprint and `notes` as one file; the write is atomic."""
    refuse_remote(file)
    file = pathlib.Path(file)
    metadata = {"format": _FORMAT, "model": fingerprint(model)} | {f"note.{k}": v for k, v in notes.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".saving-") as folder:
        arrays = {name: np.asarray(state) for name, state in states.items()}
        write_arrays(pathlib.Path(folder, "state"), arrays, metadata)
        os.replace(f"{folder}/state", file)


def load_states(file: str | os.PathLike[str], wanted: Mapping[str, Any], model: Any) -> dict[str, Array]:
    """Read the states named in `wanted`, in its order.

    Args:
        file: a file of `save_states`.
        wanted: arrays of the right shapes but for the number of rows and of key/value slots.
        model: the model to continue with.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or a state of another model.
    """
    with _opened(file) as stored:
        states = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        made_by = stored.metadata()["model"]
    batch = states["position"].size if "position" in states else 0
    fits = states.keys() == wanted.keys() and batch
    if not fits or not all(_fits(name, states[name], wanted[name], batch) for name in wanted):
        raise ValueError(
            f"{file}: its states do not fit this model's config; load the model that read the text"
        )
    here = fingerprint(model)
    if made_by != here:
        raise ValueError(
            f"{file}: the state of another model (fingerprint {made_by[:12]}, here {here[:12]}); load the "
            "model that read the text, with the same param_dtype and adapters"
        )
    return {name: states[name] for name in wanted}


def read_notes(file: str | os.PathLike[str]) -> dict[str, str]:
    """Return the notes that were given to `Mamba2Cache.save`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a saved state.
    """
    with _opened(file) as stored:
        metadata = stored.metadata()
    return {key.removeprefix("note."): value for key, value in metadata.items() if key.startswith("note.")}


def fingerprint(model: Any) -> str:
    """Compute a hash of all that decides a model's states: weights, adapters in use, options of the config.

    The head is not part of it. Integer sums, computed where the weights are: equal on every device and mesh.
    """
    model = getattr(model, "backbone", model)
    lines = [
        f"{field.name}={getattr(model.config, field.name)!r}"
        for field in dataclasses.fields(model.config)
        if field.name not in _WITHOUT_EFFECT and getattr(model.config, field.name) != field.default
    ]
    lines += [_line(path, array) for path, array in model._arrays().items()]
    for path, site in sites_of(model).items():
        for adapter in site.module.adapters_in_use():
            lines.append(f"{path} adapter {adapter.scale}")
            factors = (adapter.A, *adapter.B.values(), *(adapter.magnitude or {}).values())
            lines += [_line(path, factor[...]) for factor in factors]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _line(path: str, array: Array) -> str:
    return f"{path} {array.dtype}{list(array.shape)} {int(_checksum(array))}"


@jax.jit
def _checksum(array: Array) -> Array:
    """Mix each word of an array with its index, and add up, modulo 2**32: a scalar uint32."""
    words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{min(8 * array.dtype.itemsize, 32)}"))
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = (words.astype(jnp.uint32) ^ (index * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA6B)
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)


def _fits(name: str, state: Array, wanted: Any, batch: int) -> bool:
    shape = [*wanted.shape]
    shape[0] = batch
    if name.startswith("attention.") and state.ndim == len(shape):
        shape[1] = state.shape[1]  # slots
    return [*state.shape] == shape


def _opened(file: str | os.PathLike[str]) -> Any:
    file = pathlib.Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        stored = safe_open(file, framework="flax")
    except SafetensorError as error:
        raise ValueError(f"{file}: not a saved state ({error})") from error
    if (stored.metadata() or {}).get("format") != _FORMAT:
        raise ValueError(
            f"{file}: not a saved state; Mamba2Cache.save and /save of the chat write such files"
        )
    return stored
