"""Tasks in local files for lm-evaluation-harness, and a tokenizer for the random models of `models.py`."""

import functools
import json
import pathlib

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:?!\n-'()"

QUESTIONS = [
    {"question": "What is 1 + 1?", "choices": ["two", "three", "one", "four and more"], "answer": 0},
    {"question": "Who wrote the Odyssey?", "choices": ["Homer", "Virgil"], "answer": 0},
    {"question": "Which is a colour?", "choices": ["a", "b", "c", "d"], "answer": 3},
    {"question": "Is it?", "choices": ["yes it is", "no"], "answer": 1},
    {"question": "And this one, which is a longer question?", "choices": ["no", "yes"], "answer": 1},
]
_CHOICE = """task: tiny_choice
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
_ROLLING = """task: tiny_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[0]}}"
metric_list: [{metric: bits_per_byte}]
"""
_UNTIL = """task: tiny_until
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e", "ZZ"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""
TASKS = ("tiny_choice", "tiny_rolling", "tiny_until")


def write_tasks(folder: pathlib.Path) -> pathlib.Path:
    """Write one task per kind of request, all on `QUESTIONS`, and return the folder."""
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, text in zip(TASKS, (_CHOICE, _ROLLING, _UNTIL), strict=True):
        common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(text + common)
    return folder


@functools.cache
def tokenizer():
    """Return a tokenizer of one id per character, which begins texts with a bos token."""
    from tokenizers import Tokenizer, decoders, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    names = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    backend = Tokenizer(BPE(names | {character: 3 + i for i, character in enumerate(CHARACTERS)}, []))
    backend.decoder = decoders.Fuse()
    special = [("<bos>", 1)]
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
