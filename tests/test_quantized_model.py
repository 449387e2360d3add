"""Models with quantized weights: loading, saving, generating, adapters, and what is refused."""

import functools
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import random_ids, random_jax_model, relative
from safetensors.numpy import load_file, save_file
from training_runs import model_folder, texts_file

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM, Mamba2Model, generate
from mamba2_jax.cli import commands as cli
from mamba2_jax.hub import EMBEDDED_MODEL
from mamba2_jax.lora import LoraConfig, add_lora, load_lora, lora_filter, merge_lora, save_lora
from mamba2_jax.ops.quantized import QuantizedWeight
from mamba2_jax.training import split_model
from mamba2_jax.weight_types import WEIGHT_TYPES
from mamba2_jax.weights import load_weights
from mamba2_jax.weights.convert import convert

TYPES = sorted(WEIGHT_TYPES)
# A Mamba-2 and an attention layer, each with a mixture of experts and an expert of all tokens.
FILE = {
    **{"model_type": "granitemoehybrid", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2},
    **{"layer_types": ["mamba", "attention"], "num_attention_heads": 4, "num_key_value_heads": 2},
    **{
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 16,
        "mamba_n_groups": 2,
        "mamba_chunk_size": 8,
    },
    **{"intermediate_size": 32, "shared_intermediate_size": 48, "num_local_experts": 4},
    **{"num_experts_per_tok": 2, "tie_word_embeddings": False, "eos_token_id": 1, "pad_token_id": 0},
}
IDS = random_ids(2, 9, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of floats of a model with every kind of matrix."""
    folder = tmp_path_factory.mktemp("floats")
    random_jax_model(Mamba2Config.from_dict(FILE)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return functools.cache(lambda kind: Mamba2ForCausalLM.from_pretrained(folder, quantize=kind))


def fresh(model: Mamba2ForCausalLM) -> Mamba2ForCausalLM:
    """A model of the same arrays, to change in place."""
    return nnx.clone(model)


def same_arrays(one, other) -> bool:
    one, other = one._arrays(), other._arrays()
    return list(one) == list(other) and all(
        one[path].dtype == other[path].dtype and np.array_equal(one[path], other[path]) for path in one
    )


@pytest.mark.parametrize("kind", TYPES)
def test_loading_quantizes_what_quantize_does(folder, loaded, kind):
    model = loaded(kind)
    assert model.config.quantization == kind
    floats = sorted(
        path for path, array in model._arrays().items() if not path.endswith((".values", ".scales"))
    )
    kept = ("norm", "conv1d", "A_log", "dt_bias", ".D", "router.weight", "norm_f.weight")
    assert all(any(name in path for name in kept) for path in floats)
    assert {type(model.output_weight), type(model.backbone.layers[0].experts.up[...])} == {QuantizedWeight}
    again = Mamba2ForCausalLM.from_pretrained(folder)
    again.quantize(kind)
    assert same_arrays(again, model)
    assert again.config == model.config


@pytest.mark.parametrize("kind", TYPES)
def test_numbers_are_those_of_the_dequantized_model(loaded, kind):
    model, floats = loaded(kind), fresh(loaded(kind))
    floats.dequantize()
    assert floats.config.quantization is None
    got, want = model(IDS, labels=IDS), floats(IDS, labels=IDS)
    assert relative(got.logits, want.logits) < 1e-5
    steps = model(IDS[:, :4])
    for token in range(4, 9):
        steps = model(IDS[:, token : token + 1], cache=steps.cache)
    assert relative(steps.logits[:, 0], got.logits[:, -1]) < 1e-5
    options = {"max_new_tokens": 6}
    assert np.array_equal(generate(model, IDS, **options).tokens, generate(floats, IDS, **options).tokens)


@pytest.mark.parametrize("kind", TYPES)
def test_files_hold_the_same_bytes_and_come_back(folder, loaded, kind, tmp_path):
    model = loaded(kind)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization"] == kind
    again = Mamba2ForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype == jnp.float32
    assert same_arrays(again, model)
    assert same_arrays(Mamba2ForCausalLM.from_pretrained(tmp_path / "saved", quantize=kind), model)
    convert(folder, tmp_path / "converted", quantize=kind, max_shard_size="20KB")
    for file in sorted((tmp_path / "saved").iterdir()):
        assert file.read_bytes() == (tmp_path / "converted" / file.name).read_bytes(), file.name
    convert(tmp_path / "saved", tmp_path / "floats", dtype="float32")
    floats = fresh(model)
    floats.dequantize()
    assert same_arrays(Mamba2ForCausalLM.from_pretrained(tmp_path / "floats"), floats)
    bare = Mamba2Model.from_pretrained(tmp_path / "saved")
    assert relative(bare(IDS).last_hidden_state, model.backbone(IDS).last_hidden_state) < 1e-6


def test_broken_files_are_refused(loaded, tmp_path):
    loaded("int8").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(one for one in tensors if one.endswith("out_proj.weight.values")).removesuffix(".values")
    for changes, message in (
        ({f"{name}.values": tensors[f"{name}.values"].view(np.uint8)}, "is U8, want I8"),
        ({f"{name}.values": tensors[f"{name}.values"].astype(np.float32)}, "is F32, want I8"),
        ({f"{name}.scales": tensors[f"{name}.scales"] * np.nan}, "NaN or infinite values"),
        ({f"{name}.scales": tensors[f"{name}.scales"][:, [0, 0]]}, "has shape .*the config wants"),
        ({f"{name}.scales": None}, f"'{name}.scales' is missing"),
    ):
        save_file({key: value for key, value in (tensors | changes).items() if value is not None}, file)
        with pytest.raises(ValueError, match=message):
            Mamba2ForCausalLM.from_pretrained(tmp_path)


def test_loading_needs_the_quantized_model_and_two_tensors(tmp_path):
    config = Mamba2Config(
        hidden_size=512, num_hidden_layers=6, num_heads=16, head_dim=64, n_groups=1, vocab_size=2048
    )
    random_jax_model(config).save_pretrained(tmp_path)
    tracemalloc.start()
    arrays, _ = load_weights(tmp_path, config, quantize="int8")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    held = sum(array.nbytes for array in arrays.values())
    largest = 4 * 2 * 1024 * 512  # the float32 rows of z and x
    assert config.num_parameters() * 4 > 3.5 * held
    assert peak < held + 2 * largest


def test_a_text_for_calibration_keeps_the_numbers_on_it(folder, loaded):
    floats, model = Mamba2ForCausalLM.from_pretrained(folder), Mamba2ForCausalLM.from_pretrained(folder)
    model.quantize("int4", calibration=IDS)
    want = floats(IDS).logits
    assert relative(model(IDS).logits, want) < 0.7 * relative(loaded("int4")(IDS).logits, want)
    arrays = loaded("int4")._arrays()
    assert list(model._arrays()) == list(arrays)
    for path, array in model._arrays().items():
        assert array.shape == arrays[path].shape
        assert array.dtype == arrays[path].dtype
        if "experts" in path or "embeddings" in path or "lm_head" in path:
            assert np.array_equal(array, arrays[path])  # rounded to nearest


def test_adapters_are_trained_on_quantized_weights(loaded, tmp_path):
    targets = ("in_proj", "out_proj", "q_proj", "lm_head", "embeddings")
    config = LoraConfig(rank=2, targets=targets)
    model, floats = fresh(loaded("int4")), fresh(loaded("int4"))
    floats.dequantize()
    for one in (model, floats):
        add_lora(one, config, rngs=nnx.Rngs(0))
        rng = np.random.default_rng(0)
        for _, leaf in nnx.to_flat_state(state := nnx.state(one, lora_filter())):
            leaf.set_value(jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32))
        nnx.update(one, state)

    def gradients(model):
        structure, trained, frozen = split_model(model)

        def loss(trained):
            return structure.merge(trained, frozen)(IDS, labels=IDS).loss

        return jax.jit(jax.grad(jax.checkpoint(loss)))(trained)

    got, want = gradients(model), gradients(floats)
    assert got.keys() == want.keys()
    for path in got:
        assert "lora" in path
        assert relative(got[path], want[path]) < 1e-4, path
    save_lora(model, tmp_path / "adapter")
    again = fresh(loaded("int4"))
    load_lora(again, tmp_path / "adapter")
    assert relative(again(IDS).logits, model(IDS).logits) < 1e-6
    with pytest.raises(ValueError, match=r"merge_lora: the weights are int4.*dequantize\(\)"):
        merge_lora(model)
    model.dequantize()
    merge_lora(model)
    assert relative(model(IDS).logits, floats(IDS).logits) < 1e-4


def test_what_quantized_weights_cannot_do_says_so(loaded, folder, tmp_path):
    model = loaded("int8")
    with pytest.raises(ValueError, match="the weights are int8, which cannot be trained; add_lora"):
        split_model(model)
    with pytest.raises(ValueError, match="resize_vocabulary: the weights are int8"):
        model.resize_vocabulary(100)
    with pytest.raises(ValueError, match="save_pretrained: dtype='float32', but the weights are int8"):
        model.save_pretrained(tmp_path / "x", dtype="float32")
    with pytest.raises(NotImplementedError, match="quantization=int8"):
        model.save_pretrained(tmp_path / "x", format="state-spaces")
    with pytest.raises(ValueError, match="quantize='int4', but the weights are int8 already"):
        model.quantize("int4")
    with pytest.raises(ValueError, match="quantize='int5' is not one of 'int8', 'int4'"):
        Mamba2ForCausalLM.from_pretrained(folder, quantize="int5")
    with pytest.raises(ValueError, match="modules_to_save: lm_head.weight is quantized"):
        add_lora(fresh(model), LoraConfig(modules_to_save=("lm_head",)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="quantization={'bits': 4}, wants None or 'int8' or 'int4'"):
        Mamba2Config.from_dict(FILE | {"quantization": {"bits": 4}})
    broken = random_jax_model(Mamba2Config.from_dict(FILE))
    broken.backbone.layers[0].mixer.out_proj.weight.set_value(jnp.full((64, 32), jnp.nan))
    broken.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match="2048 NaN or infinite values, which int8 cannot hold"):
        Mamba2ForCausalLM.from_pretrained(tmp_path / "nan", quantize="int8")


def test_the_command_line(tmp_path, capsys):
    target, prompt = str(tmp_path / "int4"), ["import os\n", "--max-new-tokens", "8"]
    assert cli.main(["convert", str(EMBEDDED_MODEL), target, "--quantize", "int4"]) == 0
    assert cli.main(["info", target]) == 0
    out = capsys.readouterr().out
    assert "quantized, int4" in out
    assert "weights in int4" in out
    model = Mamba2ForCausalLM.from_pretrained(target)
    add_lora(model, LoraConfig(targets=("in_proj",)), rngs=nnx.Rngs(0))
    save_lora(model, tmp_path / "adapter", base_model=target)
    texts = []
    for options in (["--model", target], ["--quantize", "int4"], ["--adapter", str(tmp_path / "adapter")]):
        assert cli.main(["generate", *prompt, *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    merged = str(tmp_path / "merged")
    (tmp_path / "text.py").write_text("import os\n\n\ndef main():\n    return os.getcwd()\n")
    calibrated = ["--quantize", "int8", "--calibration", str(tmp_path / "text.py")]
    assert cli.main(["convert", str(EMBEDDED_MODEL), str(tmp_path / "int8"), *calibrated]) == 0
    assert Mamba2Config.from_pretrained(tmp_path / "int8").quantization == "int8"
    assert cli.main(["convert", str(tmp_path / "adapter"), merged]) == 0
    assert "int4 weights become floats" in capsys.readouterr().err
    assert Mamba2Config.from_pretrained(merged).quantization is None
    with pytest.raises(cli.CommandError, match="--quantize int8: is for"):
        cli.Convert(target, merged, quantize="int8", dtype="float32").run()


def test_finetune_trains_adapters_on_quantized_weights(tmp_path, capsys):
    run = tmp_path / "run"
    options = (
        f"finetune --model {model_folder()} --data {texts_file()} --output {run} --steps 4 --batch-size 2 "
        "--data.max-length 48 --no-progress --no-tensorboard --remat block --optim.learning-rate 0.01"
    ).split()
    assert cli.main([*options, "--quantize", "int4"]) == 2
    assert "the weights are int4, which cannot be trained" in capsys.readouterr().err
    assert cli.main([*options, "--quantize", "int4", "--lora.rank", "2", "--lora.targets", "in_proj"]) == 0
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {name.rpartition("in_proj.")[2] for name in saved} == {"lora_A.weight", "lora_B.weight"}
    assert all(np.abs(array).max() > 0 for array in saved.values())  # B begins at 0
    model = Mamba2ForCausalLM.from_pretrained(model_folder(), quantize="int4")
    load_lora(model, run / "adapter")
    model.dequantize()
    merge_lora(model)
    # The checkpoint of the run becomes a model of floats: the dequantized base with the adapter merged.
    assert cli.main(["convert", str(run), str(tmp_path / "merged")]) == 0
    merged = Mamba2ForCausalLM.from_pretrained(tmp_path / "merged")
    assert same_arrays(merged, model)
