"""/v1/files: what openai's client does with it, what tidy clients never send, and what a crash leaves."""

from __future__ import annotations

import io
import itertools
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.errors import EdgeLLMError
from edgellm.tune.database import Database
from edgellm.tune.files import FileStore
from serving.multipart import UploadForm
from tests.serving.live import Answer, Connection
from tests.serving.server import START_S, Server, serving, wait_until

LINES = b"".join(json.dumps({"messages": [{"role": "user", "content": f"é{n}"}]}).encode() + b"\n" for n in range(20))
LIMIT = 1 << 20


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    """A server that takes files of at most 1 MiB."""
    home = tmp_path_factory.mktemp("small")
    with serving(home, "--model", str(tiny_model), "--max-file", "1MiB", "--max-body", "4KiB") as server:
        yield server


@pytest.fixture
def files(small: Server) -> Iterator[openai.resources.Files]:
    with (
        httpx.Client() as http,
        openai.OpenAI(base_url=small.api, api_key="x", max_retries=0, timeout=START_S, http_client=http) as client,
    ):
        yield client.files


def upload(port: int, body: bytes, *headers: tuple[str, str], boundary: str = "b") -> Answer:
    own = [("Host", "127.0.0.1"), ("Content-Length", str(len(body)))]
    kind = [("Content-Type", f"multipart/form-data; boundary={boundary}")]
    with Connection(port) as connection:
        given = {name for name, _ in headers}
        connection.send("POST", "/v1/files", [*own, *(kind if "Content-Type" not in given else []), *headers], body)
        return connection.answer()


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
    return head.encode() + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--b--\r\n"


PURPOSE = part("purpose", b"fine-tune")
FILE = part("file", b"{}", "a.jsonl")


def left(server: Server) -> list[str]:
    """Temporaries in the state directory."""
    return [path.name for path in (server.home / "files").glob(".*")]


