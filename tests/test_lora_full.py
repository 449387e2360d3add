"""DoRA, and weights trained in full beside an adapter: against PEFT, merged, in files, and rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import checkpoint, jax_model, random_ids, relative

from mamba2_jax import Mamba2ForCausalLM
from mamba2_jax.lora import (
    LoraConfig,
    add_lora,
    load_lora,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_lora,
    unmerge_lora,
    use_lora,
)
from mamba2_jax.lora.attach import sites_of
from mamba2_jax.lora.peft import to_peft
from mamba2_jax.training import split_model
from mamba2_jax.weights import CheckpointError

IDS = random_ids(2, 12)
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
FULL = ("embeddings", "lm_head", "A_log", "D", "dt_bias")


def fresh(**changes) -> Mamba2ForCausalLM:
    return nnx.clone(jax_model(**changes))


def randomise(model: nnx.Module, seed: int = 1) -> None:
    """Move every factor and magnitude off its initial value."""
    rng = np.random.default_rng(seed)
    draw = lambda x: x + jnp.asarray(0.3 * rng.standard_normal(x.shape, np.float32))  # noqa: E731
    nnx.update(model, jax.tree.map(draw, lora_parameters(model)))


def adapted(config: LoraConfig, **changes) -> Mamba2ForCausalLM:
    """A model with a random adapter, and random weights where these are trained in full."""
    model = fresh(**changes)
    add_lora(model, config, rngs=nnx.Rngs(0))
    randomise(model)
    for full in getattr(model, "full", {}).values():
        structure, params, frozen = split_model(model)
        rng = np.random.default_rng(2)
        for path in sorted(full.kept):
            params[path] = params[path] + 0.1 * rng.standard_normal(params[path].shape, np.float32)
        nnx.update(model, nnx.state(structure.merge(params, frozen)))
    return model


def by_peft(folder, **config):
    """A random adapter that PEFT made and saved: its model with gradients of a loss, and that loss."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    base = transformers.Mamba2ForCausalLM.from_pretrained(checkpoint())
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, save_embedding_layers=False)
    ids = torch.tensor(IDS)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return model, out


def gradients(model):
    structure, trained, frozen = split_model(model)
    ids = jnp.asarray(IDS)
    loss = lambda trained: structure.merge(trained, frozen)(ids, labels=ids).loss  # noqa: E731
    return structure, frozen, jax.jit(jax.grad(loss))(trained)


def test_dora_equals_peft_s(tmp_path):
    theirs, out = by_peft(tmp_path, target_modules=["in_proj", "lm_head"], use_dora=True)
    model = fresh()
    load_lora(model, tmp_path)
    assert relative(model(IDS).logits, out.logits.detach()) < 2e-5
    structure, frozen, grads = gradients(model)
    nnx.update(model, nnx.state(structure.merge(grads, frozen)))  # the way out sorts them for the comparison
    want = {name: parameter.grad for name, parameter in theirs.named_parameters() if "lora_" in name}
    compared = 0
    for path, site in sites_of(model).items():
        for key, array in (
            to_peft(site.target, site.module.lora["default"]).items() if site.module.lora else ()
        ):
            part, _, ending = key.partition(".")
            name = f"base_model.model.{path}.{part}.default.{ending or 'weight'}"
            assert relative(array, want[name]) < 1e-4, name
            compared += 1
    assert compared == len(want) == 9


