"""Load the tokenizer of a checkpoint and choose the special token ids for generation.

>>> tokenizer = load_tokenizer()  # the embedded model's
>>> tokenizer.decode(tokenizer("def add(a, b):")["input_ids"])
'def add(a, b):'
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from mamba2_jax import hub
from mamba2_jax.config import Mamba2Config
from mamba2_jax.files import TOKENIZER_FILES

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = ["SpecialTokenIds", "load_tokenizer", "special_token_ids", "token_bytes", "train_tokenizer"]

_END, _PAD = "<|endoftext|>", "<|pad|>"


@dataclasses.dataclass(frozen=True)
class SpecialTokenIds:
    """Special token ids of a model: beginning of text, end of text and padding.

    Args:
        bos: beginning of a text, or None.
        eos: every id that ends a text; may be empty.
        pad: padding id, never None: the first `eos` id when the tokenizer has no padding token, and 0 when
            nothing defines one.
        notes: messages for the user, one for each config id that the tokenizer overrides.
    """

    bos: int | None
    eos: tuple[int, ...]
    pad: int
    notes: tuple[str, ...] = ()


def load_tokenizer(
    path: str | pathlib.Path | None = None, revision: str | None = None
) -> "PreTrainedTokenizerBase":
    """Load a checkpoint's tokenizer as a transformers tokenizer.

    Reads `tokenizer.json` (GPT-NeoX, the embedded model, Codestral), else `vocab.json` with `merges.txt`,
    else a sentencepiece model (`tokenizer.model`, `tokenizer.model.v*`).

    Args:
        path: a folder or a hub id; None: the embedded model.
        revision: branch, tag or commit on the hub.

    Returns:
        A transformers tokenizer.

    Raises:
        FileNotFoundError: no such folder, or no tokenizer in it.
        ValueError: the tokenizer files are broken; the message names the folder.
    """
    folder = hub.resolve_folder(path, revision, allow_patterns=(*TOKENIZER_FILES, "config.json"))
    sentencepiece_models = sorted(folder.glob("tokenizer.model*"))
    has_json = (folder / "tokenizer.json").is_file()
    has_vocabulary = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not (has_json or has_vocabulary or sentencepiece_models):
        raise FileNotFoundError(
            f"{folder}: no tokenizer in it (tokenizer.json or tokenizer.model*). The state-spaces "
            "checkpoints come without one and use GPT-NeoX's: load_tokenizer('EleutherAI/gpt-neox-20b'), "
            "--tokenizer EleutherAI/gpt-neox-20b on the command line, or a folder with its tokenizer.json"
        )
    try:
        with _without_advice():
            import transformers  # noqa: F401
        if has_json:
            return _load_from_json(folder)
        if has_vocabulary:
            return _load_from_vocabulary(folder)
        return _load_from_sentencepiece(sentencepiece_models[-1])  # the newest of v1, v2, v3
    except Exception as error:  # the Rust library below raises plain Exception on a broken file
        raise ValueError(
            f"{folder}: its tokenizer cannot be loaded ({type(error).__name__}: {error}); download it again"
        ) from error


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Drop the message that transformers logs when it is imported without PyTorch; tokenizers need none."""
    logger = logging.getLogger("transformers")

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("PyTorch was not found")

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _load_from_json(folder: pathlib.Path) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    # Not AutoTokenizer (5.23): it picks a class by tokenizer_class or model_type and puts that class's
    # pre-tokenizer around the vocabulary: with Codestral's LlamaTokenizer "  x" loses one of its spaces.
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _load_from_vocabulary(folder: pathlib.Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _load_from_sentencepiece(file: pathlib.Path) -> "PreTrainedTokenizerBase":
    """Convert a sentencepiece BPE model of the Llama and Mistral family; the suffix `.v3` is Mistral's."""
    import sentencepiece
    from transformers import PreTrainedTokenizerFast

    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    backend = _sentencepiece_backend(processor)
    probe = "  def f(x):\n\treturn x**12  # \ufb01 \u00e9\u6c49 \U0001f600 \uff21 "
    if backend.encode(probe, add_special_tokens=False).ids != processor.encode(probe):
        raise ValueError(
            "not a byte-pair model with a leading space and no other normalisation, as Mistral's are; "
            "convert it to tokenizer.json"
        )
    names = {
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "unk_token": processor.unk_id(),
    }
    special = {name: processor.id_to_piece(index) for name, index in names.items() if index >= 0}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", name_or_path=str(file.parent), **special
    )


