"""What scripts/bench_spec asks for: workloads of chat requests, from text in a folder and from fixed sentences.

The folder holds HumanEval.jsonl.gz, gsm8k-train-3000.jsonl.gz, self-instruct-user-tasks.jsonl.gz and
wikitext-2-test.txt.gz. The first rows of each file are left alone, for policies to be tuned on and drafters to learn
from; workloads take different rows of HumanEval.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import prompts
from bench.client import BenchError, Message

_GSM8K, _SELF_INSTRUCT, _QUOTED = slice(2800, None), slice(60, None), slice(40, None)
_COMPLETED, _EDITED, _PREDICTED = slice(40, 80), slice(80, 122), slice(122, None)  # of HumanEval
_TEXT_CHARACTERS = 1200
_RANDOM_TEMPERATURE = 1.5


@dataclass(frozen=True)
class Task:
    """One chat request. `prediction` is OpenAI's: text that the answer may resemble."""

    messages: tuple[Message, ...]
    prediction: str | None = None
    temperature: float | None = None  # None: that of the run

    def body(self, model: str, max_tokens: int, temperature: float) -> dict[str, Any]:
        """As JSON. The seed goes with the messages, so that both sides draw alike."""
        seed = zlib.crc32(json.dumps(self.messages).encode()) >> 1
        body: dict[str, Any] = {"model": model, "messages": list(self.messages), "max_tokens": max_tokens, "seed": seed}
        body["temperature"] = temperature if self.temperature is None else self.temperature
        if self.prediction is not None:
            body["prediction"] = {"type": "content", "content": self.prediction}
        return body


def _ask(text: str, **fields: Any) -> Task:
    return Task(({"role": "user", "content": text},), **fields)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Gzipped JSON lines. Raises BenchError."""
    try:
        return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines() if line.strip()]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise BenchError(f"{path}: not gzipped JSON lines: {error}") from None


def _human_eval(folder: Path, rows: slice) -> list[dict[str, Any]]:
    return read_rows(folder / "HumanEval.jsonl.gz")[rows]


def gsm8k(folder: Path) -> list[Task]:
    """Questions of grade school mathematics: free text with numbers that come again."""
    return [_ask(row["question"]) for row in read_rows(folder / "gsm8k-train-3000.jsonl.gz")[_GSM8K]]


def human_eval(folder: Path) -> list[Task]:
    """Functions to be written, after their signature and docstring."""
    wanted = "Complete this Python function. Answer with the whole function in a code block.\n\n```python\n"
    return [_ask(f"{wanted}{row['prompt']}```") for row in _human_eval(folder, _COMPLETED)]


def edit_of(row: dict[str, Any], number: int) -> str:
    """One change to the code of a row; kinds take turns."""
    name = row["entry_point"]
    constant = re.search(r"\b\d+\b", row["canonical_solution"])
    edits = [
        f"Rename the function `{name}` to `{name}_checked`.",
        "Add type hints to all parameters and to the result.",
        "Add the line `Changes none of its arguments.` at the end of the docstring.",
        f"In the body, change the first constant `{constant[0]}` to `{int(constant[0]) + 1}`." if constant else "",
    ]
    return edits[number % len(edits)] or edits[0]


def _edits(rows: Sequence[dict[str, Any]], *, predicted: bool) -> list[Task]:
    tasks = []
    for number, row in enumerate(rows):
        code = row["prompt"] + row["canonical_solution"]
        text = f"Here is a Python function.\n\n```python\n{code}```\n\n{edit_of(row, number)} "
        text += "Leave everything else as it is. Answer with the whole code and nothing else."
        tasks.append(_ask(text, prediction=code if predicted else None))
    return tasks


def edit(folder: Path) -> list[Task]:
    """Code given back with one small change."""
    return _edits(_human_eval(folder, _EDITED), predicted=False)


def predicted(folder: Path) -> list[Task]:
    """The same with the code sent along as OpenAI's `prediction`, of other functions."""
    return _edits(_human_eval(folder, _PREDICTED), predicted=True)


