"""The server as a process: signals, clients that leave, limits, faulty models and templates, and who may come in."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from tests.serving.server import START_S, Server, run_edgellm, serving, wait_until
from tests.support.tiny_gguf import write_tiny_llama

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
ENDLESS = {"prompt": "hello", "max_tokens": 100_000, "ignore_eos": True, "stream": True}
LONG_CONTEXT = 1 << 17


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose context no test can fill."""
    return write_tiny_llama(tmp_path_factory.mktemp("endless") / "endless.gguf", context=LONG_CONTEXT)


def endless(home: Path, model: Path, *arguments: str):
    return serving(home, "--model", str(model), "--context-tokens", str(LONG_CONTEXT), *arguments)


def stream(server: Server, timeout: float = START_S):
    return httpx.stream("POST", server.url + TEXT, json=ENDLESS, timeout=timeout)


def refused(server: Server) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=START_S).close()
    except ConnectionError:
        return True
    return False


def test_sigterm_lets_a_stream_finish(tmp_path, endless_model):
    body = {**ENDLESS, "max_tokens": 1500}
    with endless(tmp_path, endless_model, "--grace-seconds", "100") as server:
        with httpx.stream("POST", server.url + TEXT, json=body, timeout=START_S) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.terminate()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert server.wait() == 0
        assert "Traceback" not in server.log.read_text()


def test_sigterm_cuts_a_long_stream_off_with_an_error_event(tmp_path, endless_model):
    with endless(tmp_path, endless_model, "--grace-seconds", "1") as server:
        with stream(server) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.terminate()
            wait_until(lambda: refused(server), "new connections are refused")
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert "data: [DONE]" not in rest
        assert server.wait() == 0
        assert "Traceback" not in server.log.read_text()


def test_sigint_without_requests_ends_with_0(tmp_path, tiny_model):
    with serving(tmp_path, "--model", str(tiny_model)) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 0


def test_clients_that_leave_free_their_sequences(tmp_path, endless_model):
    with endless(tmp_path, endless_model) as server:

        def active() -> float:
            return server.metric("edgellm_active_sequences")

        with stream(server) as answer:
            lines = answer.iter_lines()  # kept: httpx closes the stream with its last iterator
            next(lines)
            assert active() == 1
        wait_until(lambda: active() == 0, "the stream's sequence is gone")
        with pytest.raises(httpx.ReadTimeout):  # one that waits for the whole answer, and gives up
            server.post(TEXT, {**ENDLESS, "stream": False, "n": 2}, timeout=0.5)
        wait_until(lambda: active() == 0, "the whole answer's sequences are gone")
        server.assert_alive()


def test_a_full_queue_is_503_with_retry_after(tmp_path, endless_model):
    with endless(tmp_path, endless_model, "--parallel", "1", "--queue-limit", "1") as server:
        with stream(server) as running:
            lines = running.iter_lines()
            next(lines)
            waiting = threading.Thread(target=lambda: server.post(TEXT, {"prompt": "x", "max_tokens": 1}))
            waiting.start()
            wait_until(lambda: server.metric("edgellm_queued_requests") == 1, "one request waits")
            answer = server.post(TEXT, {"prompt": "x", "max_tokens": 1})
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "overloaded"
            assert int(answer.headers["retry-after"]) >= 1
            streamed = server.post(TEXT, {"prompt": "x", "max_tokens": 1, "stream": True})
            assert streamed.status_code == 503
        waiting.join(START_S)  # it is answered once the stream is gone
        assert not waiting.is_alive()
        server.assert_alive()