def test_the_story_of_a_file(files: openai.resources.Files) -> None:
    made = files.create(file=("train é.jsonl", LINES), purpose="fine-tune")
    assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(LINES), "train é.jsonl", "fine-tune")
    assert made.status == "processed"
    assert made.id.startswith("file-")
    assert files.retrieve(made.id) == made
    content = files.content(made.id)
    assert content.read() == LINES
    assert content.response.headers["content-disposition"].startswith("attachment; filename*=utf-8''train%20%C3%A9")
    assert made in files.list().data
    assert files.delete(made.id).deleted
    for call in (files.retrieve, files.content, files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            call(made.id)
        assert (caught.value.code, caught.value.param) == ("file_not_found", "id")


def test_lists_in_pages(files: openai.resources.Files) -> None:
    for old in files.list():
        files.delete(old.id)
    ids = [files.create(file=(f"{n}.jsonl", b"%d" % n), purpose="fine-tune").id for n in range(5)]
    assert [file.id for file in files.list(limit=2)] == ids[::-1]  # turns the pages by itself
    page = files.list(limit=2, order="asc", after=ids[0])
    assert ([file.id for file in page.data], page.has_more) == (ids[1:3], True)
    assert page.model_dump()["last_id"] == ids[2]
    assert files.list(purpose="fine-tune-results").data == []
    with pytest.raises(openai.BadRequestError) as caught:
        files.list(after="file-none")
    assert caught.value.param == "after"
    for wrong in ({"limit": 0}, {"limit": 10_001}, {"order": "up"}):
        with pytest.raises(openai.BadRequestError):
            files.list(**wrong)


def test_a_file_larger_than_a_piece_is_kept_byte_for_byte(tiny_client: openai.OpenAI) -> None:
    data = bytes(range(256)) * (5 << 12)  # 5 MiB with every byte, over many pieces
    made = tiny_client.files.create(file=io.BytesIO(data), purpose="fine-tune")
    assert tiny_client.files.content(made.id).read() == data
    tiny_client.files.delete(made.id)


@pytest.mark.parametrize("excess", [0, 1])
def test_the_limit_of_a_file_is_exact(files: openai.resources.Files, small: Server, excess: int) -> None:
    data = b"x" * (LIMIT + excess)
    if not excess:
        assert files.create(file=data, purpose="fine-tune").bytes == LIMIT
    else:
        with pytest.raises(openai.APIStatusError) as caught:
            files.create(file=data, purpose="fine-tune")
        assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")
    assert left(small) == []


def test_a_body_without_a_length_is_stopped_on_the_way(small: Server) -> None:
    def body() -> Iterator[bytes]:
        yield b"--b\r\n" + part("file", b"", "a").removeprefix(b"--b\r\n")[:-2]
        for _ in range(40):
            yield b"x" * (1 << 17)

    kind = {"content-type": "multipart/form-data; boundary=b"}
    try:
        answer = httpx.post(f"{small.api}/files", content=body(), headers=kind, timeout=START_S)
        assert answer.status_code == 413
    except httpx.TransportError:
        pass  # the server closed the connection while the client was still sending
    small.assert_alive()
    assert left(small) == []


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (form(PURPOSE), "file", "Missing required parameter: 'file'"),
        (form(FILE), "purpose", "Missing required parameter: 'purpose'"),
        (form(FILE, part("purpose", b"assistants")), "purpose", "must be 'fine-tune'"),
        (form(FILE, PURPOSE, part("expires_after[anchor]", b"created_at")), "expires_after", "do not expire"),
        (form(PURPOSE, part("file", b"", "a.jsonl")), "file", "is empty"),
        (form(PURPOSE, part("file", b"text")), "file", "must be a file"),
        (form(PURPOSE, FILE, FILE), "file", "Only one file"),
        (form(FILE, part("purpose", b"\xff")), "purpose", "not valid UTF-8"),
        (form(FILE, part("purpose", b"x" * 70_000)), "purpose", "too long"),
        (form(*[part(f"n{n}", b"") for n in range(40)]), None, "more than 32 parts"),
        ((PURPOSE + FILE)[:-10], None, "ends too early"),
        (b"no form at all", None, "not valid multipart"),
        (b"", None, "ends too early"),
    ],
)
def test_faulty_forms_are_refused_and_leave_nothing(small: Server, body: bytes, param: str | None, words: str) -> None:
    answer = upload(small.port, body)
    assert answer.status == 400
    assert answer.error["param"] == param
    assert words in answer.error["message"]
    assert left(small) == []
    small.assert_alive()


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "multipart/mixed; boundary=b"])
def test_other_types_are_refused(small: Server, kind: str) -> None:
    answer = upload(small.port, form(PURPOSE, FILE), ("Content-Type", kind))
    assert (answer.status, answer.error["code"]) == (415, "unsupported_media_type")


def test_a_boundary_is_needed(small: Server) -> None:
    for boundary in ("", "x" * 71):
        assert "boundary" in upload(small.port, form(PURPOSE, FILE), boundary=boundary).error["message"]


def test_forms_are_taken_nowhere_else(small: Server) -> None:
    answer = httpx.post(f"{small.api}/completions", files={"file": b"x"}, timeout=START_S)
    assert answer.status_code == 415


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("Origin", "http://evil.example")], 403),
        ([("Origin", "null")], 403),
        ([("Sec-Fetch-Site", "cross-site")], 403),
        ([("Referer", "http://evil.example/")], 403),
    ],
)
def test_web_pages_cannot_upload(small: Server, headers: list[tuple[str, str]], status: int) -> None:
    assert upload(small.port, form(PURPOSE, FILE), *headers).status == status


def test_our_own_page_can_upload(small: Server) -> None:
    origin = f"http://127.0.0.1:{small.port}"
    host = [("Host", f"127.0.0.1:{small.port}"), ("Origin", origin), ("Sec-Fetch-Site", "same-origin")]
    body = form(PURPOSE, part("file", b"{}", "C:\\\\dir\\\\a.jsonl"))
    kind = [("Content-Type", "multipart/form-data; boundary=b"), ("Content-Length", str(len(body)))]
    with Connection(small.port) as connection:
        connection.send("POST", "/v1/files", [*host, *kind], body)
        answer = connection.answer()
    assert answer.status == 200
    assert json.loads(answer.body)["filename"] == "a.jsonl"


