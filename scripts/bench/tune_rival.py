"""One run of PEFT or TRL for scripts/bench_tune, in a process and an environment of its own.

Its argument is a file with one JSON object (see bench/tune_ways.py); prints events, one JSON object a line, as
`python -m edgellm.tune` does.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader

_IGNORED = -100  # a label that nothing is learnt of


def report(event: str, **fields: Any) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def convert(task: dict[str, Any]) -> None:
    """The GGUF file's weights as transformers dequantises them, in a folder from which rivals load at once."""
    source, folder = Path(task["gguf"]), task["model"]
    place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    found = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = type(found.config).from_dict({**found.config.to_dict(), "quantization_config": None})
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(found.state_dict())  # what was read from GGUF counts as quantised and refuses to be saved
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
    report("done")


def read_sequences(path: str, name: str) -> list[dict[str, list[int]]]:
    """Token ids, and labels: the same where an answer is, else _IGNORED."""
    arrays = np.load(path)
    ends = np.cumsum(arrays[f"{name}_lengths"])[:-1]
    tokens = arrays[f"{name}_tokens"].astype(np.int64)
    labels = np.where(arrays[f"{name}_mask"], tokens, _IGNORED)
    pairs = zip(np.split(tokens, ends), np.split(labels, ends), strict=True)
    return [{"input_ids": ids.tolist(), "labels": aims.tolist()} for ids, aims in pairs]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Padded to the longest, at the right, as transformers' own collators do."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([one + [filler] * (longest - len(one)) for one in values])

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": padded(ids, 0),
        "attention_mask": padded([[1] * len(one) for one in ids], 0),
        "labels": padded([row["labels"] for row in rows], _IGNORED),
    }


@torch.no_grad()
def validate(model: Any, sequences: list[dict[str, list[int]]]) -> tuple[float, float]:
    """Mean loss and accuracy over the answers' tokens; logits are made for these alone, so that memory is no issue."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for sequence in sequences:
        labels = torch.tensor(sequence["labels"])
        learnt = torch.nonzero(labels != _IGNORED)[:, 0]
        ids = torch.tensor([sequence["input_ids"]])
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=learnt - 1).logits[0].float()
        loss += float(torch.nn.functional.cross_entropy(logits, labels[learnt], reduction="sum"))
        right += int((logits.argmax(1) == labels[learnt]).sum())
        count += len(learnt)
    model.train()
    return loss / count, right / count


class Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Tells of steps, and validates between them, on a clock that stands still meanwhile."""

    def __init__(self, sequences: list[dict[str, list[int]]], validations: int) -> None:
        self._sequences = sequences
        self._validations = validations  # over the whole run
        self._points: set[int] = set()
        self._mark = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        total = state.max_steps
        self._points = {round(total * part / self._validations) for part in range(1, self._validations + 1)}
        trained = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
        report("begun", steps=total, parameters=trained)
        self._validate(model, 0)
        self._mark = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step = state.global_step
        report("step", step=step, seconds=time.monotonic() - self._mark)
        if step in self._points:
            self._validate(model, step)
        self._mark = time.monotonic()

    def _validate(self, model: Any, step: int) -> None:
        if self._sequences:
            loss, accuracy = validate(model, self._sequences)
            report("validation", step=step, loss=loss, accuracy=accuracy)


class OrderedTrainer(transformers.Trainer):  # type: ignore[misc]
    """transformers' Trainer on given batches, one after the other."""

    def __init__(self, steps: list[list[int]], **arguments: Any) -> None:
        self._steps = steps
        super().__init__(**arguments)

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, batch_sampler=self._steps, collate_fn=collate)  # type: ignore[arg-type]


def with_trainer(task: dict[str, Any], watch: Watch) -> transformers.Trainer:
    """PEFT's LoRA with transformers' Trainer; AdamW and the rate of each step are edgellm's."""
    import peft

    narrow = task["dtype"] == "bfloat16"
    dtype = torch.bfloat16 if narrow else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(task["model"], dtype=dtype)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=task["rank"],
        lora_alpha=task["alpha"],
        lora_dropout=0.0,
        target_modules=task["modules"],
    )
    model = peft.get_peft_model(model, config)
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.0, betas=(0.9, 0.99))
    rates = [*task["rates"], 0.0]  # it is asked once more behind the last step
    arguments = transformers.TrainingArguments(
        output_dir=task["scratch"],
        num_train_epochs=1,  # the batches are those of all epochs
        max_grad_norm=1.0,
        bf16=narrow,
        seed=task["seed"],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return OrderedTrainer(
        task["batches"],
        model=model,
        args=arguments,
        train_dataset=read_sequences(task["tokens"], "training"),
        optimizers=(optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, rates.__getitem__)),
        callbacks=[watch],
    )


def with_trl(task: dict[str, Any], watch: Watch) -> transformers.Trainer:
    """TRL with its defaults and PEFT's; only data, rate and epochs are ours (and that nothing is saved)."""
    import datasets
    import peft
    import trl

    arguments = trl.SFTConfig(
        output_dir=task["scratch"],
        num_train_epochs=task["epochs"],
        learning_rate=task["rate"],
        seed=task["seed"],
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return trl.SFTTrainer(
        model=task["model"],
        args=arguments,
        train_dataset=datasets.Dataset.from_list(read_sequences(task["tokens"], "training")),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM"),
        callbacks=[watch],
    )


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(task["threads"])
    transformers.set_seed(task["seed"])
    if task["kind"] == "convert":
        convert(task)
        return
    sequences = read_sequences(task["tokens"], "validation") if task["validations"] else []
    watch = Watch(sequences, task["validations"])
    trainer = (with_trl if task["kind"] == "trl" else with_trainer)(task, watch)
    trainer.train()
    report("done")


if __name__ == "__main__":
    main()
