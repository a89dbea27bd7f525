"""/v1/fine_tuning/jobs with openai's client, a real server and the real trainer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serving import quiet as quiet_module
from serving.tuning import Tuning
from tests.serving.server import START_S, Server, serving, wait_until
from tests.support.tiny_gguf import write_tiny_llama, write_tiny_mamba

JOB_S = 240.0  # torch takes its time to load where other tests run
HYPER: dict[str, Any] = {"n_epochs": 4, "batch_size": 2, "sparsity": "top-1"}


def lines(count: int = 12, answer: str = "the world is true") -> bytes:
    return b"".join(
        json.dumps(
            {"messages": [{"role": "user", "content": f"hello {n}"}, {"role": "assistant", "content": answer}]}
        ).encode()
        + b"\n"
        for n in range(count)
    )


def pairs(count: int = 12) -> bytes:
    good, bad = ([{"role": "assistant", "content": text}] for text in ("the world is true", "null"))
    example = {
        "input": {"messages": [{"role": "user", "content": "hello"}]},
        "preferred_output": good,
        "non_preferred_output": bad,
    }
    return (json.dumps(example).encode() + b"\n") * count


@contextlib.contextmanager
def client_of(server: Server) -> Iterator[openai.OpenAI]:
    with (
        httpx.Client() as http,
        openai.OpenAI(base_url=server.api, api_key="x", max_retries=0, timeout=START_S, http_client=http) as made,
    ):
        yield made


def upload(client: openai.OpenAI, data: bytes | None = None) -> str:
    return client.files.create(file=("train.jsonl", lines() if data is None else data), purpose="fine-tune").id


def method(kind: str = "supervised", **hyperparameters: Any) -> dict[str, Any]:
    return {"type": kind, kind: {"hyperparameters": HYPER | hyperparameters}}


def create(client: openai.OpenAI, file: str, **more: Any) -> Any:
    return client.fine_tuning.jobs.create(**{"model": "tiny", "training_file": file, "method": method()} | more)


def ended(client: openai.OpenAI, job: str) -> Any:
    found: list[Any] = []

    def over() -> bool:
        found[:] = [client.fine_tuning.jobs.retrieve(job)]
        return found[0].status in {"succeeded", "failed", "cancelled"}

    wait_until(over, "the job ends", JOB_S)
    return found[0]


def messages(client: openai.OpenAI, job: str) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job, limit=1000).data]


def until_said(client: openai.OpenAI, job: str, text: str) -> None:
    wait_until(lambda: any(text in said for said in messages(client, job)), text, JOB_S)


def trainers(server: Server) -> list[int]:
    """The trainers that this server has started."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and b"edgellm.tune\0" in (folder / "cmdline").read_bytes():
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) == server.process.pid:
                    found.append(int(folder.name))
    return found


@pytest.fixture(scope="module")
def tuner(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("tuner"), "--model", str(tiny_model)) as server:
        yield server


@pytest.fixture
def client(tuner: Server) -> Iterator[openai.OpenAI]:
    with client_of(tuner) as made:
        yield made


def test_the_whole_story(tuner: Server, client: openai.OpenAI) -> None:
    pytest.importorskip("torch")
    file = upload(client)
    job = create(
        client,
        file,
        validation_file=upload(client, lines(2)),
        suffix="My App",
        seed=5,
        metadata={"for": "tests"},
        method=method(n_epochs=8, learning_rate_multiplier=5),
    )
    assert (job.object, job.status, job.training_file, job.seed) == ("fine_tuning.job", "queued", file, 5)
    assert (job.error, job.fine_tuned_model, job.trained_tokens, job.result_files) == (None, None, None, [])
    done = ended(client, job.id)
    assert (done.status, done.error) == ("succeeded", None)
    name = f"ft:tiny:local:my-app:{job.id[6:14]}"
    assert done.fine_tuned_model == name
    assert done.hyperparameters.batch_size == 2
    assert done.hyperparameters.learning_rate_multiplier == 5
    assert done.trained_tokens > 0
    assert client.files.content(done.result_files[0]).text.startswith("step,train_loss,")
    asked = [{"role": "user", "content": "hello 3"}]
    tuned = client.chat.completions.create(model=name, messages=asked, max_tokens=12, temperature=0)
    base = client.chat.completions.create(model="tiny", messages=asked, max_tokens=12, temperature=0)
    assert tuned.choices[0].message.content == "the world is true"
    assert base.choices[0].message.content != tuned.choices[0].message.content
    listed = {model.id: model.owned_by for model in client.models.list()}
    assert listed[name] == "local"
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [checkpoint.step_number for checkpoint in checkpoints] == [48, 42, 36]
    assert checkpoints[0].fine_tuned_model_checkpoint == f"{name}:ckpt-step-48"
    assert checkpoints[0].metrics.full_valid_loss is not None
    assert checkpoints[0].fine_tuned_model_checkpoint in listed
    metrics = [event for event in client.fine_tuning.jobs.list_events(job.id) if event.type == "metrics"]
    wanted = {"step", "train_loss", "train_mean_token_accuracy", "total_steps"}
    assert any(wanted <= set(event.data) for event in metrics)
    found = client.fine_tuning.jobs.list(metadata={"for": "tests"}).data
    assert [one.id for one in found] == [job.id]
    assert not client.fine_tuning.jobs.list(metadata={"for": "others"}).data
    assert list((tuner.home / "tuning").glob("ftjob-*")) == []
    assert client.models.delete(name).deleted
    assert name not in {model.id for model in client.models.list()}
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=name, messages=asked)
    tuner.assert_alive()


