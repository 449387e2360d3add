"""Going on from a state: what a stream has read, bos tokens, chats with a state as history, the command."""

import builtins
import signal

import jax
import numpy as np
import pytest
from models import SIZES, random_jax_model, relative

from mamba2_jax import Mamba2Cache, Mamba2Config, Mamba2ForCausalLM, generate, load_tokenizer, stream
from mamba2_jax.cli import commands as cli
from mamba2_jax.cli.chat import _Chat, new_conversation
from mamba2_jax.cli.generate import Loaded
from mamba2_jax.generation import Conversation, PromptLookup
from mamba2_jax.generation.processors import force_tokens
from mamba2_jax.generation.text import prompt_tokens

PROMPT = "def fibonacci(n):\n"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "# {{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant\n{% endif %}"
)
TRIMMING = TEMPLATE.replace("m.content", "m.content | trim")


@pytest.fixture(scope="module")
def model():
    return Mamba2ForCausalLM.from_pretrained(dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def assert_has_read(mine: Mamba2Cache, model: Mamba2ForCausalLM, ids: list[int]) -> None:
    padded, mask = np.zeros((2, 1, 64), int)  # one length, compiled once
    padded[0, : len(ids)], mask[0, : len(ids)] = ids, 1
    want = model(padded, mask).cache
    assert mine.position.tolist() == want.position.tolist()
    for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(want), strict=True):
        assert relative(one, other) < 1e-5


class TestStream:
    @pytest.mark.parametrize("budget", [1, 4, 7])
    def test_the_state_is_that_after_exactly_what_was_read(self, model, tokenizer, budget):
        pieces = stream(model, tokenizer, PROMPT, max_new_tokens=budget, eos_token_id=())
        ids = tokenizer.encode(PROMPT)
        assert_has_read(pieces.cache, model, ids)
        for piece in pieces:
            assert piece
            assert_has_read(pieces.cache, model, ids + pieces.tokens)
        assert len(pieces.tokens) == budget
        assert_has_read(pieces.cache, model, ids + pieces.tokens)
        assert_has_read(pieces.prompt_cache, model, ids)

    def test_a_stop_string_and_an_end_leave_the_state_after_their_tokens(self, model, tokenizer):
        ids = tokenizer.encode(PROMPT)
        free = stream(model, tokenizer, PROMPT, max_new_tokens=12, eos_token_id=())
        text = "".join(free)
        stop = text[len(tokenizer.decode(free.tokens[:6])) :][:2]
        stopped = stream(model, tokenizer, PROMPT, max_new_tokens=12, eos_token_id=(), stop=stop)
        assert "".join(stopped) == text[: text.index(stop)]
        assert stopped.finish_reason == "stop"
        assert stopped.tokens == free.tokens[: len(stopped.tokens)]
        assert_has_read(stopped.cache, model, ids + stopped.tokens)
        ended = stream(model, tokenizer, PROMPT, max_new_tokens=12, eos_token_id=free.tokens[5])
        list(ended)
        assert ended.tokens[-1] == free.tokens[5]
        assert_has_read(ended.cache, model, ids + ended.tokens)

    @pytest.mark.parametrize("name", ["lookup", "model"])
    def test_a_draft_s_state_goes_on_too(self, model, tokenizer, name):
        sizes = SIZES | {"vocab_size": model.config.vocab_size}
        draft = PromptLookup() if name == "lookup" else random_jax_model(Mamba2Config(**sizes))
        options = {"max_new_tokens": 9, "draft": draft, "eos_token_id": ()}
        ids, pieces = tokenizer.encode(PROMPT), stream(model, tokenizer, PROMPT, **options)
        for _ in pieces:  # blocks end where guesses do
            assert_has_read(pieces.cache, model, ids + pieces.tokens)
        states = {0: pieces.prompt_draft_cache, len(pieces.tokens): pieces.draft_cache}
        for count, state in states.items():
            if name == "lookup":
                assert state.tokens[0].tolist() == ids + pieces.tokens[:count]
            else:
                assert_has_read(state, draft, ids + pieces.tokens[:count])
        more = stream(model, tokenizer, "x", cache=pieces.cache, draft_cache=pieces.draft_cache, **options)
        want = stream(model, tokenizer, "x", max_new_tokens=9, eos_token_id=(), cache=pieces.cache)
        assert "".join(more) == "".join(want)
        assert more.passes >= 2  # of at most 5 tokens

    def test_a_text_goes_on_as_if_it_had_not_stopped(self, model, tokenizer):
        first = stream(model, tokenizer, PROMPT, max_new_tokens=6, eos_token_id=())
        text = "".join(first)
        more = "    x = 1\n"
        rest = "".join(stream(model, tokenizer, more, max_new_tokens=8, cache=first.cache, eos_token_id=()))
        ids = [*tokenizer.encode(PROMPT), *first.tokens, *tokenizer.encode(more)]
        assert tokenizer.decode(ids) == PROMPT + text + more
        again = stream(model, Fixed(tokenizer, ids), "x", max_new_tokens=8, eos_token_id=())
        assert "".join(again) == rest


