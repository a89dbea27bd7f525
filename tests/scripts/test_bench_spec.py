"""The benchmark of speculative decoding: what it asks, what it reads off servers, and what it makes of answers."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bench import client, spec_report, spec_runs, spec_tasks
from bench.client import Answer, BenchError
from bench.measures import Load
from bench.servers import Limits
from bench.spec_assisted import Assisted, AssistedRun
from bench.spec_identity import Fork, Reader, Reading, Step, first_difference, fitting, noise_limit, unexplained
from bench.spec_runs import Cell, Counts, Results, Side
from bench.spec_tasks import WORKLOADS, Task, share
from hypothesis import given
from hypothesis import strategies as st

from edgellm.backend.batch import Batch
from edgellm.config import load_settings
from edgellm.engine.loaded import load_runner
from edgellm.models.bundled import bundled_path
from edgellm.models.describe import describe

CODE = {"prompt": 'def add(a, b):\n    """ Adds. """\n', "canonical_solution": "    return a + b + 7\n"}
PLAIN = {"prompt": 'def same(a):\n    """ Itself. """\n', "canonical_solution": "    return a\n"}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    def write(name: str, lines: list[str]) -> None:
        (tmp_path / name).write_bytes(gzip.compress("\n".join(lines).encode()))

    codes = [
        row | {"entry_point": f"f_{n}", "prompt": f"# {n}\n{row['prompt']}"} for n in range(82) for row in (PLAIN, CODE)
    ]
    write("HumanEval.jsonl.gz", [json.dumps(row) for row in codes])
    write("gsm8k-train-3000.jsonl.gz", [json.dumps({"question": f"What is {n} + 1?"}) for n in range(3000)])
    tasks = [
        {"instruction": f"Shorten {n}.", "instances": [{"input": "" if n % 2 else f"Text {n}"}]} for n in range(252)
    ]
    write("self-instruct-user-tasks.jsonl.gz", [json.dumps(row) for row in tasks])
    write("wikitext-2-test.txt.gz", [" = Title = ", *(f" {n} <unk> , " + "word " * 80 + "." for n in range(60))])
    return tmp_path


def test_workloads_are_fixed_and_no_request_is_in_two_of_them(texts: Path) -> None:
    made = {name: build(texts) for name, build in WORKLOADS.items()}
    assert {name: len(tasks) > 16 for name, tasks in made.items()} == dict.fromkeys(WORKLOADS, True)
    assert made == {name: build(texts) for name, build in WORKLOADS.items()}
    asked = [task.messages[0]["content"] + task.messages[-1]["content"] for tasks in made.values() for task in tasks]
    assert len(set(asked)) >= len(asked) - 5, "two journeys may be alike by chance"
    assert not any("<unk>" in text for text in asked)
    assert [name for name, tasks in made.items() if tasks[0].temperature is not None] == ["random"]


def test_edits_take_turns_and_predictions_are_the_code(texts: Path) -> None:
    row = CODE | {"entry_point": "add"}
    wanted = [spec_tasks.edit_of(row, number) for number in range(4)]
    assert len(set(wanted)) == 4
    assert "`7` to `8`" in wanted[3]
    assert spec_tasks.edit_of(PLAIN | {"entry_point": "same"}, 3) == spec_tasks.edit_of(
        PLAIN | {"entry_point": "same"}, 0
    )
    for task in spec_tasks.predicted(texts):
        assert task.prediction is not None
        assert task.prediction in task.messages[0]["content"]
    body = spec_tasks.predicted(texts)[0].body("m", 160, 0.5)
    assert body["prediction"] == {"type": "content", "content": spec_tasks.predicted(texts)[0].prediction}
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 160, 0.5)
    assert "prediction" not in spec_tasks.edit(texts)[0].body("m", 160, 0)
    hot = spec_tasks.unforeseeable(texts)
    assert hot[0].body("m", 160, 0)["temperature"] == 1.5
    assert hot[0].body("m", 160, 0)["seed"] != hot[1].body("m", 160, 0)["seed"]


def test_earlier_calls_of_an_agent_are_those_that_were_asked_for(texts: Path) -> None:
    for task in spec_tasks.agent(texts)[:20]:
        _, *turns = task.messages
        assert [message["role"] for message in turns] == (["user", "assistant"] * len(turns))[: len(turns)]
        assert len(turns) % 2 == 1
        for question, reply in zip(turns[::2], turns[1::2], strict=False):
            call = json.loads(reply["content"])["arguments"]
            asked = f"for {call['traveller']} from {call['from']} to {call['to']} on {call['date']}"
            assert asked in question["content"]


def test_a_file_that_is_no_such_text_is_named(texts: Path) -> None:
    (texts / "gsm8k-train-3000.jsonl.gz").write_bytes(gzip.compress(b"{}")[:-4])
    with pytest.raises(BenchError, match="gsm8k"):
        spec_tasks.gsm8k(texts)
    (texts / "wikitext-2-test.txt.gz").unlink()
    with pytest.raises(BenchError, match="wikitext"):
        spec_tasks.quote(texts)


@given(tasks=st.integers(1, 40), number=st.integers(0, 5), counts=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_no_request_is_sent_twice_in_a_round(tasks: int, number: int, counts: list[int]) -> None:
    all_tasks = [Task(({"role": "user", "content": str(n)},)) for n in range(tasks)]
    if sum(counts) > tasks:
        with pytest.raises(BenchError, match="the workload has"):
            share(all_tasks, number, counts)
        return
    shares = share(all_tasks, number, counts)
    assert [len(part) for part in shares] == counts
    sent = [task for part in shares for task in part]
    assert len(set(map(id, sent))) == len(sent)
    if 2 * sum(counts) <= tasks:
        further = [id(task) for part in share(all_tasks, number + 1, counts) for task in part]
        assert not {id(task) for task in sent} & set(further)


def streamed(*chunks: dict[str, object]) -> list[tuple[float, bytes]]:
    body = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)
    return [(1.0, b"HTTP/1.1 200 OK\r\n\r\n" + body)]


def piece(text: str, reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": reason}]}


def test_drafts_are_read_from_the_usage_or_from_the_timings_of_llama_server() -> None:
    details = {"accepted_prediction_tokens": 5, "rejected_prediction_tokens": 2}
    usage = {"prompt_tokens": 3, "completion_tokens": 9, "completion_tokens_details": details}
    ours = client.parse_answer(0.0, streamed(piece("a"), piece("", "stop"), {"choices": [], "usage": usage}))
    assert (ours.accepted_tokens, ours.rejected_tokens, ours.finish_reason) == (5, 2, "stop")
    bare = {"prompt_tokens": 3, "completion_tokens": 9}
    timings = {"predicted_n": 9, "draft_n": 10, "draft_n_accepted": 4}
    last = {"choices": [], "usage": bare, "timings": timings}
    rival = client.parse_answer(0.0, streamed(piece("a"), piece("", "length"), last))
    assert (rival.accepted_tokens, rival.rejected_tokens, rival.finish_reason) == (4, 6, "length")
    silent = {"choices": [], "usage": bare, "timings": {"predicted_n": 9}}
    assert client.parse_answer(0.0, streamed(piece("a"), silent)).accepted_tokens == 0


def test_an_answer_may_end_at_once_where_that_is_expected() -> None:
    segments = streamed(piece("", "stop"), {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}})
    with pytest.raises(BenchError, match="no text"):
        client.parse_answer(0.0, segments)
    answer = client.parse_answer(0.0, segments, may_be_empty=True)
    assert (answer.text, answer.ttft_s, answer.finish_reason) == ("", 1.0, "stop")


def test_proposers_are_told_apart_however_their_counters_are_written() -> None:
    by_name = """# TYPE edgellm_draft_accepted_tokens counter