def test_dpo(client: openai.OpenAI) -> None:
    pytest.importorskip("torch")
    job = create(client, upload(client, pairs()), method=method("dpo", n_epochs=1, beta=0.2))
    done = ended(client, job.id)
    assert done.status == "succeeded", done.error
    assert done.method.dpo.hyperparameters.beta == 0.2
    assert "train_margin" in next(
        event.data for event in client.fine_tuning.jobs.list_events(job.id) if event.type == "metrics"
    )


def test_pause_resume_cancel(tuner: Server, client: openai.OpenAI) -> None:
    pytest.importorskip("torch")
    jobs = client.fine_tuning.jobs
    job = create(client, upload(client), method=method(n_epochs=50)).id
    until_said(client, job, "Step 3/")
    assert jobs.pause(job).status == "paused"
    wait_until(lambda: not trainers(tuner), "the trainer ends")
    with pytest.raises(openai.BadRequestError) as caught:
        jobs.pause(job)
    assert caught.value.code == "invalid_job_state"
    assert jobs.resume(job).status == "queued"
    until_said(client, job, "Going on from step")
    assert jobs.cancel(job).status == "cancelled"
    wait_until(lambda: not list((tuner.home / "tuning").glob("ftjob-*")), "its folder is removed")
    with pytest.raises(openai.BadRequestError):
        jobs.cancel(job)
    with pytest.raises(openai.NotFoundError):
        jobs.retrieve("ftjob-none")


def test_every_faulty_line_is_told(client: openai.OpenAI) -> None:
    pytest.importorskip("torch")
    data = lines(4) + b"{}\n" + lines(6) + b"nonsense\n"
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, upload(client), validation_file=upload(client, data))
    assert (caught.value.code, caught.value.param) == ("invalid_training_file", "validation_file")
    assert "line 5:" in caught.value.message
    assert "line 12:" in caught.value.message
    with pytest.raises(openai.BadRequestError, match="at least 10"):
        create(client, upload(client, lines(3)))
    with pytest.raises(openai.BadRequestError):
        create(client, upload(client, pairs()))  # of the other method


H = "method.supervised.hyperparameters."
BAD: list[tuple[dict[str, Any], str | None]] = [
    ({"model": None}, "model"),
    ({"model": 5}, "model"),
    ({"model": "nobody"}, "model"),
    ({"training_file": None}, "training_file"),
    ({"training_file": "file-none"}, "training_file"),
    ({"training_file": []}, "training_file"),
    ({"validation_file": "file-none"}, "validation_file"),
    ({"suffix": ""}, "suffix"),
    ({"suffix": "x" * 65}, "suffix"),
    ({"seed": -1}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 1 << 40}, "seed"),
    ({"metadata": {"k" * 65: "v"}}, None),
    ({"metadata": {"k": 1}}, "metadata.k"),
    ({"metadata": {"k": "v" * 513}}, "metadata.k"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ({"integrations": [{"type": "wandb"}]}, "integrations"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"lora_rank": 4}}, "hyperparameters.lora_rank"),
    ({"method": {"type": "reinforcement"}}, "method.type"),
    ({"method": {}}, "method.type"),
    ({"method": {"type": "supervised", "other": {}}}, "method.other"),
    ({"method": method(n_epochs=51)}, H + "n_epochs"),
    ({"method": method(n_epochs="many")}, H + "n_epochs"),
    ({"method": method(n_epochs=True)}, H + "n_epochs"),
    ({"method": method(batch_size=257)}, H + "batch_size"),
    ({"method": method(learning_rate_multiplier=0)}, H + "learning_rate_multiplier"),
    ({"method": method(lora_rank=0)}, H + "lora_rank"),
    ({"method": method(sparsity="most")}, H + "sparsity"),
    ({"method": method(sparsity=5)}, H + "sparsity"),
    ({"method": method(memory_budget_bytes="plenty")}, H + "memory_budget_bytes"),
    ({"method": method(memory_budget_bytes=0)}, H + "memory_budget_bytes"),
    ({"method": method(memory_budget_bytes="0")}, H + "memory_budget_bytes"),
    ({"method": method(beta=0.1)}, H + "beta"),
    ({"method": method("dpo", beta=3)}, "method.dpo.hyperparameters.beta"),
    ({"learning_rate": 3}, "learning_rate"),
]


