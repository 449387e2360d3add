"""Text in pieces: whole characters, stop strings across tokens, the same text as `generate`."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from models import SIZES, random_jax_model

from mamba2_jax import Mamba2Config, Mamba2ForCausalLM, generate, load_tokenizer, stream
from mamba2_jax.generation import PromptLookup
from mamba2_jax.generation.streaming import TextStream
from mamba2_jax.generation.text import REPLACEMENT, IncrementalDecoder

PROMPT = "def fibonacci(n):\n"


@pytest.fixture(scope="module")
def model():
    return Mamba2ForCausalLM.from_pretrained(dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "top_k": 50, "key": jax.random.key(5)}], ids=str
)
def test_pieces_make_up_what_generate_writes(model, tokenizer, options):
    pieces = stream(model, tokenizer, PROMPT, max_new_tokens=30, eos_token_id=(), **options)
    text = "".join(pieces)
    new = generate(
        model,
        [tokenizer.encode(PROMPT)],
        max_new_tokens=30,
        eos_token_id=(),
        vocab_size=len(tokenizer),
        **options,
    )
    assert text == tokenizer.decode(new.tokens[0], skip_special_tokens=True)
    assert (pieces.num_tokens, pieces.finish_reason) == (30, "length")


def test_it_goes_on_from_a_cache(model, tokenizer):
    ids = tokenizer.encode(PROMPT + "    return n")
    cache = model([ids[:-3]]).cache
    tail = tokenizer.decode(ids[-3:])
    assert tokenizer.encode(tail) == ids[-3:]
    whole = "".join(stream(model, tokenizer, PROMPT + "    return n", max_new_tokens=12))
    assert "".join(stream(model, tokenizer, tail, max_new_tokens=12, cache=cache)) == whole


def test_the_end_of_text_token_ends_it_and_is_not_shown(model, tokenizer):
    free = generate(model, [tokenizer.encode(PROMPT)], max_new_tokens=8, eos_token_id=()).tokens[0].tolist()
    end = free.index(free[5])
    pieces = stream(model, tokenizer, PROMPT, max_new_tokens=30, eos_token_id=free[5])
    assert "".join(pieces) == tokenizer.decode(free[:end])
    assert (pieces.num_tokens, pieces.finish_reason) == (end + 1, "eos")


UNICODE = "naïve café — 漢字かな交じり文 👩‍👩‍👧 e\u0301 ✓\n\tend"


@pytest.mark.parametrize("text", [UNICODE, "👍" * 5, "plain"])
def test_no_piece_splits_a_character(tokenizer, text):
    ids = tokenizer.encode(text)
    assert text == "plain" or len(ids) > len(
        text
    )  # several tokens a character, so there is something to split
    decoder = IncrementalDecoder(tokenizer, tokenizer.encode("x = "))
    pieces = [decoder.push(token) for token in ids]
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == text


def test_bytes_that_never_become_a_character_come_out_at_the_end(tokenizer):
    ids = tokenizer.encode("ok 漢")[:-1]
    decoder = IncrementalDecoder(tokenizer)
    text = "".join(decoder.push(token) for token in ids)
    assert text.rstrip() == "ok"
    assert text + decoder.flush() == tokenizer.decode(ids)
    assert tokenizer.decode(ids).endswith(REPLACEMENT)


def streamed(tokenizer, text: str, stop: tuple[str, ...]):
    """A stream over a given text instead of a model's."""
    source = SimpleNamespace(blocks=lambda: iter([[token] for token in tokenizer.encode(text)]))
    return TextStream(source, tokenizer, tokenizer.encode("# "), stop, (0,))


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("def f():\n    pass\n\n\ndef g():", ("\n\n\n",), "def f():\n    pass"),
        ("one two three", ("two thr", "e t"), "on"),
        ("one two three", ("zzz",), "one two three"),
        ("abcabcabd", ("abd",), "abcabc"),
        ("ends with the beginning of a st", ("stop",), "ends with the beginning of a st"),
        ("stop at once", ("stop",), ""),
    ],
)
def test_stop_strings_end_the_text_and_are_no_part_of_it(tokenizer, text, stop, want):
    pieces = streamed(tokenizer, text, stop)
    got = list(pieces)
    assert "".join(got) == want
    assert all(got)
    assert pieces.finish_reason == ("length" if want == text else "stop")


