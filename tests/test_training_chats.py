"""Conversations of every kind: what the template writes, what is trained on, and what is text."""

import functools
import json
import string

import pytest

from mamba2_jax.training import DataConfig, load_documents

# As Qwen's: tools in a system turn, calls as JSON, nothing where there is no content.
CHATML = """
{%- if tools %}
{{- '<|im_start|>system\\n' + tools[0].function.name + ' ' + (tools | tojson) + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.content %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}{{ '<call>' + (call.function | tojson) }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}{% if not thinking | default(true) %}{{ '<no>' }}{% endif %}
{%- endif %}
""".strip()
# As Llama 2's: the user begins.
STRICT = """
{%- for m in messages %}
{%- if loop.index0 == 0 and m.role == 'assistant' %}{{ raise_exception('the user begins') }}{% endif %}
{%- if m.role == 'user' %}{{ '[Q]' + m.content + '[/Q]' }}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}
{%- endfor %}
""".strip()  # fmt: skip


@functools.cache
def tokenizer(template: str | None = CHATML):
    """One token per printable character, and two special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(string.printable)}, []))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(
        [AddedToken(name, normalized=False) for name in ("<|im_start|>", "<|im_end|>")]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    made.chat_template = template
    return made


def read(*records, template: str | None = CHATML, **options):
    return load_documents(records, tokenizer(template), DataConfig(max_length=1024, **options))


def text_and_learnt(record, **options) -> tuple[str, str]:
    (document,) = read(record, **options)
    decode = tokenizer().decode
    learnt = [token for token in document["labels"] if token != -100]
    return decode(document["input_ids"]), decode(learnt)


def reason(record, **options) -> str:
    (unusable,) = read(record, {"text": "one"}, **options).report.unusable
    return unusable.reason


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def chatml(*pairs: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in pairs)


HI, YES = ("user", "hi"), ("assistant", "yes")
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
PARTS = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]


@pytest.mark.parametrize(
    ("record", "text", "learnt"),
    [
        ({"messages": turns("hi", "yes")}, chatml(HI, YES), "yes<|im_end|>\n"),
        ({"prompt": turns("hi"), "completion": turns("", "yes")[1:]}, chatml(HI, YES), "yes<|im_end|>\n"),
        (
            {"prompt": turns("hi", "yes", "so"), "completion": turns("", "no")[1:]},
            chatml(HI, YES, ("user", "so"), ("assistant", "no")),
            "no<|im_end|>\n",
        ),
        ({"conversations": SHAREGPT}, chatml(HI, YES), "yes<|im_end|>\n"),
        ({"conversations": SHAREGPT, "system": "be"}, chatml(("system", "be"), HI, YES), "yes<|im_end|>\n"),
        ({"conversations": turns("hi", "yes")}, chatml(HI, YES), "yes<|im_end|>\n"),
        ({"instruction": "hi", "input": "", "output": "yes"}, chatml(HI, YES), "yes<|im_end|>\n"),
        ({"instruction": "a", "input": "b", "output": "yes"}, chatml(("user", "a\n\nb"), YES),
         "yes<|im_end|>\n"),
        (
            {"instruction": "a", "output": "b", "system": "be", "history": [["hi", "yes"]]},
            chatml(("system", "be"), HI, YES, ("user", "a"), ("assistant", "b")),
            "yes<|im_end|>\nb<|im_end|>\n",
        ),
        ({"messages": turns("", "yes", "hi")[1:]}, chatml(YES, HI), "yes<|im_end|>\n"),
        (
            {"messages": turns("", "yes", "hi", "yes")[1:]},
            chatml(YES, HI, YES),
            "yes<|im_end|>\nyes<|im_end|>\n",
        ),
        (
            {"messages": [{**turn, "weight": 0} if turn["content"] == "bad" else turn
                          for turn in turns("hi", "bad", "hi", "yes")]},
            chatml(HI, ("assistant", "bad"), HI, YES),
            "yes<|im_end|>\n",
        ),
        (
            {"messages": [{"role": "user", "content": PARTS}, turns("", "yes")[1]]},
            chatml(HI, YES),
            "yes<|im_end|>\n",
        ),
    ],
)  # fmt: skip
def test_kinds_of_conversations(record, text, learnt):
    assert text_and_learnt(record) == (text, learnt)


def test_a_chat_that_the_assistant_begins_after_what_the_template_writes():
    template = "{{ 'be an a: ' }}{% for m in messages %}{{ m.role[0] + ': ' + m.content + ' ' }}{% endfor %}"
    messages = turns("", "yes a: b", "hi")[1:]
    prompted = template + "{% if add_generation_prompt %}a: {% endif %}"
    text = "be an a: a: yes a: b u: hi "
    assert text_and_learnt({"messages": messages}, template=prompted) == (text, "yes a: b ")
    assert text_and_learnt({"messages": messages}, template=template) == (text, "yes a: b ")


def test_alpaca_without_a_template_is_in_its_own_words():
    record = {"instruction": "Add.", "input": "1 2", "output": "3"}
    text, learnt = text_and_learnt(record, template=None)
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3<|im_end|>")
    assert learnt == "3<|im_end|>"
    text, _ = text_and_learnt({**record, "input": ""}, template=None)
    assert text.startswith("Below is an instruction that describes a task. Write a response")
    assert "Input" not in text


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "x": None}}}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def test_tools_and_calls_reach_the_template():
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {"role": "assistant", "content": "it is 3"},
    ]
    calls = '<call>{"name": "add", "arguments": {"a": 1}}<|im_end|>\n'
    text, learnt = text_and_learnt({"messages": messages, "tools": [TOOL]})
    assert text.startswith('<|im_start|>system\nadd [{"type": "function", ')
    assert learnt == calls + "it is 3<|im_end|>\n"
    assert "None" not in text
    assert text_and_learnt({"messages": messages, "tools": json.dumps([TOOL])}) == (text, learnt)
    absent = [{k: v for k, v in message.items() if v is not None} for message in messages]
    assert text_and_learnt({"messages": absent, "tools": [TOOL]}) == (text, learnt)
    shared = [
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "it is 3"},
    ]
    assert text_and_learnt({"conversations": shared, "tools": [TOOL]}) == (text, learnt)
    # a template that adds the content to text, one that prints it, and one that writes no calls
    call = "(m.tool_calls[0].function.name if m.tool_calls else '')"
    plus = f"{{% for m in messages %}}{{{{ m.content + {call} }}}}{{% endfor %}}"
    assert text_and_learnt({"messages": messages[:2]}, template=plus)[1] == "add"
    prints = plus.replace("m.content +", "m.content ~")
    assert text_and_learnt({"messages": messages[:2]}, template=prints)[1] == "add"
    silent = "{% for m in messages %}{{ m.content or '' }}{% endfor %}"
    assert "does not write the call of 'add' in message 2" in reason({"messages": messages}, template=silent)


def test_what_arrow_fills_in_is_not_there(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [CALL], "weight": 1},
        {"role": "assistant", "content": "yes"},
    ]
    parquet.write_table(
        pyarrow.Table.from_pylist([{"messages": messages, "tools": [TOOL]}]), tmp_path / "a.parquet"
    )
    (document,) = load_documents(tmp_path / "a.parquet", tokenizer(), DataConfig(max_length=1024))
    text = tokenizer().decode(document["input_ids"])
    assert "null" not in text
    assert "None" not in text
    assert '<call>{"name": "add", "arguments": {"a": 1}}<|im_end|>' in text


def test_options_of_the_template():
    record = {"messages": turns("hi", "yes")}
    assert "changes earlier turns" in reason(record, template_options='{"thinking": false}')
    record["messages"][1]["content"] = "<no>yes"
    assert text_and_learnt(record, template_options='{"thinking": false}')[1] == "yes<|im_end|>\n"
    record["chat_template_kwargs"] = {"thinking": False}
    assert text_and_learnt(record)[1] == "yes<|im_end|>\n"
    assert text_and_learnt(record, template_options='{"thinking": true}')[1] == "yes<|im_end|>\n"
    for options, message in {
        "[1]": "is not a JSON object", "{thinking": "is not JSON", '{"tokenize": true}': "sets 'tokenize'",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            DataConfig(template_options=options)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user"}], "message 1 has content that is null, not a string"),
        ([{"role": "user", "content": 7}], "message 1 has content that is a number, not a string"),
        ([{"content": "x"}], "message 1 has no 'role'"),
        (["x"], "message 1 is a string, not an object"),
        ("x", "'messages' is a string, not a list of messages"),
        (turns("hi"), "'messages' has no turn of the assistant to train on"),
        ([], "'messages' does not fit the chat template (ValueError: "),
        ([{**turns("", "yes")[1], "weight": 0.5}], "message 1 has weight 0.5; only 0 and 1 are known"),
        ([{**turns("", "yes")[1], "weight": 0}], "'messages' has no turn of the assistant to train on"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            "message 1 has parts that are no text",
        ),
        (
            [{"role": "assistant", "tool_calls": ["x"]}],
            "message 1 has tool calls that are no list of objects",
        ),
        (turns("hi", "y\ud800"), "holds \\ud800, half of a surrogate pair"),
    ],
)
def test_what_is_no_conversation_is_named(messages, message):
    assert reason({"messages": messages}).startswith(message)


def test_a_template_that_refuses_is_quoted():
    found = reason({"messages": turns("", "yes")[1:]}, template=STRICT)
    assert found == "'messages' does not fit the chat template (TemplateError: the user begins)"
    with pytest.raises(ValueError, match=r"record 1: holds 'conversations', .*--data.chat-template FILE"):
        read({"conversations": SHAREGPT}, template=None)


def test_text_that_spells_a_special_token_is_text():
    end = tokenizer().eos_token_id
    spelled = "a<|im_end|>b"
    (text,) = found = read({"text": spelled})
    assert text["input_ids"].tolist().count(end) == 1
    assert tokenizer().decode(text["input_ids"]) == spelled + "<|im_end|>"
    assert "1 texts spell special tokens of the tokenizer: read as text" in str(found.report)
    (token,) = read({"text": spelled}, special_tokens_in_text=True)
    assert token["input_ids"].tolist().count(end) == 2
    # in a message too, but not where the template writes it, and beside it
    record = {"messages": turns(f"{spelled}<|im_end|>", f"<|im_start|>{spelled}")}
    text, learnt = text_and_learnt(record)
    assert text == chatml(("user", f"{spelled}<|im_end|>"), ("assistant", f"<|im_start|>{spelled}"))
    assert learnt == f"<|im_start|>{spelled}<|im_end|>\n"
    (chat,) = read(record)
    ids = chat["input_ids"].tolist()
    assert ids.count(end) == 2
    assert ids.count(tokenizer().convert_tokens_to_ids("<|im_start|>")) == 2
    assert chat["labels"].tolist().count(end) == 1
    (chat,) = read(record, special_tokens_in_text=True)
    assert chat["input_ids"].tolist().count(end) == 5


def test_a_chat_template_from_a_file_or_as_text(tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(CHATML)
    record = {"messages": turns("hi", "yes")}
    for template in (str(file), CHATML):
        assert text_and_learnt(record, template=None, chat_template=template)[0] == chatml(HI, YES)
    assert tokenizer(None).chat_template is None
    with pytest.raises(FileNotFoundError, match=r"no.jinja: no such file; chat_template"):
        read(record, chat_template="no.jinja")
