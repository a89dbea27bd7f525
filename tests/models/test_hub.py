"""Pulling, against a real server on a real port that cuts, lies and refuses."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgellm.errors import PullError
from edgellm.models import transfer
from edgellm.models.hub import HubSpec, PullProgress, parse_spec, pull
from edgellm.models.store import ModelStore
from tests.models.hub_server import COMMIT, HubServer
from tests.models.test_describe import write_split
from tests.support.tiny_gguf import write_tiny_llama, write_tiny_lora

REPO = "Some-Org/Tiny-GGUF"
FILE = "Tiny-Q4_K_M.gguf"
NAME = "some-org/tiny-gguf/tiny-q4_k_m"


@pytest.fixture
def model(tmp_path: Path) -> bytes:
    return write_tiny_llama(tmp_path / "source.gguf").read_bytes()


@pytest.fixture
def hub(model: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(transfer, "RETRY_WAIT_S", 0.0)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    other = {"Tiny-Q8_0.gguf": model, "Tiny-F16.gguf": model, "README.md": b"# hi", "mmproj-Q4_K_M.gguf": b"x"}
    with HubServer(files={REPO: {FILE: model, **other}}) as server:
        yield server


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "home")


def partials(store: ModelStore) -> list[Path]:
    return sorted((store.root / ".partial").glob("*.part"))


SPECS = {
    "a/b": HubSpec("a/b"),
    "a/b:q4_K_M": HubSpec("a/b", quantisation="q4_K_M"),
    "a/b@main": HubSpec("a/b", revision="main"),
    "a/b@refs/pr/1:Q4_0": HubSpec("a/b", revision="refs/pr/1", quantisation="Q4_0"),
    "a/b:Q4_0@v1": HubSpec("a/b", revision="v1", quantisation="Q4_0"),
    "a/b/c.gguf": HubSpec("a/b", file="c.gguf"),
    "a/b/d e/c.GGUF@v1": HubSpec("a/b", file="d e/c.GGUF", revision="v1"),
    "a/b@v1/c.gguf": HubSpec("a/b", file="c.gguf", revision="v1"),
    "hf.co/a/b:Q8_0": HubSpec("a/b", quantisation="Q8_0"),
    "https://huggingface.co/a/b": HubSpec("a/b"),
    "https://huggingface.co/a/b/": HubSpec("a/b"),
    "https://huggingface.co/a/b/tree/v1": HubSpec("a/b", revision="v1"),
    "https://huggingface.co/a/b/resolve/main/d/c.gguf?download=true": HubSpec("a/b", file="d/c.gguf", revision="main"),
    "hf.co/a/b/blob/main/c%20d.gguf": HubSpec("a/b", file="c d.gguf", revision="main"),
}


@pytest.mark.parametrize("text", SPECS)
def test_spec(text: str) -> None:
    assert parse_spec(text) == SPECS[text]


@pytest.mark.parametrize(
    "text", ["", "a", "a/", "/b", "a/b/c", "../b", "a/b:", "a/b c", "http://x/a/b", "a/b/c.bin", "a b/c"]
)
def test_no_spec(text: str) -> None:
    with pytest.raises(PullError, match="names no model"):
        parse_spec(text)


def test_pull(hub: HubServer, store: ModelStore, model: bytes) -> None:
    seen: list[PullProgress] = []
    stored = pull(REPO, store, endpoint=hub.endpoint, progress=seen.append)
    assert stored.name == NAME
    assert stored.path.read_bytes() == model
    assert stored.path == store.root / (NAME + ".gguf")
    assert stored.source == f"127.0.0.1:{hub.port}/{REPO}@{COMMIT[:12]}/{FILE}"
    assert stored.bytes == len(model)
    assert store.find("some-org/tiny-gguf:q4_k_m") == stored
    assert partials(store) == []
    assert (seen[0].done_bytes, seen[-1].done_bytes, seen[-1].total_bytes) == (0, len(model), len(model))
    assert [now.done_bytes for now in seen] == sorted(now.done_bytes for now in seen)
    assert any(path == f"/{REPO}/resolve/{COMMIT}/{FILE}" for _, path, _, _ in hub.requests)

    count = len(hub.downloads())
    assert pull(f"{REPO}:Q4_K_M", store, endpoint=hub.endpoint) == stored
    assert len(hub.downloads()) == count  # nothing is fetched twice
    stored.path.write_bytes(model[:-1] + b"?")
    assert pull(REPO, store, endpoint=hub.endpoint).path.read_bytes() == model


@pytest.mark.parametrize(
    ("spec", "file"),
    [("", "tiny-q4_k_m"), (":q8_0", "tiny-q8_0"), ("/Tiny-F16.gguf", "tiny-f16"), ("@main:F16", "tiny-f16")],
)
def test_choice(hub: HubServer, store: ModelStore, spec: str, file: str) -> None:
    assert pull(REPO + spec, store, endpoint=hub.endpoint).path.stem == file


def test_the_preference_skips_what_is_not_there(hub: HubServer, store: ModelStore) -> None:
    del hub.files[REPO][FILE]
    assert pull(REPO, store, endpoint=hub.endpoint).path.stem == "tiny-q8_0"


def test_split_model_is_pulled_whole(hub: HubServer, store: ModelStore, tmp_path: Path) -> None:
    parts = {f"Q4_0/{path.name}": path.read_bytes() for path in write_split(tmp_path)}
    hub.files["a/split"] = parts
    stored = pull("a/split", store, endpoint=hub.endpoint)
    assert stored.name == "a/split/q4_0/m"
    assert stored.bytes == sum(map(len, parts.values()))
    assert len(list(stored.path.parent.glob("*.gguf"))) == 3
    store.remove(stored.name)
    assert not (store.root / "a").exists()
    del hub.files["a/split"]["Q4_0/m-00002-of-00003.gguf"]
    with pytest.raises(PullError, match="lacks a part"):
        pull("a/split", store, endpoint=hub.endpoint)


def test_a_cut_transfer_goes_on_by_itself(hub: HubServer, store: ModelStore, model: bytes) -> None:
    hub.cuts = [10_000, 1, 50_000]
    hub.statuses = [200, 503, 200, 429]
    stored = pull(REPO, store, endpoint=hub.endpoint)
    assert stored.path.read_bytes() == model
    spans = [span for _, span in hub.downloads()]
    assert spans[0] is None
    assert all(span is not None for span in spans[1:])


def test_an_interrupted_pull_is_resumed(hub: HubServer, store: ModelStore, model: bytes) -> None:
    def interrupt(now: PullProgress) -> None:
        if now.done_bytes > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(REPO, store, endpoint=hub.endpoint, progress=interrupt)
    (partial,) = partials(store)
    arrived = partial.stat().st_size
    assert 0 < arrived < len(model)
    assert partial.stem == hashlib.sha256(model).hexdigest()
    assert all(item.source == "bundled" for item in store.list())  # nothing half is visible

    seen: list[PullProgress] = []
    assert pull(REPO, store, endpoint=hub.endpoint, progress=seen.append).path.read_bytes() == model
    assert hub.downloads()[-1][1] == f"bytes={arrived}-"
    assert (seen[0].done_bytes, seen[0].resumed_bytes) == (arrived, arrived)


@pytest.mark.parametrize("fault", ["no ranges", "416"])
def test_a_server_that_cannot_continue(hub: HubServer, store: ModelStore, model: bytes, fault: str) -> None:
    hub.cuts = [10_000]
    hub.ranges = fault != "no ranges"
    hub.statuses = [200, 416] if fault == "416" else []
    seen: list[PullProgress] = []
    assert pull(REPO, store, endpoint=hub.endpoint, progress=seen.append).path.read_bytes() == model
    assert seen[-1].done_bytes == len(model)


def test_a_server_that_stays_broken(hub: HubServer, store: ModelStore) -> None:
    hub.cuts = [10_000]
    hub.statuses = [200] + [500] * 50
    with pytest.raises(PullError, match=r"stopped at 10000 of \d+ bytes: the server answered 500"):
        pull(REPO, store, endpoint=hub.endpoint)
    assert partials(store)[0].stat().st_size == 10_000


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refused_download(hub: HubServer, store: ModelStore, status: int) -> None:
    hub.statuses = [status]
    with pytest.raises(PullError, match=f"the server answered {status}"):
        pull(REPO, store, endpoint=hub.endpoint)


def test_lies(hub: HubServer, store: ModelStore) -> None:
    hub.wrong_hash = True
    with pytest.raises(PullError, match="does not have the announced hash; it was removed"):
        pull(REPO, store, endpoint=hub.endpoint)
    assert partials(store) == []
    hub.wrong_hash, hub.extra_bytes = False, 5
    with pytest.raises(PullError, match="longer than announced; it was removed"):
        pull(REPO, store, endpoint=hub.endpoint)
    assert partials(store) == []
    assert not (store.root / "some-org").exists()


@pytest.mark.parametrize("in_git", [False, True])
def test_what_is_no_model(hub: HubServer, store: ModelStore, tmp_path: Path, in_git: bool) -> None:
    hub.small_files = in_git
    hub.files["a/b"] = {"x.gguf": b"GGUF, or so it says"}
    with pytest.raises(PullError, match="is not a sound GGUF file and was removed"):
        pull("a/b", store, endpoint=hub.endpoint)
    lora = write_tiny_lora(tmp_path / "lora.gguf", tmp_path / "source.gguf")
    hub.files["a/b"] = {"x.gguf": lora.read_bytes()}
    with pytest.raises(PullError, match="is a LoRA adapter"):
        pull("a/b", store, endpoint=hub.endpoint)
    assert not list(store.root.rglob("*.gguf"))
    assert partials(store) == []


def test_names_from_the_hub_cannot_lead_outside(hub: HubServer, store: ModelStore, model: bytes) -> None:
    hub.files["a/b"] = {"../../../../evil.gguf": model, "/etc/evil.gguf": model}
    for spec in ("a/b", "a/b/../../../../evil.gguf"):
        with pytest.raises(PullError, match=r"holds no GGUF file|has no file"):
            pull(spec, store, endpoint=hub.endpoint)
    hub.files["a/b"] = {".dir/..evil é.gguf": model}
    stored = pull("a/b", store, endpoint=hub.endpoint)
    assert stored.name == "a/b/dir/evil-"
    assert stored.path.is_relative_to(store.root)


def test_digests_are_not_trusted_as_paths(tmp_path: Path) -> None:
    item = transfer.Transfer("http://x/y", tmp_path / "y.gguf", tmp_path, 1, "../../etc/passwd")
    assert item.partial.parent == tmp_path
    assert len(item.partial.stem) == 64


def test_access(hub: HubServer, store: ModelStore) -> None:
    hub.token = "hf_secret"
    with pytest.raises(PullError, match=r"shows no repository .* set HF_TOKEN"):
        pull(REPO, store, endpoint=hub.endpoint)
    assert pull(REPO, store, endpoint=hub.endpoint, token="hf_secret").name == NAME
    sent = {
        (path.startswith("/cdn/"), authorization) for method, path, _, authorization in hub.requests if method == "GET"
    }
    assert (True, None) in sent  # the token does not follow a redirect to another host
    assert (True, "Bearer hf_secret") not in sent


def test_refusals_of_the_listing(hub: HubServer, store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        "no/such": "shows no repository no/such",
        f"{REPO}@v9": "has no revision v9",
        f"{REPO}:Q2_K": r"has no Q2_K\. It has .*Tiny-Q8_0\.gguf",
        f"{REPO}/other.gguf": r"has no file other\.gguf\. It has",
        "a/docs": "holds no GGUF file",
        "a/odd": "no file of a usual quantisation",
    }
    hub.files |= {"a/docs": {"README.md": b"x"}, "a/odd": {"x.gguf": b"x", "y.gguf": b"y"}}
    for spec, message in cases.items():
        with pytest.raises(PullError, match=message) as caught:
            pull(spec, store, endpoint=hub.endpoint)
        assert "\n" not in str(caught.value)
    hub.gated = True
    with pytest.raises(PullError, match="is gated: accept its terms"):
        pull(REPO, store, endpoint=hub.endpoint)
    hub.gated, hub.api_status = False, 400
    with pytest.raises(PullError, match="answered 400"):
        pull(REPO, store, endpoint=hub.endpoint)


def test_nobody_answers(hub: HubServer, store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer() as gone:
        endpoint = gone.endpoint
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(PullError, match=f"{endpoint} could not be asked") as caught:
        pull(REPO, store)
    assert "\n" not in str(caught.value)


def test_no_room_on_the_disk(hub: HubServer, store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "SPARE_DISK_BYTES", 1 << 60)
    with pytest.raises(PullError, match="Not enough room on the disk"):
        pull(REPO, store, endpoint=hub.endpoint)
    assert hub.downloads() == []


def test_the_disk_fills_up(hub: HubServer, store: ModelStore, model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    real = transfer._write_all
    left = 200_000

    def write_all(file: object, piece: bytes) -> None:
        nonlocal left
        left -= len(piece)
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file, piece)  # type: ignore[arg-type]

    monkeypatch.setattr(transfer, "_write_all", write_all)
    with pytest.raises(PullError, match=r"The disk is full; .* what has arrived is kept"):
        pull(REPO, store, endpoint=hub.endpoint)
    assert 0 < partials(store)[0].stat().st_size <= 200_000
    left = 1 << 40
    assert pull(REPO, store, endpoint=hub.endpoint).path.read_bytes() == model
    assert hub.downloads()[-1][1] is not None


def test_two_pulls_at_once(hub: HubServer, store: ModelStore) -> None:
    def again(now: PullProgress) -> None:
        if now.done_bytes:
            pull(REPO, store, endpoint=hub.endpoint)

    with pytest.raises(PullError, match="is being pulled by another process"):
        pull(REPO, store, endpoint=hub.endpoint, progress=again)
    assert pull(REPO, store, endpoint=hub.endpoint).name == NAME
