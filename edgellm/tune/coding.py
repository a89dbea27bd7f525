"""Conversations to token sequences, with a mask over the answers: what the served model would read and write.

An answer is found by rendering: the conversation up to it (with the generation prompt), up to its end, and the whole.
Where the tokens of the first begin those of the whole, what follows, through the token that ends the turn, is the
answer; the line break that many templates put behind that token is not, for no model is ever asked to write it.

Some templates write an earlier turn in another way once others follow it (Qwen 3 drops its reasoning). The model never
writes such a turn as it then stands, so it is left as context, and only the answers that stand as they would be written
are learnt: with such templates the last. An example in which none does is refused.

Not covered: text in an example that spells a control token is read as one, as in any request to the server.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgellm.backend.vocab import Vocab
from edgellm.chat.messages import Message
from edgellm.chat.template import ChatTemplate
from edgellm.errors import ChatTemplateError
from edgellm.tune.examples import Conversation
from edgellm.tune.faults import ExampleError

Tokens = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class TrainingSequence:
    """`mask[i]`: token i belongs to an answer and is to be predicted from those before it. `mask[0]` is never set."""

    tokens: Tokens  # (tokens,)
    mask: NDArray[np.bool_]  # (tokens,)
    untrained: int = 0  # answers that were to be learnt, but stand rewritten

    @property
    def trained_tokens(self) -> int:
        """How many tokens are learnt."""
        return int(self.mask.sum())

    def cut(self, most_tokens: int) -> TrainingSequence:
        """The first `most_tokens` tokens."""
        return TrainingSequence(self.tokens[:most_tokens], self.mask[:most_tokens], self.untrained)


class Coder(Protocol):
    """What a model makes of messages: its template and its vocabulary."""

    def render(self, messages: Sequence[Message], tools: Sequence[Message], *, prompt: bool) -> str:
        """The text; `prompt` adds what an answer follows. Raises ChatTemplateError."""

    def tokenize(self, text: str, *, start: bool = True) -> list[int]:
        """Token ids; `start`: the text begins a sequence, and gets a BOS token if the model wants one."""

    def is_end(self, token: int) -> bool:
        """Whether the server would end the answer at this token."""

    def spell(self, tokens: Sequence[int]) -> bytes:
        """The bytes of the tokens, control tokens included."""

    @property
    def end_token(self) -> int | None:
        """A token that ends an answer, if there is one."""


class ModelCoder:
    """The served model's own: a prompt has the tokens that serving gives it (serving/chat_prompt.py)."""

    def __init__(self, vocab: Vocab, template: ChatTemplate, tool_template: ChatTemplate | None = None) -> None:
        """`tool_template` is for conversations with tools, where the model has one of its own for them."""
        self._vocab = vocab
        self._template = template
        self._tool_template = tool_template or template
        self._bos = vocab.special_piece(vocab.bos) if vocab.adds_bos else ""

    def render(self, messages: Sequence[Message], tools: Sequence[Message], *, prompt: bool) -> str:
        """As Coder has it."""
        template = self._tool_template if tools else self._template
        return template.render_sync(messages, tools=tools or None, add_generation_prompt=prompt)

    def tokenize(self, text: str, *, start: bool = True) -> list[int]:
        """As Coder has it. A BOS that the template wrote is not doubled."""
        add = start and not (self._bos and text.startswith(self._bos))
        return self._vocab.tokenize(text, add_special=add, parse_special=True)

    def is_end(self, token: int) -> bool:
        """As Coder has it."""
        return token in self._vocab.end_tokens

    def spell(self, tokens: Sequence[int]) -> bytes:
        """As Coder has it."""
        return b"".join(self._vocab.special_bytes(token) for token in tokens)

    @property
    def end_token(self) -> int | None:
        """As Coder has it."""
        return next((token for token in (self._vocab.eos, self._vocab.eot) if token >= 0), None)


def encode(conversation: Conversation, coder: Coder) -> TrainingSequence:
    """Tokens and mask of a conversation. Raises ExampleError with the reason why it cannot be used."""
    try:
        return _Encoding(conversation, coder).sequence()
    except ChatTemplateError as error:
        raise ExampleError(f"the model's chat template does not take it: {error}") from None


