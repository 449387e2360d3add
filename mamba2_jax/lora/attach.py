"""Functions that add, select, train, merge and remove a model's adapters, in place."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mamba2_jax.layers.adaptable import Adaptable, Adapter, BaseWeight, DropoutKey
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
    targets = {path: site.target for path, site in sites_of(model).items()}
    adapters = {}
    for target in match_targets("add_lora", targets, config.targets):
        rank = config.rank_of(target.name)
        A, B = _initial_factors(target, rank, rngs, param_dtype)
        alpha = config.alpha_of(target.name)
        adapters[target.name] = Adapter(
            A, B, alpha=alpha, use_rslora=config.use_rslora, dropout=config.dropout
        )
    attach(model, name, adapters, "add_lora")


def attach(model: nnx.Module, name: str, adapters: Mapping[str, Adapter], op: str) -> None:
    """Attach adapters, given by module path, under one name and make them the only ones in use."""
    sites = sites_of(model)
    if not name.isidentifier():
        raise ValueError(f"{op}: name={name!r} must be letters, digits and _, as it becomes part of paths")
    if name in adapter_names(model):
        raise ValueError(
            f"{op}: the model has an adapter {name!r} already; remove_lora it, or choose another name"
        )
    _refuse_merged(op, sites)
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
    _refuse_merged("use_lora", sites)
    for _, module in sites.values():
        for name, adapter in (module.lora or {}).items():
            adapter.share = shares.get(name, 0.0)


def remove_lora(model: nnx.Module, names: str | Iterable[str] | None = None) -> None:
    """Remove adapters from the model; None: all of them. Merged adapters must be unmerged first."""
    names = set([names] if isinstance(names, str) else adapter_names(model) if names is None else names)
    sites = sites_of(model)
    _check_names("remove_lora", model, names)
    _refuse_merged("remove_lora", sites)
    for _, module in sites.values():
        for name in names & set(module.lora or ()):
            del module.lora[name]  # pyright: ignore[reportOptionalSubscript]
        if module.lora is not None and not module.lora:
            del module.lora


def merge_lora(model: nnx.Module, *, keep_base: bool = True) -> None:
    """Add the adapters in use to the weights, in float32, rounded once to each weight's dtype.

    A head tied to the embedding is untied if an adapter updates either of the two.

    Args:
        model: a model with adapters.
        keep_base: keep a copy of the changed weights (as much memory as they take), so that `unmerge_lora`
            restores them bit for bit. False: drop the original weights and all adapters permanently.

    Raises:
        ValueError: no adapter is in use, or adapters are already merged.
    """
    sites = sites_of(model)
    _refuse_merged("merge_lora", sites)
    if not adapters_in_use(model):
        raise ValueError("merge_lora: no adapter is in use; add_lora, load_lora or use_lora first")
    if is_tied(model) and any(
        site.module.adapters_in_use()
        for site in sites.values()
        if site.target.stored.name in (EMBEDDING, HEAD)
    ):
        _untie(model)
    for site in sites.values():
        if adapters := site.module.adapters_in_use():
            site.module.unmerged = nnx.Dict(_merge(model, site, adapters))
    if not keep_base:
        for site in sites.values():
            for name in {"lora", "unmerged", "untied_by_merge"} & vars(site.module).keys():
                delattr(site.module, name)


def _merge(model: nnx.Module, site: Site, adapters: list[Adapter]) -> dict[str, BaseWeight]:
    """Add adapters to the weights of one module; return the original weights by leaf name."""
    base = {}
    for leaf, weight in weights_of(model, site):
        base[leaf.name] = BaseWeight(weight[...])
        full = jnp.promote_types(weight.dtype, jnp.float32)
        delta = sum(adapter.delta(leaf.name, site.target.input_axis(leaf)) for adapter in adapters)
        weight[...] = (weight[...].astype(full) + delta).astype(weight.dtype)
    return base


def unmerge_lora(model: nnx.Module) -> None:
    """Restore the weights from before `merge_lora` bit for bit, and apply the adapters separately again.

    Raises:
        ValueError: no adapter is merged.
    """
    sites = sites_of(model)
    if not any(module.unmerged is not None for _, module in sites.values()):
        raise ValueError("unmerge_lora: no adapter is merged (keep_base=False merges for good)")
    for site in sites.values():
        if site.module.unmerged is not None:
            for leaf, weight in weights_of(model, site):
                weight[...] = site.module.unmerged[leaf.name][...]
            del site.module.unmerged
    _tie_again(model)


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


def adapters_in_use(model: nnx.Module) -> bool:
    """Return whether any unmerged adapter contributes to the model's output."""
    return any(site.module.adapters_in_use() for site in sites_of(model).values())