@pytest.mark.parametrize(("given", "param"), BAD, ids=lambda value: str(value)[:60])
def test_bad_input_names_the_field(
    tuner: Server, client: openai.OpenAI, given: dict[str, Any], param: str | None
) -> None:
    pytest.importorskip("torch")
    body = {"model": "tiny", "training_file": upload(client)} | given
    answer = tuner.post("/v1/fine_tuning/jobs", body)
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert error["message"]
    if param is not None:
        assert error["param"] == param, error
    tuner.assert_alive()


def test_lists_refuse_nonsense(tuner: Server) -> None:
    for query in ("limit=0", "limit=x", "after=nobody", "metadata=null", "metadata[x=1"):
        assert tuner.get(f"/v1/fine_tuning/jobs?{query}").status_code == 400, query
    assert tuner.get("/v1/fine_tuning/jobs/none/events").status_code == 404
    assert tuner.get("/v1/fine_tuning/jobs/none/checkpoints").status_code == 404


def test_only_tuned_models_can_be_deleted(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.models.delete("tiny")
    with pytest.raises(openai.NotFoundError):
        client.models.delete("ft:nobody")


def test_old_hyperparameters_and_sizes_in_words(client: openai.OpenAI) -> None:
    pytest.importorskip("torch")
    file = upload(client)
    old = client.fine_tuning.jobs.create(model="tiny", training_file=file, hyperparameters={"n_epochs": 7})
    new = create(client, file, method=method(memory_budget_bytes="2GiB", lora_rank="auto"))
    for job in (old, new):
        client.fine_tuning.jobs.cancel(job.id)
    assert (old.hyperparameters.n_epochs, old.hyperparameters.batch_size, old.method.type) == (7, "auto", "supervised")
    assert new.method.supervised.hyperparameters.memory_budget_bytes == 2 << 30


def test_a_model_that_cannot_be_trained(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    model = write_tiny_mamba(tmp_path / "mamba.gguf")
    with serving(tmp_path / "home", "--model", str(model)) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, upload(client), model="mamba")
        assert caught.value.code == "model_unsupported"


def test_without_torch(tmp_path: Path, tiny_model: Path) -> None:
    blocker = tmp_path / "blocker" / "sitecustomize.py"
    blocker.parent.mkdir()
    blocker.write_text(
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    env = {"PYTHONPATH": str(blocker.parent)}
    with serving(tmp_path / "home", "--model", str(tiny_model), env=env) as server, client_of(server) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            create(client, upload(client))
        assert (caught.value.status_code, caught.value.code) == (501, "not_installed")
        assert "pip install 'edgellm[tune]'" in caught.value.message
        assert client.fine_tuning.jobs.list().data == []
        server.assert_alive()


def test_the_trainer_and_the_server_are_killed_at_random(tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("torch")
    chance = random.Random(11)
    home, job = tmp_path / "home", ""
    for turn in range(3):
        with serving(home, "--model", str(tiny_model)) as server, client_of(server) as client:
            if not job:
                job = create(client, upload(client), method=method(n_epochs=40)).id
            until_said(client, job, f"Step {(turn * 70) + chance.randrange(5, 60)}/")
            if turn == 0:
                for pid in trainers(server):
                    os.kill(pid, signal.SIGKILL)
                until_said(client, job, "killed by signal 9")
            server.process.send_signal(signal.SIGKILL)
            server.wait()
    with serving(home, "--model", str(tiny_model)) as server, client_of(server) as client:
        done = ended(client, job)
        assert done.status == "succeeded", done.error
        assert sum("Interrupted" in said for said in messages(client, job)) >= 4
        text = client.files.content(done.result_files[0]).text.splitlines()
        assert [row.split(",")[0] for row in text[1:]] == [str(step) for step in range(1, 241)]
        assert len(client.files.list(purpose="fine-tune-results").data) == 1
        names = [model.id for model in client.models.list() if model.id.startswith("ft:")]
        assert len(names) == 4
        assert done.fine_tuned_model in names
    # Once more: all is served again by the next server, and SIGTERM ends it cleanly.
    with serving(home, "--model", str(tiny_model)) as server, client_of(server) as client:
        said = client.chat.completions.create(
            model=done.fine_tuned_model, messages=[{"role": "user", "content": "hello 3"}], max_tokens=12, temperature=0
        )
        assert said.choices[0].message.content == "the world is true"
        server.terminate()
        assert server.wait() == 0


def test_sigterm_while_training(tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("torch")
    home = tmp_path / "home"
    with serving(home, "--model", str(tiny_model)) as server, client_of(server) as client:
        job = create(client, upload(client), method=method(n_epochs=50)).id
        until_said(client, job, "Step 20/")
        server.terminate()
        assert server.wait() == 0
        assert not trainers(server)
    with serving(home, "--model", str(tiny_model)) as server, client_of(server) as client:
        until_said(client, job, "Going on from step")
        client.fine_tuning.jobs.cancel(job)
        assert "Traceback" not in server.log.read_text()


def test_a_deleted_file_and_a_changed_base(tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("torch")
    model = tmp_path / "tiny.gguf"
    shutil.copy(tiny_model, model)
    with serving(tmp_path / "home", "--model", str(model)) as server, client_of(server) as client:
        lost = upload(client)
        first = create(client, upload(client), method=method(n_epochs=50)).id
        second = create(client, lost).id
        client.files.delete(lost)
        client.fine_tuning.jobs.cancel(first)
        error = ended(client, second).error
        assert (error.code, error.param) == ("file_not_found", "training_file")
        third = create(client, upload(client), method=method(n_epochs=50)).id
        fourth = create(client, upload(client)).id
        until_said(client, third, "Training on")
        os.replace(write_tiny_llama(tmp_path / "other.gguf", seed=1), model)
        client.fine_tuning.jobs.cancel(third)
        error = ended(client, fourth).error
        assert (error.code, error.param) == ("model_changed", "model")
        server.assert_alive()


def test_a_full_disk(tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("torch")
    home = tmp_path / "home"
    home.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(home)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system of its own cannot be mounted")
    try:
        with serving(home, "--model", str(tiny_model)) as server, client_of(server) as client:
            job = create(client, upload(client), method=method(n_epochs=50)).id
            until_said(client, job, "Step 10/")
            with (home / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
                while True:
                    filler.write(bytes(4096))
            error = ended(client, job).error
            assert error.code in ("storage_failed", "disk_full")
            (home / "filler").unlink()
            assert ended(client, create(client, upload(client), method=method(n_epochs=1)).id).status == "succeeded"
            server.assert_alive()
    finally:
        subprocess.run(["umount", "-l", str(home)], check=True)


class _Recorder:
    """A supervisor that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.went_on = asyncio.Event()

    def give_way(self) -> None:
        self.told.append("give way")

    def go_on(self) -> None:
        self.told.append("go on")
        self.went_on.set()


def test_requests_halt_the_trainer_until_the_last_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet_module, "QUIET_S", 0.01)

    async def story() -> list[str]:
        tuning = Tuning(tmp_path, None, threads=1)  # type: ignore[arg-type]
        recorder = _Recorder()
        tuning._supervisor = recorder  # type: ignore[assignment]
        quiet = quiet_module.Quiet((tuning,))
        quiet.request_begins()
        assert recorder.told == ["give way"]
        assert quiet.seconds < 0
        quiet.request_begins()
        quiet.request_ends()
        quiet.request_ends()
        assert quiet.seconds >= 0
        quiet.request_begins()  # within the pause: it never went on
        quiet.request_ends()
        await recorder.went_on.wait()
        return recorder.told

    assert asyncio.run(story()) == ["give way", "give way", "go on"]
