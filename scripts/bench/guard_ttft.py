"""What the guard adds to the time to first token: two servers, one with it and one without, asked the same by turns."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench import client


@dataclass(frozen=True, slots=True)
class Added:
    """Milliseconds to the first token, medians over the prompts, and the median of their differences."""

    prompt_tokens: int  # median, by the model's tokenizer
    prompts: int
    off_ms: float
    on_ms: float
    added_ms: float


async def measure(ports: dict[str, int], model: str, prompts: Sequence[str]) -> Added:
    """`ports`: of the servers "off" and "on". Every prompt goes to both, in both orders by turns. Prompts must differ
    from their beginning on, for a prefix that is known need not be read again."""
    times: dict[str, list[float]] = {"off": [], "on": []}
    lengths = []
    for number, prompt in enumerate(prompts):
        for name in ("off", "on") if number % 2 else ("on", "off"):
            messages = [{"role": "user", "content": prompt}]
            body = {"model": model, "messages": messages, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
            answer = await client.ask(ports[name], body)
            times[name].append(1e3 * answer.ttft_s)
            lengths.append(answer.prompt_tokens)
    both = zip(times["on"], times["off"], strict=True)
    return Added(
        int(statistics.median(lengths)),
        len(prompts),
        statistics.median(times["off"]),
        statistics.median(times["on"]),
        statistics.median(on - off for on, off in both),
    )
