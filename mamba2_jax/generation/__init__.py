"""Text generation: `generate` continues batches in `jit`, `stream` yields a text, `Conversation` chats."""

from mamba2_jax.generation.conversation import Conversation
from mamba2_jax.generation.decoding import GenerateOutput, generate
from mamba2_jax.generation.drafts import PromptLookup, TokenHistory
from mamba2_jax.generation.streaming import stream

__all__ = ["Conversation", "GenerateOutput", "PromptLookup", "TokenHistory", "generate", "stream"]
