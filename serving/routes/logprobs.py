"""Log-probabilities as the wire has them."""

from __future__ import annotations

from collections.abc import Iterable

from edgellm.backend.vocab import Vocab
from edgellm.engine.types import TokenLogprob as EngineLogprob
from serving.wire.common import Logprobs, TokenLogprob, TopLogprob
from serving.wire.completions import CompletionLogprobs


def _text(vocab: Vocab, token: int) -> str:
    return (vocab.piece(token) or vocab.special_piece(token).encode()).decode("utf-8", "replace")


def _bytes(vocab: Vocab, token: int) -> list[int]:
    return list(vocab.piece(token) or vocab.special_piece(token).encode())


def chat_logprobs(vocab: Vocab, tokens: Iterable[EngineLogprob]) -> Logprobs:
    """For a chat choice or chunk."""
    content = [
        TokenLogprob(
            token=_text(vocab, item.token),
            logprob=item.logprob,
            bytes=_bytes(vocab, item.token),
            top_logprobs=[
                TopLogprob(token=_text(vocab, token), logprob=value, bytes=_bytes(vocab, token))
                for token, value in item.top
            ],
        )
        for item in tokens
    ]
    return Logprobs(content=content)


class CompletionLogprobsBuilder:
    """For a text completion: parallel lists, with running offsets into the answer's text."""

    def __init__(self, vocab: Vocab, offset: int = 0) -> None:
        self._vocab = vocab
        self._offset = offset  # characters before the next token's text

    def build(self, tokens: Iterable[EngineLogprob]) -> CompletionLogprobs:
        """The lists for the next tokens of the answer."""
        names: list[str] = []
        values: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for item in tokens:
            text = _text(self._vocab, item.token)
            names.append(text)
            values.append(item.logprob)
            top.append({_text(self._vocab, token): value for token, value in item.top})
            offsets.append(self._offset)
            self._offset += len(text)
        return CompletionLogprobs(tokens=names, token_logprobs=values, top_logprobs=top, text_offset=offsets)