def self_instruct(folder: Path) -> list[Task]:
    """Everyday instructions that come with a text: rewriting, summarising, correcting."""
    tasks = []
    for row in read_rows(folder / "self-instruct-user-tasks.jsonl.gz")[_SELF_INSTRUCT]:
        given = row["instances"][0]["input"].strip()
        if given and len(given) <= _TEXT_CHARACTERS:
            tasks.append(_ask(f"{row['instruction']}\n\n{given}"))
    return tasks


def quote(folder: Path) -> list[Task]:
    """Paragraphs to be repeated with their spacing put right."""
    path = folder / "wikitext-2-test.txt.gz"
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BenchError(f"{path}: not gzipped text: {error}") from None
    wanted = "Repeat this text word for word, but without the spaces before punctuation marks:\n\n"
    paragraphs = [line.strip().replace("<unk>", "Ashby") for line in lines if 300 < len(line) < 900]
    return [_ask(wanted + paragraph) for paragraph in paragraphs[_QUOTED]]


_TOOLS = (
    "You are an assistant that acts only through tools. Answer every request with one JSON object and nothing else, as "
    'in {"tool": "book_travel", "arguments": {"traveller": "...", "from": "...", "to": "...", "date": "YYYY-MM-DD", '
    '"class": "second", "notify": {"channel": "email", "address": "..."}}}.'
)
_PLACES = (
    "Lisbon",
    "Porto",
    "Madrid",
    "Lyon",
    "Geneva",
    "Turin",
    "Munich",
    "Prague",
    "Vienna",
    "Krakow",
    "Oslo",
    "Riga",
)
_NAMES = ("Ada Moreira", "Jonas Weber", "Lucia Ferri", "Piotr Nowak", "Marta Silva", "Ingrid Dahl", "Noor Aziz")


def agent(folder: Path) -> list[Task]:
    """Calls of one tool with changing arguments, after earlier turns that called it. Needs nothing of the folder."""
    return [_agent_turns(number) for number in range(240)]


def _agent_turns(number: int) -> Task:
    choose = random.Random(f"agent {number}")
    messages: list[Message] = [{"role": "system", "content": _TOOLS}]
    booked: dict[str, Any] = {}
    for _ in range(2 + number % 3):
        if booked:
            messages.append({"role": "assistant", "content": json.dumps({"tool": "book_travel", "arguments": booked})})
        name, (start, end) = choose.choice(_NAMES), choose.sample(_PLACES, 2)
        date = f"2026-{choose.randint(1, 12):02}-{choose.randint(1, 28):02}"
        address = f"{name.split()[0].lower()}@example.org"
        text = f"Book a journey for {name} from {start} to {end} on {date}, second class; notify {address} by email."
        messages.append({"role": "user", "content": text})
        notify = {"channel": "email", "address": address}
        booked = {"traveller": name, "from": start, "to": end, "date": date, "class": "second", "notify": notify}
    return Task(tuple(messages))


def unforeseeable(folder: Path) -> list[Task]:
    """Text drawn at a high temperature, which nothing can foresee. Needs nothing of the folder."""
    tasks = [prompts.short_prompt(f"random {number}") for number in range(240)]
    return [Task(tuple(messages), temperature=_RANDOM_TEMPERATURE) for messages in tasks]


WORKLOADS: dict[str, Callable[[Path], list[Task]]] = {
    "gsm8k": gsm8k,
    "humaneval": human_eval,
    "edit": edit,
    "predicted": predicted,
    "selfinstruct": self_instruct,
    "quote": quote,
    "agent": agent,
    "random": unforeseeable,
}


def share(tasks: Sequence[Task], number: int, counts: Sequence[int]) -> list[list[Task]]:
    """Tasks for each of the cells of round `number` (from 0), counts[i] for the i-th, none twice in a round.

    Later rounds take further tasks and begin anew when there are no more: servers are started afresh each round. Raises
    BenchError if there are too few for a round.
    """
    a_round = sum(counts)
    if a_round > len(tasks):
        raise BenchError(f"{a_round} requests a round, but the workload has {len(tasks)}")
    taken = iter([tasks[(number * a_round + index) % len(tasks)] for index in range(a_round)])
    return [[next(taken) for _ in range(count)] for count in counts]
