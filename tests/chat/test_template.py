"""Chat templates in their process: what they print, and what they must not get away with."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edgellm.chat.template import CHATML, ChatTemplate, TemplateCaps, caps
from edgellm.errors import ChatTemplateError
from tests.chat.grammars import Vocabulary

USER = {"role": "user", "content": "hi"}
Make = Callable[..., ChatTemplate]

HERMES = """\
{%- if tools %}
    {{- '<s>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{% endif %}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- '</s>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<s>tool ' + message.content + '</s>\\n' }}
        {%- continue %}
    {%- endif %}
    {%- if message.role != 'system' or not tools %}
        {{- '<s>' + message.role + '\\n' + message.content }}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '</s>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}
"""

TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"q": "é<b>"}'}}
CALLED = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "42"}]},
]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[ChatTemplate] = []

    def make(source: str | None, **options: Any) -> ChatTemplate:
        made.append(ChatTemplate(source, bos_token="<bos>", eos_token="<eos>", **options))
        return made[-1]

    yield make
    for template in made:
        template.close()


def test_the_bundled_model(make: Make, vocabulary: Vocabulary) -> None:
    template = make(vocabulary.chat_template)
    assert template.caps() == TemplateCaps(system=True, tools=False, tool_calls=False, tool_role=True, parts=False)
    assert template.render_sync([USER]).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert template.render_sync([USER], add_generation_prompt=False).endswith("hi<|im_end|>\n")


def test_tools_calls_and_results_reach_the_template(make: Make) -> None:
    template = make(HERMES)
    assert template.caps() == TemplateCaps(system=True, tools=True, tool_calls=True, tool_role=True, parts=False)
    assert template.render_sync(CALLED, tools=TOOLS) == (
        "<s>system\nBe brief.\n"
        '{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}\n</s>\n'
        "<s>user\nhi</s>\n"
        '<s>assistant\n<tool_call>\n{"name": "look_up", "arguments": {"q": "é<b>"}}\n</tool_call></s>\n'
        "<s>tool 42</s>\n<s>assistant\n"
    )


def test_without_tools_in_the_template_they_are_put_into_text(make: Make) -> None:
    text = make(CHATML).render_sync([*CALLED, {"role": "tool", "content": "43"}], tools=TOOLS)
    system, user, assistant, results, _ = text.split("<|im_start|>")[1:]
    assert system.startswith("system\nBe brief.\n\nYou may call")
    assert '{"type": "function", "function": {"name": "look_up"' in system
    assert user == "user\nhi<|im_end|>\n"
    assert (
        assistant == 'assistant\n<tool_call>\n{"name": "look_up", "arguments": {"q": "é<b>"}}\n</tool_call><|im_end|>\n'
    )
    assert results == "user\n<tool_response>\n42\n</tool_response>\n<tool_response>\n43\n</tool_response><|im_end|>\n"


def test_a_template_without_system_messages_gets_them_in_the_users(make: Make) -> None:
    template = make(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "[{{ m.role }}: {{ m.content }}]{% endfor %}"
    )
    assert not template.caps().system
    assert template.render_sync(CALLED[:2]) == "[user: Be brief.\n\nhi]"


def test_a_template_that_wants_parts_gets_them(make: Make) -> None:
    template = make("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}|{% endfor %}")
    assert template.caps().parts
    assert (
        template.render_sync([USER, {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}])
        == "hi|a\nb|"
    )


def test_mistral_call_ids_are_shortened(make: Make) -> None:
    template = make(
        "{% for m in messages %}{% for c in m.tool_calls %}{% if c.id|length != 9 %}{{ no() }}{% endif %}"
        "{{ c.function.name }}{{ c.id }}{% endfor %}{{ m.content }}{{ m.tool_call_id }}{% endfor %}"
    )
    call = {**CALL, "id": "call_abcdefghi"}
    assert "look_upabcdefghi" in template.render_sync([USER, {"role": "assistant", "tool_calls": [call]}])


def test_no_template_is_chatml_with_a_warning(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    template = make(None)
    assert template.is_default
    assert "ChatML" in caplog.text
    assert template.render_sync([USER]) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_continuing_the_final_message(make: Make) -> None:
    template = make(CHATML)
    text = template.render_sync([USER, {"role": "assistant", "content": "Well, "}], continue_final_message=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nWell, "
    with pytest.raises(ChatTemplateError, match="assistant"):
        template.render_sync([USER], continue_final_message=True)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ x | tojson }}", '<bos>{"b": "<é>", "a": [1]}'),
        ("{{ x | tojson(indent=1) }}", '{\n "b": "<é>",\n "a": [\n  1\n ]\n}'),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% generation %}a{{ x.a[0] }}{% endgeneration %}!", "a1!"),
        ("  {% if true %}\n  yes\n  {% endif %}\n", "  yes\n"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ 'a-b'.split('-') | join(',') }}{{ x.get('nope', 'd') }}", "a,bd"),
        ("{%- set ns = namespace(n=0) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "3"),
    ],
)
def test_what_templates_rely_on(make: Make, source: str, expected: str) -> None:
    assert make(source).render_sync([USER], x={"b": "<é>", "a": [1]}) == expected


def test_the_template_speaks_for_itself(make: Make) -> None:
    with pytest.raises(ChatTemplateError, match="refused the messages: roles must alternate"):
        make("{{ raise_exception('roles must alternate') }}").render_sync([USER])
    with pytest.raises(ChatTemplateError, match=r"not valid Jinja: .* \(line 2\)"):
        make("\n{% nonsense %}").render_sync([USER])
    with pytest.raises(ChatTemplateError, match="ZeroDivisionError"):
        make("{{ 1 / 0 }}").render_sync([USER])
    with pytest.raises(ChatTemplateError, match=r"uses what is not there: .*nope"):
        make("{{ messages[0].nope.more }}").render_sync([USER])


ESCAPES = [
    # CVE-2024-34359: Python internals from any object
    "{% for c in ().__class__.__base__.__subclasses__() %}{{ c.__name__ }}{% endfor %}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').popen('id').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ (messages | attr('__class__')) | attr('__mro__') }}",
    "{{ strftime_now.__code__ }}",
    # CVE-2024-56326 and CVE-2025-27516: format by way of a filter
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ ('{0.__class__.__base__}' | attr('format'))(raise_exception) }}",
    "{{ ['{0.__class__.__mro__}'] | map('format', messages) | first }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f(messages) }}",
    "{{ ['{0.__class__.__mro__}' | attr('format')] | map('call', messages) | list }}",
    "{{ '{a.__class__.__mro__}'.format_map({'a': messages}) }}",
    # Changing what belongs to others, and files
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_holds(make: Make, source: str) -> None:
    try:
        text = make(source).render_sync([USER])
    except ChatTemplateError:
        return
    # Jinja answers some of these with an undefined value: nothing is printed then.
    assert "class" not in text
    assert "builtin" not in text
    assert "uid=" not in text


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "took longer than 1 s"),
        ("{{ 9 ** (boom * 9 ** 9) }}", "took longer than 1 s"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "tried to nest too deeply|ended its process"),
        ("{{ 'a' * 10 ** 10 }}", "tried to use more than 512 MiB"),
        ("{% for n in range(10 ** 9) %}{% endfor %}", "failed: OverflowError"),
        ("{% for n in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "tried to write more than 16777216 bytes"),
        ("{{ 'x' * (17 * 1024 * 1024) }}", "tried to write more than 16777216 bytes"),
        ("{{ '{:9999999999}'.format(1) }}", "tried to use more than 512 MiB|MemoryError|failed"),
    ],
)
def test_bombs(make: Make, source: str, says: str) -> None:
    template = make(f"{{% if boom %}}{source}{{% endif %}}ok", timeout_s=1.0 if "longer" in says else 10.0)
    assert template.render_sync([USER]) == "ok"
    with pytest.raises(ChatTemplateError, match=says):
        template.render_sync([USER], boom=1)
    assert template.render_sync([USER]) == "ok"  # as good as new


def test_a_killed_worker_is_replaced(make: Make) -> None:
    template = make("{{ messages[0].content }}")
    assert template.render_sync([USER]) == "hi"
    first = template.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while template._process.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert template.render_sync([USER]) == "hi"
    assert template.pid != first


def test_signals_meant_for_the_server_do_not_end_the_worker(make: Make) -> None:
    template = make("{{ messages[0].content }}")
    template.render_sync([USER])
    pid = template.pid
    assert pid is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) * 5:
        os.kill(pid, number)
    assert template.render_sync([USER]) == "hi"
    assert template.pid == pid
    assert os.getsid(pid) != os.getsid(0)


def test_the_worker_ends_with_its_input(make: Make) -> None:
    template = make("x")
    template.render_sync([USER])
    process = template._process._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()  # what the kernel does when the server dies
    assert process.wait(timeout=10) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_worker_inherits_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELLM_SECRET", "s3cret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        os.set_inheritable(server.fileno(), True)
        template = make("x")
        template.render_sync([USER])
        assert sorted(os.listdir(f"/proc/{template.pid}/fd")) == ["0", "1", "2"]
        with open(f"/proc/{template.pid}/environ") as file:
            assert "s3cret" not in file.read()


def test_a_large_conversation_goes_both_ways(make: Make) -> None:
    text = "é😀\\n" * 500_000
    assert make("{{ messages[0].content }}").render_sync([{"role": "user", "content": text}]) == text


def test_the_event_loop_goes_on_while_a_template_hangs(make: Make) -> None:
    template = make(
        "{% if spin %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}",
        timeout_s=1.0,
    )
    template.render_sync([USER])

    async def both() -> int:
        slow = asyncio.create_task(template.render([USER], spin=True))
        turns = 0
        while not slow.done():
            turns += 1
            await asyncio.sleep(0.01)
        with pytest.raises(ChatTemplateError, match="took longer"):
            await slow
        return turns

    assert asyncio.run(both()) > 5


def test_a_variable_may_have_any_name_that_is_not_ours(make: Make) -> None:
    names = {"self": 1, "messages_": 2, "source": 3}
    assert make("{{ self }}{{ messages_ }}{{ source }}").render_sync([USER], **names).endswith("23")


def test_bad_arguments(make: Make) -> None:
    template = make("{{ messages[0].content }}")
    with pytest.raises(ChatTemplateError, match="bos_token"):
        template.render_sync([USER], bos_token="x")
    with pytest.raises(ChatTemplateError, match="JSON"):
        template.render_sync([USER], thing=object())
    with pytest.raises(ChatTemplateError, match="Unicode"):
        template.render_sync([{"role": "user", "content": "\ud800"}])
    template.close()
    with pytest.raises(ChatTemplateError, match="closed"):
        template.render_sync([USER])


def test_caps_of_a_source() -> None:
    start = time.monotonic()
    assert caps("{{ messages[0].content }}") == TemplateCaps(True, False, False, False, False)
    assert time.monotonic() - start < 30


def test_closing_ends_a_render_under_way(make: Make) -> None:
    template = make("{% if spin %}{{ 9 ** (spin * 9 ** 9) }}{% endif %}", timeout_s=60.0)
    template.render_sync([USER])

    async def close_while_rendering() -> None:
        slow = asyncio.create_task(template.render([USER], spin=1))
        await asyncio.sleep(0.05)
        template.close()
        with pytest.raises(ChatTemplateError):
            await slow

    asyncio.run(close_while_rendering())
    assert template.pid is None


def test_imports_are_light() -> None:
    names = "template", "tool_calls", "json_schema", "text"
    code = f"import sys; from edgellm.chat import {', '.join(names)}; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert not any(f"'{heavy}'" in loaded for heavy in ("numpy", "llama_cpp", "jinja2", "pydantic"))
