"""Drawing the next token: one llama.cpp sampler chain for each answer.

The order of the chain is llama.cpp's own: bias, penalties, top-k, typical, top-p, min-p, temperature, draw.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgellm.backend.context import Context
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


_ANSWER_WINDOW = 1 << 16  # tokens that presence and frequency penalties look back: longer than any answer here
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
_REFUSALS = 8  # single tokens tried before the grammar is applied to all
_GRAMMAR_SLICE = 32  # tokens that the grammar is applied to at once
_GRAMMAR_LIMIT_S = 2.0
_SEEDS = 0xFFFFFFFF  # this value means "random" to llama.cpp, so seeds are taken modulo it


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
    """The sampler chain of one answer, with its own random state and its memory of the tokens drawn."""

    def __init__(self, vocab: Vocab, params: SamplingParams, *, index: int = 0, prompt: Iterable[int] = ()) -> None:
        """`index` is the answer's number among n (its seed is `params.seed + index`); `prompt` feeds the repetition
        penalty. Raises GrammarError."""
        low = lib()
        self._low = low
        self._n_vocab = vocab.n_tokens
        self._grammar: Any = _make_grammar(vocab, params.grammar) if params.grammar else None
        self._chain: Any = low.llama_sampler_chain_init(low.llama_sampler_chain_default_params())
        self._sample = low.llama_sampler_sample
        for part in _chain_parts(low, vocab, params, index, prompt):
            low.llama_sampler_chain_add(self._chain, part)
        # All tokens, and a working copy; only a grammar needs them (llama_sampler_sample has its own).
        size = self._n_vocab if self._grammar else 0
        self._template = np.zeros(size, _CANDIDATE)
        self._template["id"] = np.arange(size, dtype=np.int32)
        self._candidates = self._template.copy()

    def sample(self, context: Context, row: int) -> int | None:
        """Draws a token from batch row `row` and remembers it. None when the grammar leaves no token to draw."""
        if self._chain is None:
            raise BackendError("the sampler is closed")
        if self._grammar is None:
            return int(self._sample(self._chain, context.handle, row))
        return self._sample_constrained(context, row)

    def _sample_constrained(self, context: Context, row: int) -> int | None:
        """Draws freely and asks the grammar about that one token; a refused token is taken out and the draw repeated.

        That is rejection sampling: the result is distributed as if the grammar had been applied to all tokens first
        (truncation by top-k, top-p and the like acts on what has not been refused). After some refusals the grammar
        is applied to all tokens after all, which takes llama.cpp tens of milliseconds.
        """
        logits = context.logits(row)
        refused: list[int] = []
        for _ in range(_REFUSALS):
            token = self._draw(logits, refused)
            if token is None or self._allowed(token, logits[token]):
                break
            refused.append(token)
        else:
            token = self._draw(logits, refused, everywhere=True)
        if token is not None:
            self._low.llama_sampler_accept(self._chain, token)
            self._low.llama_sampler_accept(self._grammar, token)
        return token

    def _draw(self, logits: Any, refused: list[int], *, everywhere: bool = False) -> int | None:
        """A token other than those refused; with `everywhere`, one that the grammar allows. None if there is none."""
        low, data = self._low, self._candidates
        np.copyto(data, self._template)
        data["logit"] = logits
        data["logit"][refused] = -np.inf
        if everywhere:
            self._apply_grammar()
        array = low.llama_token_data_array(
            data=data.ctypes.data_as(low.llama_token_data_p), size=self._n_vocab, selected=-1, sorted=False
        )
        if not np.isfinite(data["logit"]).any():
            return None
        low.llama_sampler_apply(self._chain, ctypes.byref(array))
        chosen = array.data[array.selected]
        return int(chosen.id) if np.isfinite(chosen.logit) else None

    def _apply_grammar(self) -> None:
        """Takes out every candidate that the grammar refuses, some at a time: llama.cpp follows each way in which the
        text so far can be read, and a grammar with very many ways must not hold up everybody else for minutes.
        """
        low, data = self._low, self._candidates
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

    def _allowed(self, token: int, logit: float) -> bool:
        low = self._low
        one = (low.llama_token_data * 1)(low.llama_token_data(id=token, logit=float(logit), p=0.0))
        array = low.llama_token_data_array(data=one, size=1, selected=-1, sorted=False)
        low.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return bool(np.isfinite(one[0].logit))

    def close(self) -> None:
        """Frees the chain. Idempotent."""
        if self._chain:
            self._low.llama_sampler_free(self._chain)
            self._chain = None
        if self._grammar:
            self._low.llama_sampler_free(self._grammar)
            self._grammar = None


def _chain_parts(low: Any, vocab: Vocab, params: SamplingParams, index: int, prompt: Iterable[int]) -> list[Any]:
    parts = []
    if params.logit_bias:
        entries = [low.llama_logit_bias(token=token, bias=bias) for token, bias in params.logit_bias]
        array = (low.llama_logit_bias * len(entries))(*entries)
        parts.append(low.llama_sampler_init_logit_bias(vocab.n_tokens, len(entries), array))
    if params.repetition_penalty != 1.0:
        part = low.llama_sampler_init_penalties(
            vocab.n_tokens, params.repetition_window, params.repetition_penalty, 0.0, 0.0
        )
        for token in prompt:
            low.llama_sampler_accept(part, token)
        parts.append(part)
    if params.presence_penalty or params.frequency_penalty:
        parts.append(
            low.llama_sampler_init_penalties(
                vocab.n_tokens, _ANSWER_WINDOW, 1.0, params.frequency_penalty, params.presence_penalty
            )
        )
    if params.temperature <= 0:
        return [*parts, low.llama_sampler_init_greedy()]
    if params.top_k > 0:
        parts.append(low.llama_sampler_init_top_k(params.top_k))
    if params.typical_p < 1:
        parts.append(low.llama_sampler_init_typical(params.typical_p, 1))
    if params.top_p < 1:
        parts.append(low.llama_sampler_init_top_p(params.top_p, 1))
    if params.min_p > 0:
        parts.append(low.llama_sampler_init_min_p(params.min_p, 1))
    parts.append(low.llama_sampler_init_temp(params.temperature))
    parts.append(low.llama_sampler_init_dist((params.seed + index) % _SEEDS))
    return parts