def test_text_is_not_held_back_longer_than_a_stop_string_needs(tokenizer):
    pieces = streamed(tokenizer, "x = 1\ny = 2\n", ("\n\n",))
    first = next(pieces)
    assert first
    assert pieces.num_tokens == 1


class TestOptionsOfGenerate:
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, tokenizer):
        return random_jax_model(Mamba2Config(**SIZES | {"vocab_size": len(tokenizer), "eos_token_id": 0}))

    options = {"temperature": 0.9, "key": jax.random.key(5), "eos_token_id": ()}

    def whole(self, model, tokenizer, **options):
        return generate(model, [tokenizer.encode(PROMPT)], vocab_size=len(tokenizer), **options)

    def test_a_draft_writes_generate_s_text_and_tells_its_passes(self, model, tokenizer):
        options = {"max_new_tokens": 20, "draft": PromptLookup(), "return_logprobs": True, **self.options}
        pieces = stream(model, tokenizer, PROMPT, **options)
        text = "".join(pieces)
        new = self.whole(model, tokenizer, **options)
        assert pieces.tokens == new.tokens[0].tolist()
        assert text == tokenizer.decode(pieces.tokens)
        assert [pieces.passes] == new.passes.tolist()
        np.testing.assert_allclose(pieces.logprobs, new.logprobs[0], atol=1e-4)

    def test_beams_and_the_best_of_several_come_as_a_whole(self, model, tokenizer):
        beams = {"max_new_tokens": 6, "num_beams": 2, "eos_token_id": ()}
        pieces = stream(model, tokenizer, PROMPT, **beams)
        assert pieces.comes_whole
        text = "".join(pieces)
        assert text == tokenizer.decode(self.whole(model, tokenizer, **beams).tokens[0])
        cut = stream(model, tokenizer, PROMPT, stop=text[3:5], **beams)
        assert "".join(cut) == text[: text.index(text[3:5])]
        assert cut.finish_reason == "stop"
        assert cut.cache.position.tolist() == [len(cut.prompt_ids) + cut.num_tokens]
        best = stream(model, tokenizer, PROMPT, max_new_tokens=6, best_of=2, **self.options)
        assert best.comes_whole
        assert "".join(best) == tokenizer.decode(best.tokens)
        assert best.num_tokens == 6

    def test_messages_are_answered_under_the_chat_template(self, model):
        tokenizer = load_tokenizer()
        messages = [{"role": "user", "content": "import os"}]
        with pytest.raises(ValueError, match="no chat template"):
            stream(model, tokenizer, messages, max_new_tokens=1)
        tokenizer.chat_template = "{% for m in messages %}# {{ m.content }}<|endoftext|>{% endfor %}"
        pieces = stream(model, tokenizer, messages, max_new_tokens=1)
        assert pieces.prompt_ids == tokenizer.encode("# import os<|endoftext|>")
        assert pieces.prompt_ids[-1] == tokenizer.eos_token_id

    def test_what_makes_no_stream_is_told(self, model, tokenizer):
        with pytest.raises(TypeError, match="^stream: there is no option 'temprature'; .* temperature"):
            stream(model, tokenizer, PROMPT, max_new_tokens=2, temprature=1.0)


BAD = {
    "several texts": ({"num_return_sequences": 2}, "num_return_sequences=2: a stream is one text"),
    "embeddings": ({"inputs_embeds": 0}, "inputs_embeds: a stream continues a text"),
    "beams and sampling": ({"num_beams": 2, "temperature": 1.0}, "num_beams=2 does not go with temperature"),
    "empty prompt": ({"prompt": ""}, "prompt is empty"),
    "prompt kind": ({"prompt": [1, 2]}, "prompt must be a string"),
    "no messages": ({"prompt": []}, "prompt must be a string, or messages"),
    "stop": ({"stop": [""]}, "stop=.* must be non-empty"),
    "budget": ({"max_new_tokens": 0}, "max_new_tokens=0"),
    "key": ({"temperature": 1.0}, "needs key"),
    "top_p": ({"temperature": 1.0, "top_p": 2.0}, "top_p=2.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named_at_the_call(model, tokenizer, name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=f"^stream: .*{message}"):
        stream(model, tokenizer, **{"prompt": PROMPT, "max_new_tokens": 2, **change})