class Fixed:
    """A tokenizer that reads every prompt as the same ids."""

    def __init__(self, tokenizer, ids):
        self._tokenizer, self._ids = tokenizer, ids

    def __call__(self, text, **options):
        return {"input_ids": self._ids}

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


class TestBos:
    @pytest.fixture(scope="class")
    @classmethod
    def beginning(cls):
        """The embedded tokenizer, made to begin each text with its bos token."""
        from tokenizers.processors import TemplateProcessing

        tokenizer = load_tokenizer()
        bos = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos[0]} $A", special_tokens=[bos]
        )
        return tokenizer

    def test_a_text_has_one_bos(self, beginning):
        bos, plain = beginning.bos_token_id, beginning("x = 1", add_special_tokens=False)["input_ids"]
        assert prompt_tokens(beginning, "x = 1", goes_on=False) == [bos, *plain]
        assert prompt_tokens(beginning, "x = 1", goes_on=True) == plain
        assert prompt_tokens(beginning, beginning.bos_token + "x = 1", goes_on=False) == [bos, *plain]

    def test_going_on_adds_none_but_an_empty_state_does(self, model, beginning):
        first = stream(model, beginning, PROMPT, max_new_tokens=1, eos_token_id=())
        assert first.prompt_ids[0] == beginning.bos_token_id
        after = stream(model, beginning, PROMPT, max_new_tokens=1, cache=first.cache)
        assert after.prompt_ids == first.prompt_ids[1:]
        empty = Mamba2Cache.zeros(model.config, 1)
        assert stream(model, beginning, PROMPT, max_new_tokens=1, cache=empty).prompt_ids == first.prompt_ids


