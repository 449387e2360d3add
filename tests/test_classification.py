"""Classifiers and pooled embeddings: transformers' numbers and files, padding, losses, training."""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import SIZES, checkpoint, jax_model, random_ids, relative

from mamba2_jax import Mamba2ForCausalLM, Mamba2ForSequenceClassification, Mamba2Model, embed
from mamba2_jax.lora import LoraConfig, add_lora
from mamba2_jax.weights import CheckpointError

TOLERANCE = 1e-5  # float32 sums in another order
NAMES = ("bad", "so-so", "good")


@functools.cache
def torch_class(family: str = "Mamba2"):
    """Build the classifier that transformers would have, from its generic one, as it does for Jamba."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_layers import GenericForSequenceClassification
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Output

    Mamba2Output.attentions = None  # which the generic class passes on
    base = getattr(transformers, f"{family}PreTrainedModel")
    prefix = {"Mamba2": "backbone", "Bamba": "model"}[family]
    name = f"{family}ForSequenceClassification"
    return type(name, (GenericForSequenceClassification, base), {"base_model_prefix": prefix})


@pytest.fixture(scope="module")
def theirs():
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    names = dict(enumerate(NAMES))
    config = transformers.Mamba2Config(**SIZES, id2label=names, label2id={v: k for k, v in names.items()})
    return torch_class()(config).eval()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return Mamba2ForSequenceClassification.from_pretrained(folder)


@pytest.fixture(scope="module")
def batch():
    ids, mask = random_ids(3, 20), np.ones((3, 20), int)
    mask[0, 14:] = mask[2, 19:] = 0
    return np.where(mask, ids, SIZES["pad_token_id"]), mask


class TestNumbers:
    def test_scores_and_losses_of_transformers(self, theirs, ours, batch):
        torch = pytest.importorskip("torch")
        ids, mask = batch
        ours = nnx.clone(ours)
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        cases = [
            ("single_label_classification", np.array([2, 0, 1])),
            ("multi_label_classification", np.eye(3, dtype=np.float32)),
            ("regression", np.linspace(-1, 1, 9, dtype=np.float32).reshape(3, 3)),
        ]
        for problem, labels in cases:
            theirs.config.problem_type = ours.problem_type = problem
            with torch.no_grad():
                want = theirs(**inputs, labels=torch.tensor(labels))
            got = ours(ids, mask, labels=labels)
            assert relative(got.logits, want.logits) < TOLERANCE
            assert relative(got.loss, want.loss) < TOLERANCE
        ours.problem_type = None
        for _, labels in cases[:2]:
            theirs.config.problem_type = None
            with torch.no_grad():
                want = theirs(**inputs, labels=torch.tensor(labels)).loss
            assert relative(ours(ids, mask, labels=labels).loss, want) < TOLERANCE

    def test_padding_at_either_end_changes_nothing(self, ours, batch):
        ids, mask = batch
        logits = ours(ids, mask).logits
        left = np.stack([np.roll(row, 20 - valid.sum()) for row, valid in zip(ids, mask, strict=True)])
        assert relative(ours(left, np.sort(mask, axis=1)).logits, logits) < TOLERANCE
        assert relative(ours(ids[:1, :14]).logits, logits[:1]) < TOLERANCE

    def test_a_text_in_two_pieces(self, ours, batch):
        ids, mask = batch
        cache = ours(ids[:, :9]).cache
        assert relative(ours(ids[:, 9:], mask[:, 9:], cache).logits, ours(ids, mask).logits) < TOLERANCE

    def test_an_ignored_label_is_not_in_the_loss(self, ours, batch):
        ids, mask = batch
        both = ours(ids[:2], mask[:2], labels=np.array([1, 2])).loss
        assert relative(ours(ids, mask, labels=np.array([1, 2, -100])).loss, both) < TOLERANCE


class TestFiles:
    def test_labels_by_name(self, ours):
        assert ours.label_names == NAMES
        assert (ours.num_labels, ours.problem_type) == (3, None)

    def test_transformers_loads_what_is_saved(self, ours, batch, tmp_path):
        torch = pytest.importorskip("torch")
        ids, mask = batch
        named = nnx.clone(ours)
        named.problem_type = "single_label_classification"
        named.save_pretrained(tmp_path / "saved")
        again = Mamba2ForSequenceClassification.from_pretrained(tmp_path / "saved")
        assert (again.label_names, again.problem_type) == (NAMES, "single_label_classification")
        want = ours(ids, mask).logits
        assert (again(ids, mask).logits == want).all()
        model, report = torch_class().from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert model.config.architectures == ["Mamba2ForSequenceClassification"]
        assert model.config.id2label == dict(enumerate(NAMES))
        with torch.no_grad():
            got = model.eval()(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
        assert relative(got, want) < TOLERANCE

    def test_a_language_model_gets_a_new_head(self, batch):
        model = Mamba2ForSequenceClassification.from_pretrained(checkpoint(), num_labels=5)
        assert model.score.weight.shape == (32, 5)
        assert model.label_names[4] == "LABEL_4"
        other = Mamba2ForSequenceClassification.from_pretrained(checkpoint(), num_labels=5, rngs=nnx.Rngs(1))
        assert relative(model(*batch).logits, other(*batch).logits) > 0.1
        want = jax_model().backbone(*batch).last_hidden_state
        assert (model.backbone(*batch).last_hidden_state == want).all()

    def test_the_backbone_of_a_classifier(self, folder, ours, batch):
        notes = []
        model = Mamba2Model.from_pretrained(folder, report=lambda report: notes.extend(report.notes))
        assert any("score.weight is not used" in note for note in notes)
        want = ours.backbone(*batch).last_hidden_state
        assert (model(*batch).last_hidden_state == want).all()
        with pytest.raises(CheckpointError, match=r"lm_head.weight' is missing"):
            Mamba2ForCausalLM.from_pretrained(folder)

    def test_another_number_of_labels_than_in_the_files(self, folder):
        with pytest.raises(CheckpointError, match=r"score.weight.* the config wants \(4, 32\)"):
            Mamba2ForSequenceClassification.from_pretrained(folder, num_labels=4)
        renamed = Mamba2ForSequenceClassification.from_pretrained(folder, label_names=("a", "b", "c"))
        assert renamed.label_names == ("a", "b", "c")


def test_a_family_has_the_same_head(batch, tmp_path):
    torch = pytest.importorskip("torch")
    import family_models
    import transformers

    torch.manual_seed(0)
    config = transformers.BambaConfig(**family_models.VARIANTS["bamba"][1], num_labels=3)
    theirs = torch_class("Bamba")(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Mamba2ForSequenceClassification.from_pretrained(tmp_path / "theirs")
    ids, mask = batch[0] % 64, batch[1]
    ids = np.where(mask, np.maximum(ids, 1), 0)  # 0 is the id of the padding
    with torch.no_grad():
        want = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
    assert relative(ours(ids, mask).logits, want) < TOLERANCE
    ours.save_pretrained(tmp_path / "ours")
    again, report = torch_class("Bamba").from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (again.score.weight == theirs.score.weight).all()


def test_training_with_an_optimizer_and_adapters(batch):
    ids, mask = batch
    model = Mamba2ForSequenceClassification.from_pretrained(checkpoint(), label_names=NAMES)
    add_lora(model.backbone, LoraConfig(rank=4, targets=("in_proj", "out_proj")), rngs=nnx.Rngs(0))
    trained = nnx.Any(nnx.LoRAParam, nnx.PathContains("score"))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=trained)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return model(ids, mask, labels=jnp.array([2, 0, 1])).loss

        value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, trained))(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0]
    assert model(ids, mask).logits.argmax(1).tolist() == [2, 0, 1]


class TestEmbeddings:
    @pytest.mark.parametrize("pooling", ["last", "mean"])
    def test_padding_changes_nothing(self, batch, pooling):
        ids, mask = batch
        model = jax_model()
        vectors = embed(model, ids, mask, pooling=pooling)
        hidden = model.backbone(ids, mask).last_hidden_state
        for row in range(3):
            valid = hidden[row, : mask[row].sum()]
            assert relative(vectors[row], valid[-1] if pooling == "last" else valid.mean(0)) < TOLERANCE
        left = np.stack([np.roll(row, 20 - valid.sum()) for row, valid in zip(ids, mask, strict=True)])
        moved = embed(model.backbone, left, np.sort(mask, axis=1), pooling=pooling)
        assert relative(moved, vectors) < TOLERANCE

    def test_normalized_and_without_a_mask(self, batch):
        vectors = embed(jax_model(), batch[0], normalize=True)
        assert np.allclose(jnp.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        assert (
            relative(embed(jax_model(), batch[0], np.ones((3, 20), int), normalize=True), vectors) < TOLERANCE
        )
        assert embed(jax_model("bfloat16"), batch[0], pooling="mean").dtype == jnp.float32

    def test_an_unknown_pooling(self):
        with pytest.raises(ValueError, match="embed: pooling='first' is not one of 'last', 'mean'"):
            embed(jax_model(), [[1, 2]], pooling="first")


class TestMistakes:
    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (np.array([0, 1]), "labels has shape"),
            (np.array([0, 1, 3]), "label 3 lies outside 0..2"),
            (np.ones((3, 2), np.float32), "labels has shape"),
        ],
    )
    def test_labels(self, ours, batch, labels, message):
        with pytest.raises(ValueError, match=message):
            ours(*batch, labels=labels)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_labels": 0}, "num_labels=0, wants a positive"),
            ({"num_labels": 2, "label_names": NAMES}, "num_labels=2, but 3 label_names"),
            ({"label_names": ("a", "a")}, "wants different texts"),
            ({"problem_type": "ranking"}, "problem_type='ranking' is not one of"),
        ],
    )
    def test_options(self, ours, options, message):
        with pytest.raises(ValueError, match=message):
            Mamba2ForSequenceClassification(ours.config, **options, rngs=nnx.Rngs(0))