class _Encoding:
    """The steps of `encode`."""

    def __init__(self, conversation: Conversation, coder: Coder) -> None:
        self._of = conversation
        self._coder = coder
        self._text = self._render(len(conversation.messages), prompt=False)
        self._tokens = coder.tokenize(self._text)

    def sequence(self) -> TrainingSequence:
        prompts = {index: self._render(index, prompt=True) for index in self._of.trained}
        sound = [index for index in self._of.trained if self._stands(index, prompts[index])]
        if not sound:
            raise ExampleError(
                "the model's chat template writes its answers differently from how the model would write them, "
                "so they cannot be told apart"
            )
        self._split({len(prompts[index]) for index in sound if not self._begins(prompts[index])})
        mask = np.zeros(len(self._tokens) + 1, np.bool_)
        for index in sound:
            start, end = self._span(index, prompts[index])
            mask[start:end] = True
        self._close(mask)
        tokens = np.array(self._tokens, np.int32)
        return TrainingSequence(tokens, mask[: len(tokens)], len(self._of.trained) - len(sound))

    def _render(self, count: int, *, prompt: bool) -> str:
        return self._coder.render(self._of.messages[:count], self._of.tools, prompt=prompt)

    def _stands(self, index: int, prompt: str) -> bool:
        """Whether this answer's prompt and its own text stand unchanged in the whole conversation."""
        return bool(prompt) and self._text.startswith(prompt) and self._text.startswith(self._answered(index))

    def _answered(self, index: int) -> str:
        return self._text if index + 1 == len(self._of.messages) else self._render(index + 1, prompt=False)

    def _begins(self, prompt: str) -> bool:
        """Whether the prompt, tokenised by itself as it is when it is served, begins the tokens."""
        given = self._coder.tokenize(prompt)
        return self._tokens[: len(given)] == given

    def _split(self, places: set[int]) -> None:
        """Where a token would reach from a prompt into its answer ("\\n" and "\\n\\n"), tokenise the two apart.

        Otherwise the answer would follow a prompt that no request has. `places` are offsets into the text.
        """
        if not places:
            return
        ends = [*sorted(places), len(self._text)]
        tokens = self._coder.tokenize(self._text[: ends[0]])
        for start, end in itertools.pairwise(ends):
            piece = self._coder.tokenize(self._text[start:end], start=False)
            if self._coder.spell(piece) != self._text[start:end].encode():  # some put a space before every text
                raise ExampleError(
                    "an answer begins in the middle of a token, and this model's tokenizer cannot say so"
                )
            tokens += piece
        self._tokens = tokens

    def _span(self, index: int, prompt: str) -> tuple[int, int]:
        """Where the answer's tokens begin and end. Raises ExampleError if the template left nothing of it."""
        start, stop = self._offset(prompt), self._offset(self._answered(index))
        ends = [at for at in range(start, stop) if self._coder.is_end(self._tokens[at])]
        end = ends[-1] + 1 if ends else stop
        said = [token for token in self._tokens[start:end] if not self._coder.is_end(token)]
        if not self._coder.spell(said).strip():
            raise ExampleError(f"messages[{index}]: nothing is left of this answer in the model's chat template")
        return start, end

    def _offset(self, text: str) -> int:
        """How many tokens lie within `text`, which the whole begins with."""
        if text == self._text:
            return len(self._tokens)
        alone = self._coder.tokenize(text)
        if self._tokens[: len(alone)] == alone:
            return len(alone)
        return self._count(len(text.encode()))

    def _count(self, size: int) -> int:
        """How many whole tokens the first `size` bytes of the text hold; a BOS of the tokenizer's own is beside it."""
        total = len(self._coder.spell(self._tokens)) - len(self._text.encode())
        before, count = -total, 0
        for count, token in enumerate(self._tokens):
            before += len(self._coder.spell([token]))
            if before > size:
                return count
        return count + 1

    def _close(self, mask: NDArray[np.bool_]) -> None:
        """A last answer that the template leaves open gets an end, or the model would never learn to stop."""
        trained = np.flatnonzero(mask)
        is_open = trained[-1] == len(self._tokens) - 1 and not self._coder.is_end(self._tokens[-1])
        if is_open and (end := self._coder.end_token) is not None:
            mask[len(self._tokens)] = True
            self._tokens.append(end)
