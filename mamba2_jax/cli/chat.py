"""Run `mamba2-jax chat`: read messages line by line, stream the answers, and keep the history as a state."""

import sys
from collections.abc import Callable
from typing import Any

from mamba2_jax.cli.generate import Loaded, chat_template, load, stream_options
from mamba2_jax.cli.waiting import working
from mamba2_jax.generation.conversation import Conversation

COMMANDS = """/reset      forget the conversation, but for --system
/save FILE  write the conversation and its state to a file
/load FILE  go on with a saved conversation
/help       show this
/exit       leave; so does Ctrl-D. Ctrl-C ends an answer"""


def start_chat(options: Any, tell: Callable[[object], None]) -> Callable[[], None]:
    """Load the model, and return the function that runs the chat until the input ends.

    Raises:
        OSError: a file does not exist.
        ValueError: invalid options or files, or no chat template; the message names them.
    """
    loaded = load(options, tell)
    conversation = new_conversation(options, loaded)
    if options.load is not None:
        conversation.load(options.load)
    return lambda: _Chat(options, loaded, conversation, tell).run()


def new_conversation(options: Any, loaded: Loaded) -> Conversation:
    """Start a conversation with the options `--system` and `--chat-template`."""
    template = chat_template(options, loaded.tokenizer)
    return Conversation(loaded.model, loaded.tokenizer, system=options.system, chat_template=template)


class _Chat:
    """The loop over messages and commands."""

    def __init__(
        self, options: Any, loaded: Loaded, conversation: Conversation, tell: Callable[[object], None]
    ):
        self._options, self._loaded, self._conversation, self._tell = options, loaded, conversation, tell
        self._turn = 0

    def run(self) -> None:
        """Answer messages until the input ends or /exit."""
        interactive = sys.stdin.isatty()
        if interactive:
            self._tell("/help lists the commands")
        while True:
            try:
                line = input("> " if interactive else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                self._tell("\n/exit or Ctrl-D leaves")
                continue
            if line.strip() == "/exit":
                return
            try:
                if line.startswith("/"):
                    self._command(*line.split(maxsplit=1))
                elif line.strip():
                    self._answer(line)
            except (OSError, ValueError) as error:
                if isinstance(error, BrokenPipeError):
                    raise
                self._tell(error)

    def _answer(self, text: str) -> None:
        options = stream_options(self._options, self._loaded, turn=self._turn)
        self._turn += 1
        answer = self._conversation.say(text, stop=self._options.stop, **options)
        try:
            with working("reading" if self._turn > 1 else "compiling, and reading"):
                piece = next(answer, "")
            print(piece, end="", flush=True)
            for piece in answer:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass  # the conversation goes on with what was written
        print(flush=True)

    def _command(self, name: str, argument: str = "") -> None:
        argument = argument.strip()
        if name in ("/save", "/load") and not argument:
            raise ValueError(f"{name} wants the name of a file")
        if name == "/reset":
            self._conversation.reset()
        elif name == "/save":
            self._conversation.save(argument)
            self._tell(f"saved {argument}")
        elif name == "/load":
            self._conversation.load(argument)
            self._tell(f"loaded {argument}: {len(self._conversation.messages)} messages")
        elif name == "/help":
            self._tell(COMMANDS)
        else:
            raise ValueError(f"{name} is no command; /help lists them")
