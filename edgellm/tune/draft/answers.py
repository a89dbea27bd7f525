"""Prompts and answers in the target's tokens; the target itself answers where the data do not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from edgellm.backend.vocab import Vocab
from edgellm.chat.template import ChatTemplate
from edgellm.config import load_settings
from edgellm.engine.loaded import load_runner
from edgellm.engine.runner import Runner
from edgellm.engine.types import ErrorEvent, Event, GenerateRequest, SamplingParams, TokenEvent
from edgellm.errors import ChatTemplateError, TrainingDataError
from edgellm.models.describe import describe
from edgellm.tune.coding import ModelCoder
from edgellm.tune.draft.samples import Row

_TOGETHER = 8
_WAITING = 32  # requests handed over at a time


def encode_messages(rows: Sequence[Row], vocab: Vocab, target: Path) -> None:
    """Sets the tokens of rows that have messages: an assistant's last message is the answer.

    Raises TrainingDataError where the target has no template, or it fails.
    """
    if not any(row.messages for row in rows):
        return
    source = describe(target).chat_template
    if source is None:
        raise TrainingDataError([(0, "has messages, but the target has no chat template")], "data")
    bos, eos = (vocab.special_piece(token) for token in (vocab.bos, vocab.eos))
    with ChatTemplate(source, bos_token=bos, eos_token=eos) as template:
        coder = ModelCoder(vocab, template)
        for number, row in enumerate(rows, 1):
            if not row.messages:
                continue
            answered = row.messages[-1]["role"] == "assistant"
            try:
                text = coder.render(row.messages[:-1] if answered else row.messages, (), prompt=True)
            except ChatTemplateError as error:
                raise TrainingDataError([(number, str(error))], "data") from None
            row.prompt = coder.tokenize(text)
            if answered:
                row.answer = vocab.tokenize(row.messages[-1]["content"], add_special=False, parse_special=False)


def answer(
    rows: Sequence[Row],
    target: Path,
    *,
    most_tokens: int,
    threads: int,
    report: Callable[[int, int], None],
    stopped: Callable[[], bool],
) -> int:
    """Sets the answers that lack, as the target gives them greedily; how many there were.

    `report` is told how many of how many are done. Ends early if `stopped` says so. Raises as `load_runner` does.
    """
    lacking = [row for row in rows if not row.answer]
    if not lacking:
        return 0
    settings = load_settings(parallel=_TOGETHER, threads=threads, draft="none")
    runner = load_runner(describe(target), settings)
    try:
        done = 0
        for start in range(0, len(lacking), _WAITING):
            part = lacking[start : start + _WAITING]
            for row in part:
                _submit(runner, row, most_tokens)
            while runner.has_work and not stopped():
                runner.step()
            if stopped():
                break
            done += len(part)
            report(done, len(lacking))
    finally:
        runner.close()
    return done


def _submit(runner: Runner, row: Row, most_tokens: int) -> None:
    """A prompt that is too long for the context is left without an answer."""
    answer = row.answer

    def take(events: list[Event]) -> None:
        for event in events:
            if isinstance(event, TokenEvent):
                answer.append(event.token)
            elif isinstance(event, ErrorEvent):
                answer.clear()

    request = GenerateRequest(tuple(row.prompt), most_tokens, sampling=SamplingParams(temperature=0.0))
    runner.submit(request, take)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """As lines that `read_rows` reads. Raises OSError."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"kind": row.kind, "prompt": row.prompt, "answer": row.answer}) + "\n")