def _sentencepiece_backend(processor: Any) -> "Tokenizer":
    """Build the tokenizer: leading space, BPE merges ranked by score, byte fallback, bos token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces = [processor.id_to_piece(index) for index in range(processor.vocab_size())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    plain = {
        piece
        for index, piece in enumerate(pieces)
        if not (processor.is_control(index) or processor.is_unknown(index) or processor.is_byte(index))
    }
    # sentencepiece merges the pair whose union scores best: all splits of the best union rank first
    ranked = sorted(plain, key=lambda piece: (-processor.get_score(vocabulary[piece]), vocabulary[piece]))
    merges = [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in plain and piece[cut:] in plain
    ]
    unknown = processor.id_to_piece(processor.unk_id())
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    controls = [piece for index, piece in enumerate(pieces) if processor.is_control(index)]
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in controls])
    if processor.bos_id() >= 0:
        bos = processor.id_to_piece(processor.bos_id())
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, processor.bos_id())]
        )
    return backend


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerBase":
    """Train a byte-level BPE tokenizer: any text is encoded, and decoded to itself.

    Args:
        texts: texts to learn the merges from; read once.
        vocab_size: number of tokens at most: 256 bytes, the end of a text, padding, and merges.

    Raises:
        ValueError: `vocab_size` has no room for these.

    >>> tokenizer = train_tokenizer(["for i in range(9):"] * 9, 264)
    >>> tokenizer.decode(tokenizer("for each")["input_ids"])
    'for each'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [_END, _PAD]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(
            f"train_tokenizer: vocab_size={vocab_size} must be at least {len(alphabet) + len(special)}: the "
            f"bytes, {' and '.join(special)}"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=_END, eos_token=_END, pad_token=_PAD, padding_side="left"
    )


def token_bytes(tokenizer: "PreTrainedTokenizerBase") -> dict[int, bytes]:
    """Return the bytes that each token id adds to a text; special tokens are left out.

    Raises:
        ValueError: a tokenizer of neither byte-level nor sentencepiece's kind.
    """
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    state = {} if decoder is None else json.loads(decoder.__getstate__())
    kinds = {part["type"] for part in state.get("decoders", [state] if state else [])}
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
        raise ValueError("token_bytes: not a byte-level or sentencepiece tokenizer, whose tokens have bytes")
    added = tokenizer.added_tokens_decoder
    table = _byte_level_alphabet() if "ByteLevel" in kinds else None
    found = {}
    for token, index in tokenizer.get_vocab().items():
        if index in added:
            if not added[index].special:
                found[index] = added[index].content.encode()
        elif table is None:
            byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
            found[index] = bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
        elif all(letter in table for letter in token):
            found[index] = bytes(table[letter] for letter in token)
    return found


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte for which each letter stands in a byte-level vocabulary: GPT-2's table."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def special_token_ids(tokenizer: "PreTrainedTokenizerBase", config: Mamba2Config) -> SpecialTokenIds:
    """Merge the special token ids of a tokenizer and a model config.

    The tokenizer's ids override the config's, since published configs are known to be wrong (Codestral's says
    0 for all three, its tokenizer 1 and 2). A config list of eos ids is kept if it contains the tokenizer's.

    Args:
        tokenizer: from `load_tokenizer`.
        config: the model config.

    Returns:
        The ids, with a note for each config id that the tokenizer overrides.

    Raises:
        ValueError: the tokenizer has ids beyond the vocab_size of the model.
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
                f"eos_token_id: the config says {config.eos_token_id}, the tokenizer {own_eos}; "
                f"using {own_eos}"
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