edgellm_draft_accepted_tokens_total{model="a",proposer="ngram"} 5.0
edgellm_draft_accepted_tokens_total{model="b",proposer="ngram"} 1.0
edgellm_draft_rejected_tokens_total{model="a",proposer="ngram"} 2.0
edgellm_draft_accepted_tokens_created{model="a",proposer="ngram"} 1.7e+09
edgellm_accepted_draft_tokens_total{model="a"} 5.0
"""
    assert spec_runs.proposer_counts(by_name) == {"ngram": Counts(6, 2)}
    by_label = 'x_total{outcome="accepted",proposer="model"} 3.0\nx_total{outcome="rejected",proposer="model"} 4.0\n'
    assert spec_runs.proposer_counts(by_label) == {"model": Counts(3, 4)}
    drafted = 'd_drafted_total{proposer="m"} 9.0\nd_accepted_total{proposer="m"} 4.0\n'
    assert spec_runs.proposer_counts(drafted) == {"m": Counts(4, 5)}
    assert Counts().acceptance is None


@given(st.text(max_size=200))
def test_no_exposition_breaks_the_reading_of_counters(text: str) -> None:
    spec_runs.proposer_counts(text)


def test_sides_differ_by_their_drafting_alone() -> None:
    limits = Limits(2, 8, 4096)
    plain, auto, model = spec_runs.our_sides(["e"], limits, ["auto:--adapt off", "/m/small.gguf"], ["-x"], same=False)
    assert (plain.name, plain.base) == ("edgellm", None)
    assert (auto.name, auto.base) == ("edgellm auto --adapt off", "edgellm")
    assert model.name == "edgellm small"
    assert plain.contender.command[-3:] == ("--draft", "none", "-x")
    assert model.contender.command[-5:] == ("--draft", "/m/small.gguf", "--adapt", "off", "-x")
    assert auto.contender.command[-5:] == ("--draft", "auto", "--adapt", "off", "-x")
    one, other = spec_runs.our_sides(["e"], limits, ["auto"], [], same=True)
    assert one.contender.command == other.contender.command
    rivals = spec_runs.rival_sides(Path("/r"), limits, ["ngram-mod", "ngram-simple:--n 4"], Path("/m/d.gguf"), [])
    assert [side.name for side in rivals[1:]] == [
        "llama-server ngram-mod",
        "llama-server ngram-simple --n 4",
        "llama-server d",
    ]
    assert {side.base for side in rivals[1:]} == {"llama-server"}
    assert rivals[3].contender.command[-6:-2] == ("--spec-type", "draft-simple", "--spec-draft-model", "/m/d.gguf")


def test_a_drafter_that_llama_server_does_not_use_is_noticed() -> None:
    log = """0.01.600.353 I common_speculative_init_result: loading draft model 'small.gguf'
