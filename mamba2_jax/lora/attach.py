"""Functions that add, select, train and remove a model's adapters, in place."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mamba2_jax.layers.adaptable import Adaptable, Adapter, DropoutKey
from mamba2_jax.lora.full import (
    FullWeights,
    attach_full,
    detach_full,
    full_weights,
    match_full,
    new_full_weights,
    parameter_at,
    set_in_use,
)
from mamba2_jax.lora.initial import initial_factors, initial_magnitude
from mamba2_jax.lora.settings import LoraConfig
from mamba2_jax.lora.targets import Target, adapter_targets, match_targets
from mamba2_jax.typing import Array, DTypeLike
from mamba2_jax.weights.table import EMBEDDING, HEAD, Leaf

_HEAD_MODULE = HEAD.removesuffix(".weight")


class Site(NamedTuple):
    """Adapter target and the module of the model that holds its adapters."""

    target: Target
    module: Adaptable


def add_lora(
    model: nnx.Module,
    config: LoraConfig | None = None,
    *,
    name: str = "default",
    rngs: nnx.Rngs,
    param_dtype: DTypeLike = jnp.float32,
) -> None:
    """Add a new adapter and make it the only one in use. Its initial update is zero.

    Args:
        model: Mamba2ForCausalLM or Mamba2Model; its weights keep their values and paths.
        config: rank, scale and targets; None: `LoraConfig()`.
        name: name of the adapter.
        rngs: random keys of the initial values; one factor is random, the other zero.
        param_dtype: dtype of the adapter.

    Raises:
        ValueError: a target that the model lacks (the message lists its targets), or a name in use.
    """
    config = LoraConfig() if config is None else config
    sites = sites_of(model)
    targets = {path: site.target for path, site in sites.items()}
    adapters = {}
    for target in match_targets("add_lora", targets, config.targets):
        rank = config.rank_of(target.name)
        A, B = initial_factors(target, rank, rngs, param_dtype)
        alpha = config.alpha_of(target.name)
        magnitude = _magnitude(model, sites[target.name], param_dtype) if config.use_dora else None
        adapters[target.name] = Adapter(
            A, B, alpha=alpha, use_rslora=config.use_rslora, dropout=config.dropout, magnitude=magnitude
        )
    full = None
    if config.modules_to_save:
        tensors = match_full("add_lora", model, config.modules_to_save)
        full = new_full_weights(model, config.modules_to_save, tensors)
    attach(model, name, adapters, "add_lora", full)


def attach(
    model: nnx.Module,
    name: str,
    adapters: Mapping[str, Adapter],
    op: str,
    full: FullWeights | None = None,
) -> None:
    """Attach adapters, given by module path, under one name and make them the only ones in use."""
    sites = sites_of(model)
    if not name.isidentifier():
        raise ValueError(f"{op}: name={name!r} must be letters, digits and _, as it becomes part of paths")
    if name in adapter_names(model):
        raise ValueError(
            f"{op}: the model has an adapter {name!r} already; remove_lora it, or choose another name"
        )
    refuse_merged(op, sites)
    if full is not None:
        both = sorted({tensor.removesuffix(".weight") for tensor in full.tensors} & adapters.keys())
        if both:
            raise ValueError(f"{op}: {both[0]} is in targets and in modules_to_save; name it in one of them")
    use_lora(model, None)  # so that the weights in the model are its own
    if full is not None:
        attach_full(model, name, full)
    for path, adapter in adapters.items():
        module = sites[path].module
        if module.lora is None:
            module.lora = nnx.Dict()
        module.lora[name] = adapter
    use_lora(model, name)


def use_lora(model: nnx.Module, names: str | Iterable[str] | Mapping[str, float] | None) -> None:
    """Select the adapters in use; each new selection compiles once.

    Args:
        model: a model with adapters.
        names: one name; several, whose updates add up; a mapping from names to factors on their updates;
            or None for the weights alone.

    Raises:
        ValueError: a name that the model lacks, a factor that is not finite, or merged adapters.
    """
    names = [names] if isinstance(names, str) else names or ()
    shares = {name: float(names[name]) if isinstance(names, Mapping) else 1.0 for name in names}
    sites = sites_of(model)
    _check_names("use_lora", model, shares)
    if not all(map(math.isfinite, shares.values())):
        raise ValueError(f"use_lora: shares must be finite, got {shares}")
    refuse_merged("use_lora", sites)
    _check_combination(model, sites, shares)
    for _, module in sites.values():
        for name, adapter in (module.lora or {}).items():
            adapter.share = shares.get(name, 0.0)
    for used in (False, True):  # out first: two adapters may replace the same weight
        for name, full in full_weights(model).items():
            if bool(shares.get(name)) == used:
                set_in_use(model, full, used)


def _check_combination(model: nnx.Module, sites: Mapping[str, Site], shares: Mapping[str, float]) -> None:
    """Refuse adapters that cannot be added up: DoRA and full weights replace weights, LoRA adds to them."""
    chosen = {name for name, share in shares.items() if share}
    alone = set(full_weights(model)) & chosen
    for _, module in sites.values():
        alone |= {name for name, one in (module.lora or {}).items() if one.magnitude is not None} & chosen
    for name in sorted(alone):
        if len(chosen) > 1 or shares[name] != 1:
            raise ValueError(
                f"use_lora: {name!r} has DoRA or modules_to_save, which no other adapter and no share but 1 "
                "goes with; use it alone"
            )


def remove_lora(model: nnx.Module, names: str | Iterable[str] | None = None) -> None:
    """Remove adapters from the model; None: all of them. Merged adapters must be unmerged first."""
    names = set([names] if isinstance(names, str) else adapter_names(model) if names is None else names)
    sites = sites_of(model)
    _check_names("remove_lora", model, names)
    refuse_merged("remove_lora", sites)
    for name in names & full_weights(model).keys():
        detach_full(model, name)
    for _, module in sites.values():
        for name in names & set(module.lora or ()):
            del module.lora[name]  # pyright: ignore[reportOptionalSubscript]
        if module.lora is not None and not module.lora:
            del module.lora


def lora_filter(names: str | Iterable[str] | None = None) -> Callable[[tuple, object], bool]:
    """Return an NNX filter of trainable leaves, for `nnx.split`, `nnx.state` or `nnx.Optimizer(wrt=...)`.

    Args:
        names: adapters to train; None: all. An adapter that is not in use has zero gradients, but weight
            decay still shrinks it, so name the adapter that you train.
    """
    wanted = None if names is None else {names} if isinstance(names, str) else set(names)

    def is_trained(path: tuple, value: object) -> bool:
        kind = getattr(value, "type", type(value))
        return issubclass(kind, nnx.LoRAParam) and (wanted is None or _adapter_of(path) in wanted)

    return is_trained


def trained_paths(model: nnx.Module) -> set[str]:
    """Return the paths of all that is trained with the adapters: theirs, and full weights in use."""
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(lora_parameters(model))}
    inner = "" if hasattr(model, "backbone") else "backbone."
    used = [path for full in full_weights(model).values() if full.in_use for path in full.kept]
    return paths | {path.removeprefix(inner) for path in used}


def lora_parameters(model: nnx.Module, names: str | Iterable[str] | None = None) -> nnx.State:
    """Return the adapters' leaves as an NNX state, to train or store; `nnx.update` writes them back."""
    return nnx.state(model, lora_filter(names))