def test_the_timeout_of_a_request_is_504(tmp_path, endless_model):
    with endless(tmp_path, endless_model) as server:
        answer = server.post(TEXT, {**ENDLESS, "stream": False, "timeout": 0.3})
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "request_timeout"
        lines = [line for line in server.post(TEXT, {**ENDLESS, "timeout": 0.3}).text.splitlines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "request_timeout"
        wait_until(lambda: server.metric("edgellm_active_sequences") == 0, "both are gone")


def test_a_taken_port_is_one_line(tmp_path, tiny_model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run_edgellm(tmp_path, "serve", "--port", port, "--model", str(tiny_model))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert port in done.stderr


@pytest.mark.parametrize("fault", ["missing", "empty", "magic", "header only", "truncated"])
def test_a_faulty_model_file_is_one_line(tmp_path, tiny_model, fault):
    data = tiny_model.read_bytes()
    faulty = {"empty": b"", "magic": b"GGML" + data[4:], "header only": data[:100], "truncated": data[:-1000]}
    path = tmp_path / "faulty.gguf"
    if fault in faulty:
        path.write_bytes(faulty[fault])
    done = run_edgellm(tmp_path, "serve", "--port", "0", "--model", str(path))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "faulty.gguf" in done.stderr


TEMPLATES = {
    "raises": "{{ raise_exception('roles must alternate') }}",
    "loops": "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}x",
    "internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "syntax": "{% if %}",
    "memory": "{{ 'x' * 10**10 }}",
    "undefined": "{{ nothing.at.all }}",
}


def test_faulty_chat_templates_are_400_and_the_server_lives(tmp_path, tiny_model):
    arguments = ["--model", str(tiny_model)]
    for name, template in TEMPLATES.items():
        path = write_tiny_llama(tmp_path / f"{name}.gguf", chat_template="{{ messages[0].content }}" + template)
        arguments += ["--model", str(path)]
    with serving(tmp_path, *arguments) as server:
        for name in TEMPLATES:
            answer = server.post(CHAT, {"model": name, "messages": USER, "max_tokens": 1})
            assert answer.status_code == 400, (name, answer.text)
            assert answer.json()["error"]["code"] == "chat_template_error", name
            assert "uid=" not in answer.text
            assert server.post(TEXT, {"model": name, "prompt": "x", "max_tokens": 1}).status_code == 200, name
        assert server.post(CHAT, {"messages": USER, "max_tokens": 1}).status_code == 200
        server.assert_alive()


def test_a_model_file_that_is_deleted_under_the_server(tmp_path):
    paths = [write_tiny_llama(tmp_path / f"{name}.gguf") for name in ("first", "second")]
    with serving(tmp_path, "--model", str(paths[0]), "--model", str(paths[1])) as server:
        for path in paths:
            path.unlink()
        gone = server.post(CHAT, {"model": "second", "messages": USER, "max_tokens": 1})
        assert gone.status_code == 404, gone.text
        assert gone.json()["error"]["code"] == "model_not_found"
        assert server.post(CHAT, {"model": "first", "messages": USER, "max_tokens": 1}).status_code == 200
        server.assert_alive()


def test_keys_hosts_and_origins(tmp_path, tiny_model):
    keys = tmp_path / "keys"
    keys.write_text("# who may come in\nfirst-secret-key\nsecond-secret-key\n")
    keys.chmod(0o600)
    with serving(tmp_path, "--model", str(tiny_model), "--api-key-file", str(keys)) as server:

        def status(path: str = "/v1/models", key: str | None = "second-secret-key", **headers: str) -> int:
            own = {"authorization": f"Bearer {key}"} if key else {}
            return server.get(path, **own, **headers).status_code

        assert status() == 200
        assert status(key="first-secret-key") == 200
        assert status(key=None) == 401
        assert status(key="first-secret-ke") == 401
        assert status("/health", key=None) == 200
        assert status(host="evil.example") == 403
        assert status(host=f"localhost:{server.port}") == 200
        assert status(origin="http://evil.example") == 403
        refusal = server.get("/v1/models")
        assert refusal.json()["error"]["code"] == "invalid_api_key"
        assert "secret" not in server.log.read_text()


def test_serving_imports_no_torch():
    code = "import sys, serving.app, serving.cli.serve; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
