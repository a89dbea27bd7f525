from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.serving.server import START_S, Server, serving
from tests.support.tiny_gguf import write_tiny_llama


@pytest.fixture(scope="session")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the bundled SmolLM2-135M-Instruct, for tests that need sense or a large context."""
    with serving(tmp_path_factory.mktemp("smol")) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with 512 tokens of context."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    """A server of the tiny model: fast, and what it says is noise."""
    with serving(tmp_path_factory.mktemp("tiny"), "--model", str(tiny_model)) as server:
        yield server


@pytest.fixture
def client(smol: Server) -> Iterator[openai.OpenAI]:
    """OpenAI's client, talking to the bundled model. It repeats nothing: a failure must be seen."""
    with (
        httpx.Client() as http,
        openai.OpenAI(base_url=smol.api, api_key="unused", max_retries=0, timeout=START_S, http_client=http) as made,
    ):
        yield made


@pytest.fixture
def tiny_client(tiny: Server) -> Iterator[openai.OpenAI]:
    """The same for the tiny model."""
    with (
        httpx.Client() as http,
        openai.OpenAI(base_url=tiny.api, api_key="unused", max_retries=0, timeout=START_S, http_client=http) as made,
    ):
        yield made
