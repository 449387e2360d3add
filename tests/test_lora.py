"""Adapters: against PEFT, against their own merged weights, and files that should be refused."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import pack, unpack
from flax import nnx
from models import checkpoint, jax_model, random_ids, relative

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM, Mamba2Model, generate
from mamba2_jax.lora import (
    LoraConfig,
    add_lora,
    load_lora,
    lora_filter,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_lora,
    set_dropout_key,
    unmerge_lora,
    use_lora,
)
from mamba2_jax.lora.attach import sites_of
from mamba2_jax.weights import CheckpointError

ALL = ("embeddings", "in_proj", "conv1d", "out_proj", "lm_head")
IDS = random_ids(2, 12)
# transformers 5.23 warns of a name of its own that PEFT 0.21 still uses
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
BY_PEFT = {"r": 4, "lora_alpha": 6, "target_modules": ["in_proj", "embeddings", "lm_head"]}


def fresh(**changes) -> Mamba2ForCausalLM:
    """A model of the test's own, with the session's weights."""
    return nnx.clone(jax_model(**changes))


def randomise(model: nnx.Module, name: str = "default", seed: int = 1) -> None:
    """Give every factor of an adapter random values."""
    rng = np.random.default_rng(seed)  # NumPy: JAX would compile for each shape
    draw = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape, np.float32))  # noqa: E731
    nnx.update(model, jax.tree.map(draw, lora_parameters(model, name)))


def adapted(targets=ALL, rank: int = 3, **changes) -> Mamba2ForCausalLM:
    model = fresh(**changes)
    add_lora(model, LoraConfig(rank=rank, alpha=5, targets=targets), rngs=nnx.Rngs(0))
    randomise(model)
    return model


def leaves(model: nnx.Module) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in flat}


def everything() -> Mamba2ForCausalLM:
    """A model with every kind of projection: MLPs after and beside, attention with a convolution."""
    ssm = {"layer": "Mamba2", "headdim": 8, "d_state": 8, "ngroups": 2, "d_ssm": 48, "bias": True}
    heads = {"causal": True, "num_heads": 4, "head_dim": 8, "d_conv": 4, "rotary_emb_dim": 4, "mlp_dim": 9}
    shape = {"d_model": 32, "n_layer": 2, "vocab_size": 96, "d_intermediate": 8}
    config = Mamba2Config.from_dict(shape | {"ssm_cfg": ssm, "attn_cfg": heads, "attn_layer_idx": [1]})
    return Mamba2ForCausalLM(config.replace(initializer_range=0.1), rngs=nnx.Rngs(0))


def check_that_every_site_counts(model: Mamba2ForCausalLM) -> None:
    """Change the adapter of one module after the other, also of such as come to the table later."""
    want = model(IDS).logits
    for path, site in sites_of(model).items():
        adapter = site.module.lora["default"]
        before = nnx.state(adapter)
        nnx.update(adapter, jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + np.float32(0.3)), before))
        assert relative(model(IDS).logits, want) > 1e-4, path
        nnx.update(adapter, before)


def test_a_new_adapter_changes_nothing_but_every_one_counts_once_it_is_trained():
    model, base = fresh(), jax_model()
    add_lora(model, LoraConfig(3, alpha=5, targets=ALL), rngs=nnx.Rngs(0))  # compiled once with `adapted`
    assert leaves(model).keys() == leaves(base).keys()
    # adding zeros is exact, but XLA fuses, so rounds, otherwise
    assert relative(model(IDS).logits, base(IDS).logits) < 1e-6
    check_that_every_site_counts(model)


def test_every_kind_of_projection_has_adapters():
    model = everything()
    add_lora(model, LoraConfig(2, targets=(*ALL, "fc1", "fc2")), rngs=nnx.Rngs(0))
    assert {path.rpartition(".")[2] for path in sites_of(model)} == {*ALL, "fc1", "fc2"}
    check_that_every_site_counts(model)
    randomise(model)
    want = model(IDS).logits
    merge_lora(model)
    assert relative(model(IDS).logits, want) < 2e-5


@pytest.mark.parametrize("tied", [True, False])
def test_merged_equals_unmerged_and_unmerging_restores_every_bit(tied):
    model = adapted(tie_word_embeddings=tied)
    base, config = leaves(model), model.config
    want = model(IDS).logits
    merge_lora(model)
    assert relative(model(IDS).logits, want) < 2e-5
    assert model.lm_head is not None
    assert not model.config.tie_word_embeddings
    with pytest.raises(ValueError, match="unmerge_lora first"):
        use_lora(model, None)
    unmerge_lora(model)
    assert model.config == config
    assert (model.lm_head is None) == tied
    after = leaves(model)
    assert after.keys() == base.keys()
    assert all(np.array_equal(after[path], base[path]) for path in base)
    np.testing.assert_array_equal(model(IDS).logits, want)
    merge_lora(model, keep_base=False)
    assert relative(model(IDS).logits, want) < 2e-5
    assert not jax.tree.leaves(lora_parameters(model))
    with pytest.raises(ValueError, match="no adapter is merged"):
        unmerge_lora(model)


def test_an_adapter_of_the_projections_leaves_a_tied_head_tied():
    model = adapted(("in_proj",), tie_word_embeddings=True)
    merge_lora(model)
    assert model.lm_head is None
    assert model.config.tie_word_embeddings


def test_adapters_add_up_and_are_chosen_by_name():
    model = adapted(("in_proj", "lm_head"))
    add_lora(model, LoraConfig(rank=2, targets=("in_proj",)), name="second", rngs=nnx.Rngs(0))
    randomise(model, "second", seed=2)
    names = (None, "default", "second", ("default", "second"), {"default": 1.0, "second": 0.5})
    logits = []
    for choice in names:
        use_lora(model, choice)
        logits.append(np.asarray(model(IDS).logits))
    merge_lora(model)
    assert relative(model(IDS).logits, logits[-1]) < 2e-5
    unmerge_lora(model)
    np.testing.assert_array_equal(logits[0], jax_model()(IDS).logits)
    for i in range(len(logits)):
        assert all(relative(logits[i], other) > 1e-3 for other in logits[:i])
    remove_lora(model, "second")
    with pytest.raises(ValueError, match="no adapter 'second'; the model has default"):
        use_lora(model, "second")
    remove_lora(model)
    np.testing.assert_array_equal(model(IDS).logits, logits[0])


def test_generate_with_an_adapter_equals_generate_with_merged_weights():
    model = adapted()
    got = generate(model, IDS, max_new_tokens=6, eos_token_id=())
    merge_lora(model)
    want = generate(model, IDS, max_new_tokens=6, eos_token_id=())
    np.testing.assert_array_equal(got.tokens, want.tokens)
    first = jax_model()(IDS).logits[:, -1].argmax(axis=-1)
    assert (np.asarray(got.tokens[:, 0]) != np.asarray(first)).any()  # the base would go on otherwise


def test_the_filter_finds_what_trains():
    model = adapted(("in_proj",))
    add_lora(model, LoraConfig(rank=2, targets=("out_proj",)), name="second", rngs=nnx.Rngs(0))
    _, trained, frozen = nnx.split(model, lora_filter("second"), ...)
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(trained)}
    layer = "backbone.layers.{}.mixer.out_proj.lora.second."
    assert paths == {layer.format(i) + factor for i in (0, 1) for factor in ("A", "B.weight")}
    assert len(nnx.to_flat_state(lora_parameters(model))) == 2 * 2 + 2 * 4
    assert len(leaves(model)) == len(nnx.to_flat_state(frozen)) - 2 * 4


def test_dropout_is_drawn_from_the_step_s_key():
    model = fresh()
    add_lora(model, LoraConfig(targets=("in_proj", "lm_head"), dropout=0.5), rngs=nnx.Rngs(0))
    randomise(model)
    ids = jnp.asarray(IDS)

    @jax.jit
    def logits(model, key):
        set_dropout_key(model, key)
        return model(ids).logits

    without = model(ids).logits
    first, again, other = (logits(model, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert relative(first, without) > 1e-3
    assert relative(first, other) > 1e-3
    np.testing.assert_array_equal(model(ids).logits, without)  # the key stayed inside the step


@pytest.fixture(scope="module")
def peft_side(tmp_path_factory):
    """A random adapter that PEFT made and saved: its model, its folder."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    base = transformers.Mamba2ForCausalLM.from_pretrained(checkpoint())
    model = peft.get_peft_model(base, peft.LoraConfig(**BY_PEFT, rank_pattern={"layers.1.mixer.in_proj": 2}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    model.save_pretrained(folder, save_embedding_layers=True)  # what it also does by itself, with a warning
    return model, folder


def test_logits_and_gradients_equal_peft_s(peft_side):
    import torch

    theirs, folder = peft_side
    model = fresh()
    load_lora(model, folder)
    ids = torch.tensor(IDS)
    out = theirs(input_ids=ids, labels=ids)
    out.loss.backward()
    assert relative(model(IDS).logits, out.logits.detach()) < 2e-5

    graph, trained, frozen = nnx.split(model, lora_filter(), ...)
    loss, gradients = jax.value_and_grad(
        lambda trained: nnx.merge(graph, trained, frozen)(jnp.asarray(IDS), labels=jnp.asarray(IDS)).loss
    )(trained)
    assert relative(loss, out.loss.detach()) < 1e-5
    nnx.update(model, gradients)  # so that the table's own way out sorts them for the comparison
    from mamba2_jax.lora.peft import to_peft

    want = {name: parameter.grad for name, parameter in theirs.named_parameters() if "lora_" in name}
    compared = 0
    for path, site in sites_of(model).items():
        if site.module.lora is None:
            continue
        for key, array in to_peft(site.target, site.module.lora["default"]).items():
            name = f"base_model.model.{path}.{key}".replace("_A", "_A.default").replace("_B", "_B.default")
            assert relative(array, want[name]) < 1e-4, name
            compared += 1
    assert compared == len(want) == 8


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_what_we_write(rslora, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    import torch

    model = fresh()
    config = LoraConfig(
        rank=4,
        alpha=6,
        targets=("embeddings", "layers.1.mixer.in_proj"),
        use_rslora=rslora,
        rank_pattern={"embeddings": 3},
        alpha_pattern={"embeddings": 2.5},
    )
    add_lora(model, config, rngs=nnx.Rngs(0))
    randomise(model)
    save_lora(model, tmp_path, base_model="some/base")
    (tmp_path / "ordinary").touch()
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1
    base = transformers.Mamba2ForCausalLM.from_pretrained(checkpoint())
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor(IDS)).logits
    assert relative(model(IDS).logits, want) < 2e-5
    assert relative(want, jax_model()(IDS).logits) > 1e-2


def test_an_adapter_in_an_older_peft_s_pickle_is_read_as_plain_tensors(peft_side, tmp_path):
    import torch
    from safetensors.torch import load_file

    folder = Path(shutil.copytree(peft_side[1], tmp_path / "adapter"))
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    old, new = fresh(), fresh()
    load_lora(old, folder)
    load_lora(new, peft_side[1])
    pairs = zip(jax.tree.leaves(lora_parameters(old)), jax.tree.leaves(lora_parameters(new)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_a_merged_model_is_saved_for_transformers(tmp_path):
    import torch
    import transformers

    model = adapted(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="adapters are in use"):
        model.save_pretrained(tmp_path / "model")
    want = model(IDS).logits
    merge_lora(model)
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        theirs = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path / "model")
        got = theirs(input_ids=torch.tensor(IDS)).logits
    assert relative(got, want) < 2e-5


def test_every_target_survives_our_own_round_trip(tmp_path):
    model = adapted()
    with pytest.warns(UserWarning, match="PEFT takes no adapter on conv1d and out_proj"):
        save_lora(model, tmp_path / "a")
    again = fresh()
    load_lora(again, tmp_path / "a", name="again")
    np.testing.assert_array_equal(again(IDS).logits, model(IDS).logits)
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    load_lora(again, tmp_path / "a", name="narrow", param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(lora_parameters(again, "narrow"))} == {
        jnp.dtype("bfloat16")
    }


def test_the_bare_model_has_adapters_too(tmp_path):
    model = Mamba2Model.from_pretrained(checkpoint())
    want = model(IDS).last_hidden_state
    add_lora(model, LoraConfig(targets=("in_proj", "embeddings")), rngs=nnx.Rngs(0))
    randomise(model)
    save_lora(model, tmp_path)
    whole = fresh()
    load_lora(whole, tmp_path)
    got = model(IDS).last_hidden_state
    assert relative(got, want) > 1e-2
    np.testing.assert_array_equal(whole.backbone(IDS).last_hidden_state, got)
    merge_lora(model)
    assert relative(model(IDS).last_hidden_state, got) < 2e-5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank=0; want an integer of at least 1"),
        ({"rank": 2.0}, "rank=2.0"),
        ({"rank_pattern": {"in_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {"(": 1}}, "not a regular expression"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "more than one repetition"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": "in_proj"}, "want names"),
        (
            {"targets": ("in_proj", "x_proj")},
            "no module 'x_proj'.*conv1d, embeddings, in_proj, lm_head, out_proj",
        ),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        add_lora(jax_model(), LoraConfig(**fields), rngs=nnx.Rngs(0))


def test_what_makes_no_sense_is_an_error():
    model = adapted(("in_proj",))
    for call, message in [
        (lambda: add_lora(model, rngs=nnx.Rngs(0)), "has an adapter 'default' already"),
        (lambda: add_lora(model, name="a.b", rngs=nnx.Rngs(0)), "letters, digits"),
        (lambda: use_lora(model, {"default": float("inf")}), "finite"),
        (lambda: unmerge_lora(model), "no adapter is merged"),
        (lambda: merge_lora(fresh()), "no adapter is in use"),
        (lambda: save_lora(model, "unused", name="other"), "no adapter 'other'"),
        (lambda: save_lora(model, __file__), "is a file"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def edit_config(**fields):
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return edit


def edit_tensors(change):
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        header, data = unpack(file.read_bytes())
        change(header)
        file.write_bytes(pack(header, data))

    return edit


def rename(old: str, new: str):
    return edit_tensors(lambda header: header.update({new: header.pop(old)}))


def poison(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    header, data = unpack(file.read_bytes())
    file.write_bytes(pack(header, b"\xff" * 4 + data[4:]))


IN_PROJ = "base_model.model.backbone.layers.0.mixer.in_proj."
BROKEN = {
    "config missing": (lambda folder: (folder / "adapter_config.json").unlink(), "missing"),
    "config not JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "not readable JSON"),
    "config with NaN": (
        lambda folder: (folder / "adapter_config.json").write_text('{"lora_alpha": NaN}'),
        "not readable JSON",
    ),
    "other method": (edit_config(peft_type="LOHA"), "peft_type='LOHA'; only 'LORA'"),
    "DoRA": (edit_config(use_dora=True), "use_dora.*not supported"),
    "biases": (edit_config(bias="all"), "bias.*not supported"),
    "changed base": (edit_config(init_lora_weights="pissa"), "init_lora_weights.*not supported"),
    "unknown option": (edit_config(new_in_peft=1), "new_in_peft.*not supported"),
    "rank 0": (edit_config(r=0), "rank=0"),
    "rank as text": (edit_config(r="8"), "rank='8'"),
    "endless pattern": (edit_config(alpha_pattern={"(.+)+x": 1}), "more than one repetition"),
    "endless target": (edit_config(target_modules="(.+)+x"), "more than one repetition"),
    "targets missing": (edit_config(target_modules=None), "target_modules='None'"),
    "tensors without target": (
        edit_config(target_modules=["in_proj"]),
        "does not name backbone.embeddings",
    ),
    "target without tensors": (edit_config(target_modules=["in_proj", "out_proj"]), "no tensor of it"),
    "other rank": (edit_config(r=5), r"has shape \(4, 32\), the model at rank 5 wants \(5, 32\)"),
    "pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "adapter_model.bin",
    ),
    "tensors missing": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "missing"),
    "garbage": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 99), "truncated"),
    "link out of the folder": (
        lambda folder: (
            (folder / "adapter_model.safetensors").rename(folder.parent / "out.safetensors"),
            (folder / "adapter_model.safetensors").symlink_to(folder.parent / "out.safetensors"),
        ),
        "outside the folder",
    ),
    "half of a pair": (rename(f"{IN_PROJ}lora_A.weight", f"{IN_PROJ}lora_A.bias"), "has no lora_A.weight"),
    "unknown module": (
        rename(f"{IN_PROJ}lora_A.weight", "base_model.model.x.lora_A.weight"),
        "belongs to no module of this model",
    ),
    "integers": (
        edit_tensors(lambda header: header[f"{IN_PROJ}lora_A.weight"].update(dtype="I32")),
        "is I32, want",
    ),
    "not finite": (poison, "NaN or infinite|not this model's"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_adapter_is_refused_and_leaves_the_model_alone(kind, peft_side, tmp_path):
    edit, message = BROKEN[kind]
    folder = Path(shutil.copytree(peft_side[1], tmp_path / "adapter"))
    edit(folder)
    model = jax_model()
    with pytest.raises(CheckpointError, match=message):
        load_lora(model, folder)
    assert not jax.tree.leaves(lora_parameters(model))


def test_an_adapter_of_another_model_is_refused(peft_side):
    with pytest.raises(CheckpointError, match=r"the model at rank 4 wants"):
        load_lora(jax_model(hidden_size=16, num_heads=4), peft_side[1])
    other = fresh()
    other.backbone.embeddings.weight[...] *= 2
    with pytest.raises(CheckpointError, match="not this model's"):  # PEFT stores the adapted embedding again
        load_lora(other, peft_side[1])