def test_keys_are_asked_for_before_anything_is_read(tmp_path: Path, tiny_model: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    keys.chmod(0o600)
    with serving(tmp_path / "home", "--model", str(tiny_model), "--api-key-file", str(keys)) as server:
        assert upload(server.port, form(PURPOSE, FILE)).status == 401
        for path in ("", "/file-1", "/file-1/content"):
            assert server.get(f"/v1/files{path}").status_code == 401
        assert not (server.home / "files").exists()
        assert upload(server.port, form(PURPOSE, FILE), ("Authorization", "Bearer secret")).status == 200


def test_an_upload_cut_short_by_kill_is_gone_and_what_was_there_is_not(tmp_path: Path, tiny_model: Path) -> None:
    arguments = ("--model", str(tiny_model))
    body = PURPOSE + part("file", b"x" * (4 << 20), "half.jsonl")
    headers = [("Host", "127.0.0.1"), ("Content-Length", str(len(body) * 2))]
    with serving(tmp_path, *arguments) as server:
        kept = json.loads(upload(server.port, form(PURPOSE, part("file", LINES, "a.jsonl"))).body)
        with Connection(server.port) as connection:
            kind = ("Content-Type", "multipart/form-data; boundary=b")
            connection.send("POST", "/v1/files", [*headers, kind], body)
            while not left(server):
                server.get("/health")
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
        assert left(server)
    with serving(tmp_path, *arguments) as server:
        listed = server.get("/v1/files").json()["data"]
        assert listed == [kept]
        assert server.get(f"/v1/files/{kept['id']}/content").content == LINES
        assert left(server) == []


def test_an_upload_that_its_client_gives_up_leaves_nothing(small: Server) -> None:
    before = small.get("/v1/files").json()
    with Connection(small.port) as connection:
        headers = [("Host", "127.0.0.1"), ("Content-Length", "900000")]
        kind = ("Content-Type", "multipart/form-data; boundary=b")
        connection.send("POST", "/v1/files", [*headers, kind], PURPOSE + FILE)
    wait_until(lambda: left(small) == [], "the temporary is removed")
    assert small.get("/v1/files").json() == before
    small.assert_alive()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileStore]:
    database = Database(tmp_path_factory.mktemp("store"))
    yield FileStore(database)
    database.close()


@settings(deadline=None)
@given(
    content=st.binary(min_size=1, max_size=200) | st.sampled_from([b"\r\n--b", b"--b\r\n", b"\r\n--b-", b"\r\n--"]),
    cuts=st.lists(st.integers(0, 400), max_size=8),
)
def test_a_form_is_read_the_same_however_it_is_cut(store: FileStore, content: bytes, cuts: list[int]) -> None:
    body = b"--boundary42\r\n" + form(part("file", content, "a.jsonl"), PURPOSE).removeprefix(b"--b\r\n")
    body = body.replace(b"\r\n--b\r\nContent", b"\r\n--boundary42\r\nContent").replace(b"--b--\r\n", b"--boundary42--")
    places = [0, *sorted(cuts), len(body)]
    with UploadForm("multipart/form-data; boundary=boundary42", lambda: store.writer(1000)) as read:
        for start, end in itertools.pairwise(places):
            read.feed(body[start:end])
        writer = read.end()
        writer.finish()
        assert writer.path.read_bytes() == content
        assert (read.fields, read.filename) == ({"purpose": "fine-tune"}, "a.jsonl")


@given(body=st.binary(max_size=200))
def test_whatever_comes_is_refused_in_words(store: FileStore, body: bytes) -> None:
    def read() -> None:
        with UploadForm("multipart/form-data; boundary=b", lambda: store.writer(1000)) as form:
            form.feed(b"--b\r\n" + body)
            form.end()

    with pytest.raises(EdgeLLMError):
        read()
