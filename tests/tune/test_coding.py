"""Masks: exactly the tokens that the served model would have to write."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.models.bundled import bundled_path
from edgellm.tune.coding import ModelCoder, encode
from edgellm.tune.examples import Conversation
from edgellm.tune.faults import ExampleError
from tests.tune.conftest import QWEN, QWEN3_LIKE, MakeCoder

TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"q": "x"}'}}
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
words = st.text(st.characters(codec="utf-8", exclude_characters="<>", exclude_categories=["Cc"]), min_size=1)
texts = words.map(str.strip).filter(lambda text: text and not text[0].isspace())


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def conversation(*messages: dict[str, Any], trained: tuple[int, ...] | None = None, tools: Any = ()) -> Conversation:
    answers = tuple(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return Conversation(messages, answers if trained is None else trained, tuple(tools))


def spans(coder: ModelCoder, mask: Any, tokens: Any) -> list[str]:
    """The text of each run of marked tokens."""
    runs: list[list[int]] = []
    for at, marked in enumerate(mask):
        if marked:
            runs[-1:] = [[*runs[-1], at]] if runs and runs[-1][-1] == at - 1 else [*runs[-1:], [at]]
    return [coder.spell([int(tokens[at]) for at in run]).decode("utf-8", "replace") for run in runs]


def spelled(coder: ModelCoder, text: str) -> str:
    """The text, without what the vocabulary cannot spell (SmolLM2's lacks some bytes)."""
    return coder.spell(coder.tokenize(text, start=False)).decode("utf-8", "replace")


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(st.tuples(texts, texts, st.booleans()), min_size=1, max_size=4))
def test_exactly_the_answers_are_marked(coder: ModelCoder, turns: list[tuple[str, str, bool]]) -> None:
    messages = [make(text) for question, answer, _ in turns for make, text in ((user, question), (assistant, answer))]
    trained = tuple(2 * turn + 1 for turn, (_, _, weight) in enumerate(turns) if weight) or (len(messages) - 1,)
    found = encode(conversation(*messages, trained=trained), coder)
    end = "<end_of_turn>" if "<end_of_turn>" in coder.render([user("")], (), prompt=True) else "<|im_end|>"
    wanted = [spelled(coder, messages[index]["content"] + end) for index in trained]
    assert spans(coder, found.mask, found.tokens) == wanted
    assert not found.mask[0]
    assert found.untrained == 0


@settings(max_examples=60, deadline=None)
@given(question=texts, answer=texts)
def test_what_precedes_an_answer_is_the_prompt_that_the_server_makes(
    coder: ModelCoder, question: str, answer: str
) -> None:
    found = encode(conversation(user(question), assistant(answer)), coder)
    prompt = coder.tokenize(coder.render([user(question)], (), prompt=True))
    start = int(found.mask.argmax())
    assert found.tokens[:start].tolist() == prompt
    assert coder.is_end(int(found.tokens[found.mask][-1]))


@pytest.mark.parametrize("answer", ["\n\nYes.", "\nYes.", " Yes."])
def test_an_answer_that_would_merge_with_its_prompt_is_tokenised_apart(smol: ModelCoder, answer: str) -> None:
    messages = (user("Well?"), assistant(answer), user("Sure?"), assistant("Quite."))
    found = encode(conversation(*messages), smol)
    prompt = smol.tokenize(smol.render(messages[:1], (), prompt=True))
    assert found.tokens[: len(prompt)].tolist() == prompt
    assert spans(smol, found.mask, found.tokens) == [f"{answer}<|im_end|>", "Quite.<|im_end|>"]


def test_of_a_template_that_rewrites_earlier_turns_what_stands_is_learnt(make_coder: MakeCoder) -> None:
    coder = make_coder(bundled_path(), QWEN3_LIKE)
    messages = (user("One?"), assistant("1"), user("Two?"), assistant("2"))
    found = encode(conversation(*messages), coder)
    assert spans(coder, found.mask, found.tokens) == ["<think>\n\n</think>\n\n2<|im_end|>"]
    assert found.untrained == 1
    with pytest.raises(ExampleError, match="cannot be told apart"):
        encode(conversation(*messages, trained=(1,)), coder)
    coder = make_coder(bundled_path(), QWEN3_LIKE.replace("loop.last", "loop.last and 'x' in m.content"))
    found = encode(conversation(*messages, user("Three?"), assistant("x"), user("Four?"), assistant("4")), coder)
    assert spans(coder, found.mask, found.tokens) == ["1<|im_end|>", "2<|im_end|>", "4<|im_end|>"]
    assert found.untrained == 1


def test_a_generation_prompt_that_the_conversation_lacks_is_refused(make_coder: MakeCoder) -> None:
    coder = make_coder(bundled_path(), QWEN3_LIKE.replace("assistant\n{% endif %}", "assistant\n<plan>{% endif %}"))
    with pytest.raises(ExampleError, match="cannot be told apart"):
        encode(conversation(user("One?"), assistant("1")), coder)


def test_an_answer_that_the_template_leaves_open_gets_an_end(make_coder: MakeCoder) -> None:
    coder = make_coder(bundled_path(), PLAIN)
    found = encode(conversation(user("One?"), assistant("1"), user("Two?"), assistant("2")), coder)
    first, last = spans(coder, found.mask, found.tokens)
    assert first.rstrip("\n") == " 1"
    assert last == f" 2\n\n{coder.spell([coder.end_token or 0]).decode()}"
    assert len(found.mask) == len(found.tokens)


def test_an_answer_that_the_template_drops_is_refused(make_coder: MakeCoder) -> None:
    coder = make_coder(bundled_path(), PLAIN.replace("{{ m.content }}\n\n", "{% if m.role == 'user' %}x{% endif %}"))
    with pytest.raises(ExampleError, match="nothing is left"):
        encode(conversation(user("One?"), assistant("1")), coder)


def test_a_template_that_refuses_the_messages_says_why(make_coder: MakeCoder) -> None:
    coder = make_coder(bundled_path(), "{{ raise_exception('roles must alternate') if messages | length > 1 }}x")
    with pytest.raises(ExampleError, match="roles must alternate"):
        encode(conversation(user("One?"), assistant("1")), coder)


def test_tool_calls_are_answers(coder: ModelCoder) -> None:
    called = {"role": "assistant", "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "42"}
    found = encode(conversation(user("Look."), called, result, assistant("It is 42."), tools=[TOOL]), coder)
    call, answer = spans(coder, found.mask, found.tokens)
    assert "<tool_call>" in call
    assert '"name": "look_up", "arguments": {"q": "x"}' in call
    assert answer.startswith("It is 42.")
    assert "look_up" in coder.spell([int(token) for token in found.tokens[: int(found.mask.argmax())]]).decode()


def test_the_bundled_and_the_qwen_template_mark_the_same_words(smol: ModelCoder, make_coder: MakeCoder) -> None:
    messages = (user("One?"), assistant("1"))
    texts = [spans(coder, *_parts(coder, messages)) for coder in (smol, make_coder(QWEN))]
    assert texts == [["1<|im_end|>"]] * 2


def _parts(coder: ModelCoder, messages: tuple[dict[str, Any], ...]) -> tuple[Any, Any]:
    found = encode(conversation(*messages), coder)
    return found.mask, found.tokens