def sites_of(model: nnx.Module) -> dict[str, Site]:
    """Return the model's modules that accept adapters, by module path in the checkpoint table."""
    return dict(_sites(model))


def _sites(model) -> Iterator[tuple[str, Site]]:
    whole = hasattr(model, "backbone")
    for path, target in adapter_targets(model.config, head=whole).items():
        inner = path if whole else path.removeprefix("backbone.")
        module = model.head if path == _HEAD_MODULE else _module_at(model, inner)
        if isinstance(module, Adaptable):
            yield path, Site(target, module)


def _module_at(model, path: str):
    return reduce(
        lambda at, part: at[int(part)] if part.isdecimal() else getattr(at, part), path.split("."), model
    )


def weights_of(model, site: Site) -> Iterator[tuple[Leaf, nnx.Param]]:
    """Yield each leaf of a site with its parameter; for a tied head, the embedding's parameter."""
    for leaf in site.target.stored.leaves:
        path = EMBEDDING if leaf.path == HEAD and is_tied(model) else leaf.path
        yield leaf, _module_at(model, path if hasattr(model, "backbone") else path.removeprefix("backbone."))


def _initial_factors(
    target: Target, rank: int, rngs: nnx.Rngs, dtype: DTypeLike
) -> tuple[Array, dict[str, Array]]:
    """Initialize A and B as PEFT does: A uniform and B zero; for the embedding A zero and B normal."""
    shape_of_A = (target.in_size, rank)
    shapes = {leaf.name: target.shape_of_B(leaf, rank) for leaf in target.stored.leaves}
    if target.is_embedding:  # were A random, training B would change every token's row, trained or not
        A = jnp.zeros(shape_of_A, dtype)
        return A, {name: jax.random.normal(rngs.params(), shape, dtype) for name, shape in shapes.items()}
    bound = 1 / math.sqrt(target.in_size)
    A = jax.random.uniform(rngs.params(), shape_of_A, jnp.float32, -bound, bound).astype(dtype)
    return A, {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}


def _adapter_of(path: tuple) -> str | None:
    """Return the adapter name in a leaf's path: `...in_proj.lora.default.A` -> `default`."""
    parts = [str(part) for part in path]
    return parts[parts.index("lora") + 1] if "lora" in parts[:-1] else None


def is_tied(model) -> bool:
    """Return whether the model has a head that is tied to the embedding."""
    return hasattr(model, "backbone") and model.lm_head is None


def _untie(model) -> None:
    """Untie the head: give it a copy of the embedding as its own weight."""
    model.lm_head = nnx.data(nnx.clone(model.backbone.embeddings))
    if model.lm_head.lora is not None:
        del model.lm_head.lora
    model.config = model.backbone.config = model.config.replace(tie_word_embeddings=False)
    model.head.untied_by_merge = True


def _tie_again(model) -> None:
    """Tie the head to the embedding again if `_untie` untied it."""
    if hasattr(model, "head") and model.head.untied_by_merge:
        model.lm_head = None
        model.config = model.backbone.config = model.config.replace(tie_word_embeddings=True)
        model.head.untied_by_merge = False


def _check_names(op: str, model: nnx.Module, names: Iterable[str]) -> None:
    present = adapter_names(model)
    for name in names:
        if name not in present:
            raise ValueError(f"{op}: no adapter {name!r}; the model has {', '.join(present) or 'none'}")


def _refuse_merged(op: str, sites: Mapping[str, Site]) -> None:
    if any(module.unmerged is not None for _, module in sites.values()):
        raise ValueError(f"{op}: adapters are merged into the weights; unmerge_lora first")
