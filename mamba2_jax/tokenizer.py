"""Tokenizers of checkpoints, and the special ids that generation goes by.

>>> tokenizer = load_tokenizer()  # the embedded model's
>>> tokenizer.decode(tokenizer("def add(a, b):")["input_ids"])
'def add(a, b):'
"""

import dataclasses
import json
import pathlib
import shutil
import tempfile
from typing import TYPE_CHECKING

from mamba2_jax import hub
from mamba2_jax.config import Mamba2Config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SpecialTokenIds", "load_tokenizer", "special_token_ids"]

_TOKENIZER_FILES = [
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.json", "merges.txt", "config.json"),
]


@dataclasses.dataclass(frozen=True)
class SpecialTokenIds:
    """The ids that start, end and fill up a row.

    Args:
        bos: beginning of a text, or None.
        eos: every id that ends a text, possibly none.
        pad: what fills a row up; always an id, of the end of text when there is no padding token.
        notes: sentences about ids of the config that were overruled, to be shown to the user.
    """

    bos: int | None
    eos: tuple[int, ...]
    pad: int
    notes: tuple[str, ...] = ()


def load_tokenizer(
    path: str | pathlib.Path | None = None, revision: str | None = None
) -> "PreTrainedTokenizerBase":
    """Load the tokenizer in a checkpoint's folder through transformers.

    Reads `tokenizer.json` (GPT-NeoX's, the embedded one, Codestral's) and the sentencepiece models
    `tokenizer.model` and `tokenizer.model.v*`.

    Args:
        path: a folder or a hub id; None: the embedded model.
        revision: branch, tag or commit on the hub.

    Returns:
        A transformers tokenizer.

    Raises:
        FileNotFoundError: no such folder, or no tokenizer in it.
        ValueError: the tokenizer's files are broken; the message names the folder.
    """
    folder = hub.resolve_folder(path, revision, allow_patterns=_TOKENIZER_FILES)
    sentencepiece_models = sorted(folder.glob("tokenizer.model*"))
    has_json = (folder / "tokenizer.json").is_file()
    has_vocabulary = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not (has_json or has_vocabulary or sentencepiece_models):
        raise FileNotFoundError(
            f"{folder}: no tokenizer in it (tokenizer.json or tokenizer.model*). The state-spaces "
            "checkpoints come without one and use GPT-NeoX's: load_tokenizer('EleutherAI/gpt-neox-20b'), or a folder "
            "with its tokenizer.json"
        )
    try:
        if has_json or has_vocabulary:
            return _load_from_json(folder)
        return _load_from_sentencepiece(sentencepiece_models[-1])  # the newest of v1, v2, v3
    except Exception as error:  # the Rust library below raises plain Exception on a broken file
        raise ValueError(
            f"{folder}: its tokenizer cannot be loaded ({type(error).__name__}: {error}); download it again"
        ) from error


def _load_from_json(folder: pathlib.Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = folder / "tokenizer_config.json"
    named = settings.is_file() and "tokenizer_class" in json.loads(settings.read_text(encoding="utf-8"))
    if named or not (folder / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # Without a named class AutoTokenizer goes by model_type and rebuilds the vocabulary with GPT-NeoX's
    # splitting rules, whatever tokenizer.json says; so take the file as it is.
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _load_from_sentencepiece(file: pathlib.Path) -> "PreTrainedTokenizerBase":
    """Convert a sentencepiece model of the Llama and Mistral family."""
    import sentencepiece
    from transformers import AutoTokenizer

    sentencepiece.SentencePieceProcessor(model_file=str(file))  # raises on a broken file, where the
    # conversion below would go on to try other formats and hide the cause
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        # transformers recognises a sentencepiece model by its name, and `tokenizer.model.v3` is not it.
        shutil.copyfile(file, folder / "tokenizer.model")
        settings = file.parent / "tokenizer_config.json"
        content = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        content["tokenizer_class"] = "LlamaTokenizer"
        (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
        (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def special_token_ids(tokenizer: "PreTrainedTokenizerBase", config: Mamba2Config) -> SpecialTokenIds:
    """Choose the special ids of a tokenizer and a config that belong together.

    The tokenizer's ids win: published configs are known to be wrong about them (Codestral's says 0 for all
    three, its tokenizer 1 and 2). Several end ids in the config stay when the tokenizer's is among them.

    Args:
        tokenizer: of `load_tokenizer`.
        config: of the model.

    Returns:
        The ids, with a note for each id of the config that was overruled.

    Raises:
        ValueError: the tokenizer knows ids that the model has no embedding for.
    """
    num_tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    if num_tokens > config.vocab_size:
        raise ValueError(
            f"special_token_ids: the tokenizer has {num_tokens} ids, the model's vocab_size is "
            f"{config.vocab_size}; they do not belong together, load the tokenizer of this checkpoint"
        )
    notes = []

    def choose(name: str, theirs: int | None) -> int | None:
        ours = _token_id(tokenizer, name)
        if ours is not None and theirs is not None and ours != theirs:
            notes.append(f"{name}: the config says {theirs}, the tokenizer {ours}; using {ours}")
        return theirs if ours is None else ours

    bos = choose("bos_token_id", config.bos_token_id)
    eos, own_eos = config.eos_token_ids, _token_id(tokenizer, "eos_token_id")
    if own_eos is not None and own_eos not in eos:
        if eos:
            notes.append(
                f"eos_token_id: the config says {config.eos_token_id}, the tokenizer {own_eos}; using {own_eos}"
            )
        eos = (own_eos,)
    if eos and _token_id(tokenizer, "pad_token_id") is None:
        pad = eos[0]
    else:
        pad = choose("pad_token_id", config.pad_token_id)
    return SpecialTokenIds(bos=bos, eos=eos, pad=0 if pad is None else pad, notes=tuple(notes))


def _token_id(tokenizer: "PreTrainedTokenizerBase", name: str) -> int | None:
    token_id = getattr(tokenizer, name)
    return token_id if isinstance(token_id, int) else None
