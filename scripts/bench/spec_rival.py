"""Hugging Face's assisted generation across vocabularies, for scripts/bench_spec, in an environment of its own.

Its argument is a file with one JSON object (see bench/spec_assisted.py); prints events, one JSON object a line. Each
prompt is answered with the assistant and without, in turn, by weights that transformers dequantises from GGUF files.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers


def report(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def load(path: str, dtype: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a GGUF file."""
    place = {"pretrained_model_name_or_path": Path(path).parent, "gguf_file": Path(path).name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=getattr(torch, dtype))
    return model.eval(), transformers.AutoTokenizer.from_pretrained(**place)


class Calls:
    """Counts the calls of the model that verifies, and the tokens drafted for them."""

    def __init__(self, model: Any) -> None:
        model.register_forward_pre_hook(self._called, with_kwargs=True)
        self.start(0)

    def start(self, prompt_tokens: int) -> None:
        self.count, self.rows, self._prompt_tokens = 0, 0, prompt_tokens

    @property
    def drafted(self) -> int:
        """Rows beyond the prompt and one token a call behind it."""
        return self.rows - self._prompt_tokens - (self.count - 1)

    def _called(self, _: Any, positional: Any, named: Any) -> None:
        ids = named["input_ids"] if named.get("input_ids") is not None else positional[0]
        self.count, self.rows = self.count + 1, self.rows + ids.shape[1]


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(task["threads"])
    model, tokenizer = load(task["model"], task["dtype"])
    assistant, assistant_tokenizer = load(task["assistant"], task["dtype"])
    # Both files carry sampling settings of their own; the ends of answers are kept.
    ends = {"pad_token_id": tokenizer.pad_token_id or tokenizer.eos_token_id, "eos_token_id": task["end_tokens"]}
    greedy = {
        "max_new_tokens": task["max_tokens"],
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }
    pair = {"assistant_model": assistant, "tokenizer": tokenizer, "assistant_tokenizer": assistant_tokenizer}
    calls = Calls(model)

    def answer(index: int, assisted: bool) -> None:
        ids = tokenizer(task["prompts"][index], return_tensors="pt", add_special_tokens=False)
        prompt_tokens = ids["input_ids"].shape[1]
        calls.start(prompt_tokens)
        started = time.perf_counter()
        found = model.generate(**ids, **ends, **greedy, **(pair if assisted else {}))
        seconds = time.perf_counter() - started
        tokens = found[0, prompt_tokens:]
        report(
            "answer",
            index=index,
            assisted=assisted,
            seconds=seconds,
            tokens=len(tokens),
            calls=calls.count,
            drafted=calls.drafted,
            text=tokenizer.decode(tokens, skip_special_tokens=True),
        )

    answer(0, True)  # not counted: the first use of everything
    report("begun")
    for index in range(len(task["prompts"])):
        for assisted in (index % 2 == 0, index % 2 == 1):
            answer(index, assisted)
    report("done")


if __name__ == "__main__":
    main()
