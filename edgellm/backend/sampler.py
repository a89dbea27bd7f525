"""Drawing the next token: one sampler for each answer, with its own random state and memory.

What is applied, and in which order, is llama.cpp's: bias, penalties, top-k, typical, top-p, min-p, temperature, draw.
The code is edgellm's (kernels/sampler.h): llama.cpp's chain sorts or walks all of the vocabulary at every token, which
takes a good part of a small model's step (docs/benchmarks.md). Grammars are llama.cpp's.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgellm import _kernels
from edgellm.backend.context import Context, Floats
from edgellm.backend.library import lib, take_errors
from edgellm.backend.vocab import Vocab
from edgellm.errors import BackendError, GrammarError


@dataclass(frozen=True, slots=True)
class Grammar:
    """A GBNF grammar that the answer must follow, from its first token or, if `lazy_patterns` are given, from the first
    match of one of them on (a regular expression over the whole answer so far; the text from its first group on is what
    the grammar sees)."""

    gbnf: str
    root: str = "root"
    lazy_patterns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. The defaults sample from the model's own distribution."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # over the last `repetition_window` tokens of prompt and answer
    repetition_window: int = 64
    presence_penalty: float = 0.0  # over the answer so far
    frequency_penalty: float = 0.0  # over the answer so far
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    seed: int = 0  # 0 .. 2**32 - 2; the i-th of n answers uses seed + i
    grammar: Grammar | None = None


_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
_REFUSALS = 8  # single tokens tried before the grammar is applied to all
_GRAMMAR_SLICE = 32  # tokens that the grammar is applied to at once
_GRAMMAR_LIMIT_S = 2.0
_SEEDS = 0xFFFFFFFF  # seeds are numbers below this one
_NONE_LEFT, _NO_NUMBER = -1, -2  # what _kernels.Sampler.draw returns in place of a token


def check_grammar(vocab: Vocab, grammar: Grammar) -> None:
    """Raises GrammarError if llama.cpp refuses the grammar. Any thread may call this."""
    lib().llama_sampler_free(_make_grammar(vocab, grammar))


def _make_grammar(vocab: Vocab, grammar: Grammar) -> Any:
    if not grammar.gbnf:
        raise GrammarError("the grammar is empty")  # llama.cpp would take that as no grammar
    low = lib()
    take_errors()
    gbnf, root = grammar.gbnf.encode(), grammar.root.encode()
    if grammar.lazy_patterns:
        patterns = (ctypes.c_char_p * len(grammar.lazy_patterns))(*(p.encode() for p in grammar.lazy_patterns))
        handle = low.llama_sampler_init_grammar_lazy_patterns(
            vocab.handle, gbnf, root, patterns, len(patterns), None, 0
        )
    else:
        handle = low.llama_sampler_init_grammar(vocab.handle, gbnf, root)
    if not handle:
        raise GrammarError(f"llama.cpp refuses the grammar: {take_errors() or 'no reason given'}")
    return handle


class Sampler:
    """Draws the tokens of one answer."""

    def __init__(self, vocab: Vocab, params: SamplingParams, *, index: int = 0, prompt: Iterable[int] = ()) -> None:
        """`index` is the answer's number among n (its seed is `params.seed + index`); `prompt` feeds the repetition
        penalty. Raises GrammarError."""
        self._low = lib()
        self._n_vocab = vocab.n_tokens
        self._grammar: Any = _make_grammar(vocab, params.grammar) if params.grammar else None
        self._closed = False
        self._sampler = _kernels.Sampler(
            vocab.n_tokens,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            typical_p=params.typical_p,
            repetition_penalty=params.repetition_penalty,
            repetition_window=params.repetition_window,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            bias=list(params.logit_bias),
            seed=(params.seed + index) % _SEEDS,
        )
        for token in prompt:
            self._sampler.remember(token)

    def sample(self, context: Context, row: int) -> int | None:
        """Draws a token from batch row `row` and remembers it. None when nothing is left to draw.

        Raises BackendError when the logits are no numbers, GrammarError when the grammar takes too long.
        """
        if self._closed:
            raise BackendError("the sampler is closed")
        logits = context.logits_address(row)
        token = self._draw(logits, []) if self._grammar is None else self._draw_constrained(context, row)
        if token is None:
            return None
        self._sampler.accept(token)
        if self._grammar is not None:
            self._low.llama_sampler_accept(self._grammar, token)
        return token

    def _draw(self, logits: int, refused: list[int]) -> int | None:
        token = self._sampler.draw(logits, refused)
        if token == _NO_NUMBER:
            raise BackendError("the model computed NaN: its file is damaged, or its precision overflowed")
        return None if token == _NONE_LEFT else token

    def _draw_constrained(self, context: Context, row: int) -> int | None:
        """Draws freely and asks the grammar about that one token; a refused token is taken out and the draw repeated.

        That is rejection sampling: the result is distributed as if the grammar had been applied to all tokens first
        (truncation by top-k, top-p and the like acts on what has not been refused). After some refusals the grammar
        is applied to all tokens after all, which takes llama.cpp tens of milliseconds.
        """
        logits = context.logits(row)
        refused: list[int] = []
        for _ in range(_REFUSALS):
            token = self._draw(logits.ctypes.data, refused)
            if token is None or self._allowed(token, logits[token]):
                return token
            refused.append(token)
        allowed = self._logits_allowed(logits)
        return self._draw(allowed.ctypes.data, refused)

    def _logits_allowed(self, logits: Floats) -> Floats:
        """The logits, minus infinity for each token that the grammar refuses, (vocabulary,).

        Some tokens at a time: llama.cpp follows each way in which the text so far can be read, and a grammar with very
        many ways must not hold up everybody else for minutes.
        """
        low = self._low
        data = np.empty(self._n_vocab, _CANDIDATE)
        data["id"] = np.arange(self._n_vocab, dtype=np.int32)
        data["logit"] = logits
        until_s = time.monotonic() + _GRAMMAR_LIMIT_S
        for start in range(0, self._n_vocab, _GRAMMAR_SLICE):
            part = data[start : start + _GRAMMAR_SLICE]
            array = low.llama_token_data_array(
                data=part.ctypes.data_as(low.llama_token_data_p), size=len(part), selected=-1, sorted=False
            )
            low.llama_sampler_apply(self._grammar, ctypes.byref(array))
            if time.monotonic() > until_s:
                raise GrammarError(
                    f"The grammar is too ambiguous: testing the tokens at one place took more than {_GRAMMAR_LIMIT_S} s"
                )
        return np.ascontiguousarray(data["logit"])

    def _allowed(self, token: int, logit: float) -> bool:
        low = self._low
        one = (low.llama_token_data * 1)(low.llama_token_data(id=token, logit=float(logit), p=0.0))
        array = low.llama_token_data_array(data=one, size=1, selected=-1, sorted=False)
        low.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return bool(np.isfinite(one[0].logit))

    def close(self) -> None:
        """Frees the grammar. Idempotent."""
        self._closed = True
        if self._grammar:
            self._low.llama_sampler_free(self._grammar)
            self._grammar = None