0.05.753.563 E spec common_specu: the target and draft vocabs are not compatible
0.05.753.806 E srv    load_model: failed to initialize speculative decoding context: draft model vocab type must match
"""
    said = spec_runs.refusal(log)
    assert said.startswith("the target and draft vocabs are not compatible; failed to initialize speculative decoding")
    assert not spec_runs.refusal(log.splitlines()[0]), "it was loaded, and no complaint"


@given(one=st.text("ab", max_size=8), other=st.text("ab", max_size=8))
def test_the_first_difference_is_where_common_text_ends(one: str, other: str) -> None:
    at = first_difference(one, other)
    if at is None:
        assert one == other
    else:
        assert one[:at] == other[:at]
        assert one[at : at + 1] != other[at : at + 1]


PIECES = [b"", b"a", b"ab", b"abc", b"b", b"\xc3", b"\xa9"]


def test_the_best_token_that_the_text_begins_with_comes_first() -> None:
    logits = np.array([9, 1, 8, 7.5, 8, 5, 0], np.float32)
    assert fitting(logits, b"abcd", PIECES.__getitem__) == [2, 3], "both are near the best, which shows no text"
    assert fitting(logits, b"aXX", PIECES.__getitem__) == [1], "far from the best, but the only one"
    assert fitting(logits, "é".encode(), PIECES.__getitem__) == [5]
    assert fitting(logits, b"zz", PIECES.__getitem__) == []


def fork(gap: float, worst: float, noise: float) -> Fork:
    plain = Reading((Step(0, 1, 0.0), Step(4, 2, 0.0), Step(9, 3, 0.0)), noise)
    reading = Reading((Step(0, 1, 0.0), Step(4, 5, gap), Step(8, 3, worst)), noise)
    return Fork("edit", "edgellm auto", 3, 4, "one", "other", plain, reading)


def test_rounding_explains_gaps_up_to_twice_the_noise_and_no_others() -> None:
    found = [fork(0.03, 0.04, 0.02), fork(0.01, 0.01, 0.001)]
    assert [one.gap for one in found] == [0.03, 0.01]
    assert noise_limit(found) == pytest.approx(0.04)
    assert not unexplained(found)
    assert "All 2 forks" in spec_report.verdict(found)
    assert "changes no logit" in spec_report.verdict(found), "their answers' own widths made no noise"
    found.append(fork(0.001, 0.05, 0.01))  # right at the fork, and wrong behind it
    assert unexplained(found) == [found[2]]
    assert "BUG: 1 answers" in spec_report.verdict(found)
    assert "edit 3" in spec_report.verdict(found)
    assert spec_report.verdict([]) == "No greedy answer differs."
    table = spec_report.fork_table(found)
    assert table is not None
    assert "0.0500" in table.splitlines()[2]


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    model = bundled_path()
    assert model is not None
    made = Reader(model, 1024, 2)
    yield made
    made.close()


def greedy(reader: Reader, task: Task, most: int) -> Answer:
    """What the model says, by batches of one token in a runner of its own."""
    model = bundled_path()
    assert model is not None
    runner = load_runner(describe(model), load_settings(parallel=1, threads=2, context_tokens=1024))
    context, vocab, batch, prompt = runner.context, runner.model.vocab, Batch(512), reader.prompt(task)
    text, rows, position = b"", prompt, 0
    for count in range(most):
        batch.clear()
        batch.extend(rows, position, 0, outputs=1)
        context.decode(batch)
        position += len(rows)
        token = int(context.logits(len(rows) - 1).argmax())
        if vocab.is_end(token):
            runner.close()
            return Answer(0.0, (1.0,), text.decode(), len(prompt), count + 1, "stop")
        text, rows = text + vocab.piece(token), [token]
    runner.close()
    return Answer(0.0, (1.0,), text.decode(errors="replace"), len(prompt), most, "length")


def test_a_greedy_answer_has_no_gaps_and_a_changed_one_has(reader: Reader) -> None:
    task = Task(({"role": "user", "content": "Say hello in one short sentence."},))
    answer = greedy(reader, task, 48)
    assert answer.finish_reason == "stop"
    reading = reader.read(task, answer)
    assert len(reading.steps) == answer.completion_tokens, "each token, and the end"
    assert reading.worst <= 2 * reading.noise
    assert reading.noise < 0.5
    assert reading.steps[-1].start == len(answer.text.encode())
    words = answer.text.split(" ")
    changed = " ".join([words[0], "zebra", *words[2:]])
    at = first_difference(answer.text, changed)
    assert at is not None
    wrong = reader.read(task, Answer(0.0, (1.0,), changed, 1, answer.completion_tokens + 4, "stop"))
    parted = Fork("edit", "edgellm auto", 0, at, "", "", reading, wrong)
    assert parted.gap > 2, "the model would never have said that"
    assert parted.gap == next(step.gap for step in wrong.steps if step.gap)
    assert unexplained([parted])
    cut = Answer(0.0, (1.0,), answer.text[: len(words[0])], 1, 60, "stop")
    assert reader.read(task, cut).steps[-1].gap > 1, "nor have ended there"
    open_end = Answer(0.0, (1.0,), answer.text[: len(words[0])] + "\ufffd", 1, 60, "length")
    assert reader.read(task, open_end).worst <= 2 * reading.noise, "the rest of a cut character is no text"


def cell(
    tokens: int, seconds: float, *, accepted: int = 0, rejected: int = 0, text: str = "x", ttft_s: float = 1
) -> Cell:
    answer = Answer(0.0, (ttft_s, seconds), text, 5, tokens, "stop", accepted, rejected)
    return Cell((answer, answer), Load(seconds, seconds, 0.0, 0.1), {"ngram": Counts(accepted, rejected)})


SIDES = (
    Side("edgellm", spec_runs.servers.Contender("edgellm", ("e",)), None),
    Side("edgellm auto", spec_runs.servers.Contender("edgellm", ("e",)), "edgellm"),
    Side("llama-server", spec_runs.servers.Contender("llama-server", ("l",)), None),
    Side("llama-server ngram-mod", spec_runs.servers.Contender("llama-server", ("l",)), "llama-server"),
)


def results() -> Results:
    return {
        ("edit", 1): {
            "edgellm": [cell(40, 4), cell(40, 8)],
            "edgellm auto": [cell(40, 2, accepted=30, rejected=10), cell(40, 2, accepted=30, text="y")],
            "llama-server": [cell(40, 8), cell(40, 8)],
            "llama-server ngram-mod": [cell(40, 10), cell(40, 4)],
        }
    }


def test_ratios_are_taken_round_by_round() -> None:
    found = results()
    sides = found["edit", 1]
    assert spec_report.ratios(sides, "edgellm auto", "edgellm", spec_report.speed) == [2, 4]
    assert spec_report.same_texts(sides, "edgellm auto", "edgellm") == 0.5
    assert spec_report.same_texts(sides, "edgellm auto", "nobody") is None
    auto = sides["edgellm auto"]
    assert [one.tokens_a_step for one in auto] == [4, 4]
    assert spec_report.drafts_of(auto).acceptance == pytest.approx(120 / 140)
    assert spec_report.proposers_of(auto) == {"ngram": Counts(60, 10)}
    ours = spec_report.speed_table(found, SIDES, "edgellm")
    assert ours is not None
    assert "3.00 (2.00-4.00)" in ours
    assert "llama" not in ours
    rival = spec_report.speed_table(found, SIDES, "llama-server")
    assert rival is not None
    assert rival.splitlines()[2].split("|")[-2].strip() == "3.50 (2.00-5.00)", "ours over it"
    assert spec_report.speed_table(found, SIDES[:1], "edgellm") is None
    assert spec_report.others_cores(found) == pytest.approx(0.05)


def test_the_summary_is_json_and_names_every_server() -> None:
    found = json.loads(json.dumps(spec_report.as_json(results(), SIDES)))
    assert [one["server"] for one in found] == [side.name for side in SIDES]
    assert found[1]["speed_ratios"] == [2, 4]
    assert found[1]["proposers"] == {"ngram": {"accepted": 60, "rejected": 10}}
    assert "speed_ratios" not in found[0]
    forks = json.loads(json.dumps(spec_report.identity_json([fork(0.03, 0.04, 0.02)])))
    assert (forks["bugs"], forks["forks"][0]["at"]) == (0, 4)


def test_assistants_are_measured_by_calls_of_the_model() -> None:
    one = Assisted(
        "edit", plain_s=10, plain_tokens=100, assisted_s=5, assisted_tokens=100, calls=40, drafted=80, same=True
    )
    assert one.ratio == 2
    assert one.drafts == Counts(60, 20)
    run = AssistedRun((one, one), 0.0)
    table = spec_report.assisted_table(run, results(), "edgellm auto")
    assert [part.strip() for part in table.splitlines()[2].split("|")[3:9]] == [
        *("10.0", "20.0", "2.00 (2.00-2.00)", "0.75", "2.50", "1.00")
    ]
    assert spec_report.assisted_json(run)["edit"]["tokens_per_s"] == {"alone": 10, "assisted": 20}
