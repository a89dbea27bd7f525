from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgellm.backend.model import Model
from edgellm.chat.template import ChatTemplate
from edgellm.models.bundled import bundled_path
from edgellm.models.describe import describe
from edgellm.tune.coding import ModelCoder

MODELS = Path(os.environ.get("EDGELLM_TEST_MODELS") or "~/.cache/edgellm/test-models").expanduser()
QWEN = MODELS / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
GEMMA = MODELS / "gemma-3-270m-q4_k_m.gguf"

GEMMA_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{% set role = 'model' if message.role == 'assistant' else message.role %}\
{{ '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

QWEN3_LIKE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

MakeCoder = Callable[..., ModelCoder]


@pytest.fixture(scope="session")
def make_coder() -> Iterator[MakeCoder]:
    """`make_coder(path, template)`: the coder of a model file, with another template than its own if given."""
    models: dict[Path, Model] = {}
    made: dict[tuple[Path, str | None], tuple[ModelCoder, ChatTemplate]] = {}

    def make(path: Path, source: str | None = None) -> ModelCoder:
        if not path.is_file():
            pytest.skip(f"{path.name} is not there; scripts/fetch_models brings it")
        model = models.get(path) or models.setdefault(path, Model(path))
        if (path, source) not in made:
            vocab = model.vocab
            bos, eos = vocab.special_piece(vocab.bos), vocab.special_piece(vocab.eos)
            template = ChatTemplate(source or describe(path).chat_template, bos_token=bos, eos_token=eos)
            made[path, source] = (ModelCoder(vocab, template), template)
        return made[path, source][0]

    yield make
    for _, template in made.values():
        template.close()
    for model in models.values():
        model.close()


@pytest.fixture(scope="session")
def smol(make_coder: MakeCoder) -> ModelCoder:
    path = bundled_path()
    assert path is not None
    return make_coder(path)


@pytest.fixture(scope="session", params=["smol", "qwen", "gemma"])
def coder(request: pytest.FixtureRequest, make_coder: MakeCoder) -> ModelCoder:
    """Three families: BPE of 49,152 and of 151,936 tokens, SentencePiece of 262,144."""
    if request.param == "smol":
        return request.getfixturevalue("smol")
    return make_coder(QWEN) if request.param == "qwen" else make_coder(GEMMA, GEMMA_TEMPLATE)
