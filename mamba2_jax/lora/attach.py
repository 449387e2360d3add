"""Adapters on a model: add, choose, train, merge, remove. All of them change the model in place."""

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
    """A target in a model, and the module there that holds its adapters."""

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
    """Give the model a new adapter, and use it alone. Until it is trained it changes no number.

    Args:
        model: Mamba2ForCausalLM or Mamba2Model; its weights stay as they are, at the same paths.
        config: rank, scale and targets; None: `LoraConfig()`.
        name: what the adapter is called.
        rngs: source of the initial values; one factor is random, the other zero.
        param_dtype: dtype of the adapter.

    Raises:
        ValueError: a target that the model does not have (lists what it has), a name that is taken.
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
    """Hang adapters, by module path, into the model under one name, and use them alone."""
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
    """Choose the adapters that count; changing the choice compiles again, once for each.

    Args:
        model: a model with adapters.
        names: one name, several (their changes add up), names with the share that each counts, or None: the
            weights alone.

    Raises:
        ValueError: a name that the model does not have, or adapters that are merged.
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
    """Take adapters off the model; None: all of them. Merged ones must be unmerged first."""
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
    """Write the adapters in use into the weights, in float32 and rounded once to each weight's dtype.

    A head that is tied to the embedding is untied when an adapter changes either of the two.

    Args:
        model: a model with adapters.
        keep_base: keep the weights as they were (as much memory again as they take), so that `unmerge_lora`
            gives them back bit for bit. False: drop them and every adapter, for good.

    Raises:
        ValueError: no adapter is in use, or they are merged already.
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
    """Add adapters to the weights of one module; returns these as they were."""
    base = {}
    for leaf, weight in weights_of(model, site):
        base[leaf.name] = BaseWeight(weight[...])
        full = jnp.promote_types(weight.dtype, jnp.float32)
        delta = sum(adapter.delta(leaf.name, leaf.role.input_axis) for adapter in adapters)
        weight[...] = (weight[...].astype(full) + delta).astype(weight.dtype)
    return base


def unmerge_lora(model: nnx.Module) -> None:
    """Give the weights back as they were before `merge_lora`, bit for bit; the adapters count again.

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
    """Make the NNX filter of the leaves that train: for `nnx.split`, `nnx.state`, `nnx.Optimizer(wrt=...)`.

    Args:
        names: the adapters; None: all. An adapter that is not in use has zero gradients, but weight decay
            would still shrink it: name the one that you train.
    """
    wanted = None if names is None else {names} if isinstance(names, str) else set(names)

    def is_trained(path: tuple, value: object) -> bool:
        kind = getattr(value, "type", type(value))
        return issubclass(kind, nnx.LoRAParam) and (wanted is None or _adapter_of(path) in wanted)

    return is_trained


def lora_parameters(model: nnx.Module, names: str | Iterable[str] | None = None) -> nnx.State:
    """The adapters' leaves as an NNX state, to train or to store; `nnx.update` puts them back."""
    return nnx.state(model, lora_filter(names))


def set_dropout_key(model: nnx.Module, key: Array | None) -> None:
    """Switch dropout on for one training step, each module with its own mask; None switches it off.

    Call it inside the compiled step, on the model that the step was given: it then stays there.
    """
    for index, (_, module) in enumerate(sites_of(model).values()):
        for adapter in (module.lora or {}).values():
            if adapter.dropout:
                adapter.dropout_key = None if key is None else DropoutKey(jax.random.fold_in(key, index))


def adapter_names(model: nnx.Module) -> list[str]:
    """The names of the model's adapters, sorted."""
    return sorted({name for _, module in sites_of(model).values() for name in module.lora or ()})


def adapters_in_use(model: nnx.Module) -> bool:
    """Whether the weights alone do not say what the model computes."""
    return any(site.module.adapters_in_use() for site in sites_of(model).values())


def sites_of(model: nnx.Module) -> dict[str, Site]:
    """Every module of the model that can hold adapters, by the path of its weight."""
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
    """A site's leaves with the parameters that hold them; of a tied head the embedding's."""
    for leaf in site.target.stored.leaves:
        path = EMBEDDING if leaf.path == HEAD and is_tied(model) else leaf.path
        yield leaf, _module_at(model, path if hasattr(model, "backbone") else path.removeprefix("backbone."))


def _initial_factors(
    target: Target, rank: int, rngs: nnx.Rngs, dtype: DTypeLike
) -> tuple[Array, dict[str, Array]]:
    """One factor random, one zero, as PEFT draws them: A uniform, but B normal for the embedding."""
    shape_of_A = (target.in_size, rank)
    shapes = {leaf.name: target.shape_of_B(leaf, rank) for leaf in target.stored.leaves}
    if target.is_embedding:  # B random: where A were, every token would move, also those never trained
        A = jnp.zeros(shape_of_A, dtype)
        return A, {name: jax.random.normal(rngs.params(), shape, dtype) for name, shape in shapes.items()}
    bound = 1 / math.sqrt(target.in_size)
    A = jax.random.uniform(rngs.params(), shape_of_A, jnp.float32, -bound, bound).astype(dtype)
    return A, {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}


def _adapter_of(path: tuple) -> str | None:
    """`...in_proj.lora.default.A` -> `default`."""
    parts = [str(part) for part in path]
    return parts[parts.index("lora") + 1] if "lora" in parts[:-1] else None


def is_tied(model) -> bool:
    """Whether the model has a head that is the embedding's matrix."""
    return hasattr(model, "backbone") and model.lm_head is None


def _untie(model) -> None:
    """Give the head a matrix of its own, equal to the embedding."""
    model.lm_head = nnx.data(nnx.clone(model.backbone.embeddings))
    if model.lm_head.lora is not None:
        del model.lm_head.lora
    model.config = model.backbone.config = model.config.replace(tie_word_embeddings=False)
    model.head.untied_by_merge = True


def _tie_again(model) -> None:
    """Undo `_untie`, if it was done."""
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