def set_dropout_key(model: nnx.Module, key: Array | None) -> None:
    """Enable adapter dropout for one training step, with a separate mask per module; None disables it.

    Call it inside the jitted step, on the step's own model, so that the key does not outlive the step.
    """
    for index, (_, module) in enumerate(sites_of(model).values()):
        for adapter in (module.lora or {}).values():
            if adapter.dropout:
                adapter.dropout_key = None if key is None else DropoutKey(jax.random.fold_in(key, index))


def adapter_names(model: nnx.Module) -> list[str]:
    """Return the sorted names of the model's adapters."""
    return sorted({name for _, module in sites_of(model).values() for name in module.lora or ()})


def settings_of(model: nnx.Module, name: str) -> LoraConfig:
    """Return settings with which `add_lora` makes an adapter of the same shapes and scales."""
    of_sites = {path: (site.module.lora or {}).get(name) for path, site in sites_of(model).items()}
    adapters = {path: one for path, one in of_sites.items() if one is not None}
    first, full = next(iter(adapters.values())), full_weights(model).get(name)
    return LoraConfig(
        rank=first.rank,
        alpha=first.alpha,
        targets=tuple(adapters),
        dropout=first.dropout,
        use_rslora=first.use_rslora,
        rank_pattern={path: one.rank for path, one in adapters.items() if one.rank != first.rank},
        alpha_pattern={path: one.alpha for path, one in adapters.items() if one.alpha != first.alpha},
        use_dora=first.magnitude is not None,
        modules_to_save=() if full is None else full.names,
    )


def adapters_in_use(model: nnx.Module) -> bool:
    """Return whether any unmerged adapter contributes to the model's output."""
    return any(site.module.adapters_in_use() for site in sites_of(model).values())


def sites_of(model: nnx.Module) -> dict[str, Site]:
    """Return the model's modules that accept adapters, by module path in the checkpoint table."""
    return dict(_sites(model))


def _sites(model) -> Iterator[tuple[str, Site]]:
    whole = hasattr(model, "backbone")
    for path, target in adapter_targets(model.config, head=whole).items():
        module = getattr(model, "head", None) if path == _HEAD_MODULE else parameter_at(model, path)
        if isinstance(module, Adaptable):
            yield path, Site(target, module)


def weights_of(model, site: Site) -> Iterator[tuple[Leaf, nnx.Param]]:
    """Yield each leaf of a site with its parameter; for a tied head, the embedding's parameter."""
    for leaf in site.target.stored.leaves:
        path = EMBEDDING if leaf.path == HEAD and is_tied(model) else leaf.path
        yield leaf, parameter_at(model, path)


def _magnitude(model: nnx.Module, site: Site, dtype: DTypeLike) -> dict[str, Array]:
    weights = {leaf: weight[...] for leaf, weight in weights_of(model, site)}
    return initial_magnitude(site.target, weights, dtype)


def _adapter_of(path: tuple) -> str | None:
    """Return the adapter name in a leaf's path: `...in_proj.lora.default.A` -> `default`."""
    parts = [str(part) for part in path]
    return parts[parts.index("lora") + 1] if "lora" in parts[:-1] else None


def is_tied(model) -> bool:
    """Return whether the model has a head that is tied to the embedding."""
    return hasattr(model, "lm_head") and model.lm_head is None


def _check_names(op: str, model: nnx.Module, names: Iterable[str]) -> None:
    present = adapter_names(model)
    for name in names:
        if name not in present:
            raise ValueError(f"{op}: no adapter {name!r}; the model has {', '.join(present) or 'none'}")


def refuse_merged(op: str, sites: Mapping[str, Site]) -> None:
    """Raise ValueError if adapters are merged into the weights."""
    if any(module.unmerged is not None for _, module in sites.values()):
        raise ValueError(f"{op}: adapters are merged into the weights; unmerge_lora first")