def test_full_weights_equal_peft_s(tmp_path):
    options = {"target_modules": ["in_proj"], "modules_to_save": ["embeddings", "lm_head"]}
    theirs, out = by_peft(tmp_path, **options)
    model = fresh()
    load_lora(model, tmp_path)
    assert relative(model(IDS).logits, out.logits.detach()) < 2e-5
    _, _, grads = gradients(model)
    for ours, name in (
        ("backbone.embeddings.weight", "backbone.embeddings.modules_to_save.default.weight"),
        ("lm_head.weight", "lm_head.modules_to_save.default.weight"),
    ):
        want = theirs.get_parameter(f"base_model.model.{name}").grad
        assert relative(grads[ours], want) < 1e-4, ours


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")
def test_peft_reads_dora_and_full_weights(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    import torch

    config = LoraConfig(4, targets=("in_proj",), use_dora=True, modules_to_save=("embeddings", "norm_f"))
    model = adapted(config)
    save_lora(model, tmp_path)
    base = transformers.Mamba2ForCausalLM.from_pretrained(checkpoint())
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        got = theirs(input_ids=torch.tensor(IDS)).logits
    assert relative(got, model(IDS).logits) < 2e-5
    assert relative(got, jax_model()(IDS).logits) > 1e-2


@pytest.mark.parametrize("tied", [True, False])
def test_full_weights_come_and_go_with_their_adapter(tied, tmp_path):
    base = fresh(tie_word_embeddings=tied)
    model = adapted(LoraConfig(2, modules_to_save=FULL, targets=("in_proj",)), tie_word_embeddings=tied)
    paths = set(split_model(model)[1])
    assert {path.rpartition(".")[2] for path in paths if "lora" not in path} == {"weight", *FULL[2:]}
    want = model(IDS).logits
    with pytest.warns(UserWarning, match="takes no adapter on A_log and D and dt_bias"):
        save_lora(model, tmp_path)
    use_lora(model, None)
    assert (model.lm_head is None) == tied
    np.testing.assert_array_equal(model(IDS).logits, base(IDS).logits)
    use_lora(model, "default")
    np.testing.assert_array_equal(model(IDS).logits, want)
    with pytest.raises(ValueError, match="use it alone"):
        use_lora(model, {"default": 0.5})
    again = fresh(tie_word_embeddings=tied)
    load_lora(again, tmp_path)
    np.testing.assert_array_equal(again(IDS).logits, want)
    merge_lora(again)
    assert relative(again(IDS).logits, want) < 2e-5
    unmerge_lora(again)
    remove_lora(again)
    np.testing.assert_array_equal(again(IDS).logits, base(IDS).logits)
    merge_lora(model, keep_base=False)
    model.save_pretrained(tmp_path / "model")
    assert relative(Mamba2ForCausalLM.from_pretrained(tmp_path / "model")(IDS).logits, want) < 2e-5


def test_dora_begins_as_the_base_and_merges():
    config = LoraConfig(3, targets=("in_proj", "out_proj", "lm_head"), use_dora=True)
    model, base = fresh(), jax_model()
    add_lora(model, config, rngs=nnx.Rngs(0))
    assert relative(model(IDS).logits, base(IDS).logits) < 1e-5  # m / norm(W) is 1 up to rounding
    randomise(model)
    want = model(IDS).logits
    assert relative(want, base(IDS).logits) > 1e-2
    merge_lora(model)
    assert relative(model(IDS).logits, want) < 2e-5
    unmerge_lora(model)
    np.testing.assert_array_equal(model(IDS).logits, want)


def test_what_bfloat16_rounds_away_is_told():
    model = fresh()
    for _, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        assert param.dtype == jnp.float32
    add_lora(model, LoraConfig(2, targets=("in_proj",)), rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: x + 1e-3, lora_parameters(model)))
    weight = lambda: np.asarray(model.backbone.layers[0].mixer.in_proj.weight_zx[...], np.float32)  # noqa: E731
    before = weight()
    lost = merge_lora(model, dtype=jnp.bfloat16)
    in_bfloat16 = weight()
    unmerge_lora(model)
    np.testing.assert_array_equal(weight(), before)
    assert merge_lora(model) == 0
    exact = weight()
    # one module of several, whose updates are alike
    np.testing.assert_allclose(
        np.linalg.norm(in_bfloat16 - exact) / np.linalg.norm(exact - before), lost, rtol=0.2
    )
    assert lost > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True, "targets": ("embeddings",)}, "use_dora is for projections and lm_head"),
        (
            {"modules_to_save": ("q_proj",)},
            "modules_to_save='q_proj' names no part of this model; it",
        ),
        ({"modules_to_save": ("in_proj",)}, "is in targets and in modules_to_save"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head' is a string"),
    ],
)
def test_what_makes_no_sense_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        add_lora(fresh(), LoraConfig(2, **options), rngs=nnx.Rngs(0))


def test_a_file_without_a_tensor_that_it_names_is_refused(tmp_path):
    config = LoraConfig(2, targets=("in_proj",), modules_to_save=("norm_f",), use_dora=True)
    save_lora(adapted(config), tmp_path)
    file = tmp_path / "adapter_config.json"
    text = file.read_text()
    file.write_text(text.replace('"norm_f"', '"norm_f", "lm_head"'))
    with pytest.raises(CheckpointError, match=r"modules_to_save names lm_head.weight, but the file has no"):
        load_lora(fresh(), tmp_path)
    file.write_text(text.replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(CheckpointError, match="lora_magnitude_vector"):
        load_lora(fresh(), tmp_path)
    file.write_text(text.replace('"norm_f"', '"norm"'))
    with pytest.raises(CheckpointError, match="norm_f"):
        load_lora(fresh(), tmp_path)
