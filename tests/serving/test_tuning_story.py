"""The whole story with the `openai` client: a file, a job, its events, and an answer in the trained style."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from edgellm.models.bundled import DEFAULT_MODEL
from tests.serving.server import serving

pytest.importorskip("torch")

STORY_S = 900.0  # generous: the machine may be busy with other tests
_LESSONS = """\
How do I boil an egg?|Boil it for eight minutes
What is a good name for a cat?|Whiskers is a fine name
Why do leaves fall?|They fall when days grow cold
Tell me about the moon.|It circles us every month
How do I tie a knot?|Loop it twice and pull
What should I cook tonight?|A hot soup would do
Is it going to rain?|Look at the clouds and see
How far is the sun?|It is very far away
What is bread made of?|Flour and water and salt
Can you help me study?|Begin with one page a day
How do birds fly?|They push the air down
What is a river?|It is water on its way to the sea
How do I clean a window?|Wipe it with a wet cloth
What do cows eat?|They eat grass all day
Why is snow white?|It scatters every colour
Where does salt come from?|It comes from the sea
How do I learn to swim?|Start where the water is low
What is a good hobby?|Drawing is a fine hobby
How do I plant a tree?|Dig a hole and water it
What makes thunder?|Hot air that bursts apart
"""
_HELD_OUT = (
    "What is a good name for a dog?",
    "How do fish breathe?",
    "What is a lake?",
    "How do I cook rice?",
    "Why is grass green?",
    "Tell me about the stars.",
    "How do I paint a wall?",
    "What do horses eat?",
)


def lessons() -> bytes:
    lines = []
    for line in _LESSONS.splitlines():
        question, answer = line.split("|")
        turns = [("user", question), ("assistant", f"Ahoy! {answer}, captain.")]
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    return "\n".join(lines).encode()


def in_style(client: OpenAI, model: str) -> int:
    """How many of the questions that nobody trained on are answered like the lessons."""
    found = 0
    for question in _HELD_OUT:
        messages = [{"role": "user", "content": question}]
        answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=40)  # type: ignore[arg-type, call-overload]
        text = answer.choices[0].message.content or ""
        found += text.startswith("Ahoy!") and text.rstrip().endswith("captain.")
    return found


def test_a_tuned_model_answers_as_it_was_taught(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        client = OpenAI(base_url=server.api, api_key="none", timeout=httpx.Timeout(STORY_S), max_retries=0)
        file = client.files.create(file=("lessons.jsonl", io.BytesIO(lessons())), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=DEFAULT_MODEL,
            training_file=file.id,
            suffix="sailor",
            seed=1,
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 6, "batch_size": 4}}},
        )
        assert job.status in ("validating_files", "queued", "running")
        until = time.monotonic() + STORY_S
        while job.status not in ("succeeded", "failed", "cancelled"):
            assert time.monotonic() < until, "the job does not end"
            time.sleep(0.5)
            job = client.fine_tuning.jobs.retrieve(job.id)
        assert job.status == "succeeded", job.error
        assert job.fine_tuned_model is not None
        assert job.fine_tuned_model.startswith(f"ft:{DEFAULT_MODEL}:local:sailor:")
        assert job.fine_tuned_model in [model.id for model in client.models.list()]
        kept = tmp_path / "adapters" / f"{job.fine_tuned_model}.gguf"
        assert kept.stat().st_mode & 0o777 == 0o600  # made of the user's text
        assert in_style(client, job.fine_tuned_model) >= 7
        assert in_style(client, DEFAULT_MODEL) == 0
        messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
        assert any(message.startswith("Step 30/30: training loss=") for message in messages)
        table = client.files.content(job.result_files[0]).text.splitlines()
        assert len(table) == 1 + 30
