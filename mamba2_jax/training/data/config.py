"""Options for turning files and records into rows of tokens."""

import dataclasses
import json
import pathlib
from typing import Any, Literal

from mamba2_jax.ops.checks import check_choice

_OF_THE_RENDERER = ("tokenize", "add_generation_prompt", "tools", "chat_template", "conversation")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Options for turning texts into rows of tokens.

    Raises:
        ValueError: an invalid value; the message names it.
    """

    max_length: int = 512
    """Tokens per row. Longer texts are split into several documents; texts with a prompt are truncated."""
    rows: Literal["pack", "pad"] = "pack"
    """Pack several documents into a row, or pad one document to the full length."""
    shuffle: bool = True
    text_field: str = "text"
    """Field of a record that holds its text."""
    split: str = "train"
    """Split of a hub dataset."""
    config: str | None = None
    """Configuration of a hub dataset that has several, e.g. `wikitext-103-raw-v1`."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    eval_share: float = 0.0
    """Fraction of documents held out for evaluation, unless evaluation data is given."""
    max_unusable: float = 0.5
    """Stop if more than this fraction of a source's records cannot be used (1: go on with the others)."""
    chat_template: str | None = None
    """Chat template in Jinja, as a file or as text; replaces the tokenizer's and is saved with the model."""
    template_options: str = ""
    """Variables for the chat template, as a JSON object, e.g. '{"enable_thinking": false}'."""
    special_tokens_in_text: bool = False
    """Read special tokens that a text or message spells, e.g. `<|im_end|>` in a text that was rendered
    before, as these tokens, not as text."""

    def __post_init__(self):
        check_choice("DataConfig", "rows", self.rows, ("pack", "pad"))
        if self.max_length < 2:
            raise ValueError(f"DataConfig: max_length={self.max_length} must be at least 2 tokens")
        if not 0 <= self.eval_share < 1:
            raise ValueError(f"DataConfig: eval_share={self.eval_share} must lie in 0..1, 1 excluded")
        if not 0 <= self.max_unusable <= 1:
            raise ValueError(f"DataConfig: max_unusable={self.max_unusable} must lie in 0..1")
        self.template_variables()

    def template_variables(self) -> dict[str, Any]:
        """Return the variables for the chat template.

        Raises:
            ValueError: `template_options` is not a JSON object, or sets an argument of the renderer.
        """
        try:
            variables = json.loads(self.template_options or "{}")
        except ValueError as error:
            raise ValueError(
                f"DataConfig: template_options={self.template_options!r} is not JSON ({error}); "
                """want an object, e.g. '{"enable_thinking": false}'"""
            ) from None
        taken = [name for name in _OF_THE_RENDERER if name in variables]
        if not isinstance(variables, dict) or taken:
            problem = f"sets {taken[0]!r}, which is not the template's" if taken else "is not a JSON object"
            raise ValueError(f"DataConfig: template_options={self.template_options!r} {problem}")
        return variables

    def template_text(self) -> str | None:
        """Return the text of `chat_template`, read from the file if it names one.

        Raises:
            FileNotFoundError: it is no template text, and no such file exists.
        """
        template = self.chat_template
        if template is None or "{" in template or "\n" in template:
            return template
        file = pathlib.Path(template).expanduser()
        if not file.is_file():
            raise FileNotFoundError(
                f"{template}: no such file; chat_template (--data.chat-template) wants a file with a Jinja "
                "template, or the template itself"
            )
        return file.read_text(encoding="utf-8")