class TestConversation:
    @pytest.mark.parametrize("template", [TEMPLATE, TRIMMING], ids=["as it is", "trimming"])
    def test_a_turn_is_what_the_whole_text_gives_and_reads_what_is_new(self, model, tokenizer, template):
        chat = Conversation(model, tokenizer, system="Write Python.", chat_template=template)
        read = []
        for turn, message in enumerate(("import os", "import sys", "x = 1")):
            answer = chat.say(message, max_new_tokens=5, temperature=0.8, key=jax.random.key(turn))
            read.append(len(answer.prompt_ids))
            list(answer)
        messages = chat.messages
        assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 3]
        prompt = tokenizer.apply_chat_template(
            messages[:-1], chat_template=template, tokenize=False, add_generation_prompt=True
        )
        whole = stream(model, tokenizer, prompt, max_new_tokens=5, temperature=0.8, key=jax.random.key(2))
        assert "".join(whole) == messages[-1]["content"]
        assert max(read[1:]) < 30 < len(whole.prompt_ids)

    def test_an_answer_left_early_stays_as_far_as_it_came(self, model, tokenizer):
        chat = Conversation(model, tokenizer, chat_template=TEMPLATE)
        answer = chat.say("import os", max_new_tokens=50, eos_token_id=())
        next(answer)
        said = chat.messages[-1]["content"]
        assert said == answer.text == tokenizer.decode(answer.tokens)
        again = chat.say("import sys", max_new_tokens=3)
        list(again)
        assert len(again.prompt_ids) < 20

    def test_it_is_saved_and_goes_on_another_day(self, model, tokenizer, tmp_path):
        chat = Conversation(model, tokenizer, chat_template=TEMPLATE)
        with pytest.raises(ValueError, match="nothing has been said"):
            chat.save(tmp_path / "chat")
        list(chat.say("import os", max_new_tokens=5))
        chat.save(tmp_path / "chat")
        want = "".join(chat.say("import sys", max_new_tokens=6))
        other = Conversation(model, tokenizer, chat_template=TEMPLATE)
        other.load(tmp_path / "chat")
        answer = other.say("import sys", max_new_tokens=6)
        assert "".join(answer) == want
        assert len(answer.prompt_ids) < 20
        assert other.messages == chat.messages
        model([[1]]).cache.save(tmp_path / "state", model)
        with pytest.raises(ValueError, match="not of a conversation"):
            other.load(tmp_path / "state")

    def test_special_tokens_that_a_message_spells_are_text(self, model, tokenizer):
        end = tokenizer.eos_token
        chat = Conversation(model, tokenizer, system=f"never {end}", chat_template=TEMPLATE)
        first = chat.say(f"a{end}b", max_new_tokens=2, eos_token_id=())
        text = f"# system\nnever {end}{end}\n# user\na{end}b{end}\n# assistant\n"
        assert tokenizer.decode(first.prompt_ids) == text
        assert first.prompt_ids.count(tokenizer.eos_token_id) == 2  # which the template wrote
        list(first)
        second = chat.say(f"{end}c", max_new_tokens=1)
        assert tokenizer.decode(second.prompt_ids).endswith(f"# user\n{end}c{end}\n# assistant\n")
        assert len(second.prompt_ids) < 40
        assert second.prompt_ids.count(tokenizer.eos_token_id) == 2  # after the answer and after the message
        with pytest.raises(ValueError, match="Conversation: a message holds U[+]FDD0"):
            chat.say("\ufdd0", max_new_tokens=1)

    def test_drafts_see_all_turns_also_of_a_saved_chat(self, model, tokenizer, tmp_path):
        chat, plain = (Conversation(model, tokenizer, chat_template=TEMPLATE) for _ in range(2))
        options = {"max_new_tokens": 6, "draft": PromptLookup()}
        for _ in range(2):
            answer = chat.say("import os", **options)
            assert "".join(answer) == "".join(plain.say("import os", max_new_tokens=6))
        read = tokenizer.decode(answer.draft_cache.tokens[0])
        assert read.count("import os") >= 2
        assert answer.draft_cache.lengths.tolist() == answer.cache.position.tolist()
        chat.save(tmp_path / "chat")
        other = Conversation(model, tokenizer, chat_template=TEMPLATE)
        other.load(tmp_path / "chat")
        third = other.say("import os", **options)
        assert "".join(third) == "".join(plain.say("import os", max_new_tokens=6))
        assert tokenizer.decode(third.draft_cache.tokens[0]).startswith(read)

    def test_what_the_template_refuses_is_said(self, model, tokenizer):
        with pytest.raises(ValueError, match="no chat template"):
            Conversation(model, tokenizer)
        chat = Conversation(model, tokenizer, chat_template=TEMPLATE)
        chat._messages.append({"role": "tool", "content": "x"})
        with pytest.raises(ValueError, match="chat template refuses the messages: no tools here"):
            chat.say("x", max_new_tokens=1)


class TestCommand:
    @pytest.fixture
    def template(self, tmp_path):
        file = tmp_path / "template.jinja"
        file.write_text(TEMPLATE)
        return str(file)

    def chat(self, monkeypatch, *lines: str, **options) -> int:
        read = iter(lines)

        def next_line(prompt=""):
            line = next(read, None)
            if line is None:
                raise EOFError
            if line == "^C":
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr(builtins, "input", next_line)
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        return cli.main(["chat", "--max-new-tokens", "5", *arguments])

    def test_a_chat_with_its_commands(self, monkeypatch, capsys, template, tmp_path, model, tokenizer):
        file = str(tmp_path / "my chat")
        options = {"chat-template": template, "dtype": "float32", "system": "Write Python."}
        lines = (
            "import os",
            f"/save {file}",
            "^C",
            "import sys",
            "/reset",
            "import os",
            "/load",
            "/x",
            "/help",
        )
        assert self.chat(monkeypatch, *lines, **options) == 0
        out, err = capsys.readouterr()
        chat = Conversation(model, tokenizer, system="Write Python.", chat_template=TEMPLATE)
        first, second = ("".join(chat.say(text, max_new_tokens=5)) for text in ("import os", "import sys"))
        assert out == f"{first}\n{second}\n{first}\n"
        for words in (f"saved {file}", "/exit or Ctrl-D", "/load wants", "/x is no command", "/reset "):
            assert words in err
        assert self.chat(monkeypatch, "import sys", "/exit", "never", load=file, **options) == 0
        assert capsys.readouterr().out == f"{second}\n"
        assert self.chat(monkeypatch, "/load /no/such", load=str(tmp_path / "nothing"), **options) == 2
        assert "nothing: no such file" in capsys.readouterr().err

    def test_generate_answers_a_message(self, capsys, template, model, tokenizer):
        arguments = ["--chat", "--chat-template", template, "--max-new-tokens", "5", "--dtype", "float32"]
        assert cli.main(["generate", "import os", *arguments]) == 0
        chat = Conversation(model, tokenizer, chat_template=TEMPLATE)
        assert capsys.readouterr().out.strip() == "".join(chat.say("import os", max_new_tokens=5)).strip()

    def test_an_interrupt_ends_an_answer_and_not_the_chat(
        self, monkeypatch, capsys, template, model, tokenizer
    ):
        options = cli.Chat(chat_template=template)
        settings = {"max_new_tokens": 400}
        loaded = Loaded(model, tokenizer, settings)
        conversation = new_conversation(options, loaded)
        told = []
        chat = _Chat(options, loaded, conversation, told.append)
        printed = []

        def print_three(text="", **_):
            printed.append(text)
            if len(printed) == 3:
                signal.raise_signal(signal.SIGINT)

        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            monkeypatch.setattr(builtins, "print", print_three)
            chat._answer("import os")
        finally:
            signal.signal(signal.SIGINT, before)
        assert conversation.messages[-1]["content"].startswith("".join(printed[:3]))
        settings["max_new_tokens"] = 4
        chat._answer("import sys")
        assert len(conversation.messages) == 4


@pytest.mark.parametrize("named_by", ["tokenizer", "generation config"])
def test_a_chat_end_added_in_the_padding_ends_a_text(named_by):
    config = Mamba2Config(**SIZES).replace(vocab_size=4104, unpadded_vocab_size=4096)
    model, tokenizer = random_jax_model(config), load_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    if named_by == "tokenizer":
        tokenizer.eos_token = "<|im_end|>"
    else:
        model.generation_end_ids = (end,)
    options = {"max_new_tokens": 6, "logits_processors": [force_tokens([10, end])]}
    pieces = stream(model, tokenizer, PROMPT, **options)
    assert "".join(pieces) == tokenizer.decode([10])
    assert (pieces.tokens, pieces.finish_reason) == ([10, end], "eos")
    given = {"eos_token_id": end} if named_by == "tokenizer" else {}
    new = generate(model, [tokenizer.encode(PROMPT)], **options, **given)
    assert (new.lengths.tolist(), new.tokens[0, :2].tolist()) == ([2], [10, end])
