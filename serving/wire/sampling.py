"""Request fields that chat and text completions share: sampling, stopping, adapters, streaming."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from edgellm.engine.types import AdapterUse, Grammar, SamplingParams
from serving.wire.common import NULL_IS_DEFAULT, RequestModel, Text, WirePart, fault

N_MAX = 128
STOPS_MAX = 16
STOP_CHARS_MAX = 1024
LOGIT_BIAS_MAX = 4096
ADAPTERS_MAX = 16
TOKENS_MAX = 2**31 - 1
GRAMMAR_CHARS_MAX = 1 << 16
GRAMMAR_DEPTH_MAX = 500  # llama.cpp's parser recurses at each parenthesis, and overflows its stack beyond some 5,000
GRAMMAR_CHOICES_MAX = 1000
GRAMMAR_REPEATS_MAX = 250  # in a row they multiply the ways to read a text, all of which llama.cpp follows
TIMEOUT_S_MAX = 86_400.0
SEEDS = 2**32 - 1  # llama.cpp takes 0xFFFFFFFF for "any seed", so that one is not used

# Quoted texts, character classes, token names, comments; possessive, and to the end if they are not closed, so that no
# text takes more than one pass.
_LITERALS = re.compile(
    r'"(?:\\.|[^"\\])*+(?:"|\\?\Z)|\[(?:\\.|[^\]\\])*+(?:\]|\\?\Z)|<[^>]*+(?:>|\Z)|#[^\r\n]*+', re.DOTALL
)

TokenId = Annotated[int, Field(ge=0, le=TOKENS_MAX)]
TokenIdText = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
StopText = Annotated[Text, Field(min_length=1, max_length=STOP_CHARS_MAX)]
TokenCount = Annotated[int, Field(ge=1, le=TOKENS_MAX)]
Unit = Annotated[float, Field(ge=0, le=1), NULL_IS_DEFAULT]
PositiveUnit = Annotated[float, Field(gt=0, le=1), NULL_IS_DEFAULT]
Penalty = Annotated[float, Field(ge=-2, le=2), NULL_IS_DEFAULT]
Flag = Annotated[bool, NULL_IS_DEFAULT]


def seed32(seed: int) -> int:
    """Any 64-bit seed as one of llama.cpp's: the remainder modulo 2**32 - 1, in 0 .. 2**32 - 2."""
    return seed % SEEDS


class StreamOptions(WirePart):
    include_usage: bool | None = Field(default=None, description="Send a last chunk with the usage and no choices.")


class AdapterChoice(WirePart):
    name: Text = Field(min_length=1, max_length=256, description="Name of a loaded LoRA adapter.")
    scale: float = Field(default=1.0, ge=-100, le=100, description="Strength; 1 is as trained.")


def _stop_form(value: Any) -> str:
    return "#list" if isinstance(value, list) else "#text"


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > LOGIT_BIAS_MAX:  # before each of them is judged
        raise fault(f"must have at most {LOGIT_BIAS_MAX} tokens")
    return value


def _shallow(grammar: str) -> str:
    depth = 0
    plain = re.sub(_LITERALS, "", grammar)
    for bracket in re.findall(r"[()]", plain):
        depth += 1 if bracket == "(" else -1
        if depth > GRAMMAR_DEPTH_MAX:
            raise fault(f"must have at most {GRAMMAR_DEPTH_MAX} parentheses inside each other")
    if plain.count("|") > GRAMMAR_CHOICES_MAX:
        raise fault(f"must have at most {GRAMMAR_CHOICES_MAX} of the operator |")
    if len(re.findall(r"[?*+{]", plain)) > GRAMMAR_REPEATS_MAX:
        raise fault(f"must have at most {GRAMMAR_REPEATS_MAX} of the operators ? * + {{")
    return grammar


LogitBias = Annotated[
    dict[TokenIdText, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=LOGIT_BIAS_MAX), BeforeValidator(_few)
]
Stop = Annotated[
    Annotated[StopText, Tag("#text")]
    | Annotated[list[StopText], Field(fail_fast=True, min_length=1, max_length=STOPS_MAX), Tag("#list")],
    Discriminator(_stop_form),
]


class GenerationRequest(RequestModel):
    """The fields of every request that generates text. Fields not of OpenAI's are marked as extensions."""

    model: Text | None = Field(
        default=None, max_length=512, description="Model to use. Default: the server's default model."
    )
    n: Annotated[int, Field(ge=1, le=N_MAX), NULL_IS_DEFAULT] = Field(default=1, description="Answers to generate.")
    stream: Flag = Field(default=False, description="Send the answer in pieces, as server-sent events.")
    stream_options: StreamOptions | None = Field(default=None, description="Only with stream.")
    stop: Stop | None = Field(default=None, description="Texts that end the answer; they are not part of it.")

    temperature: Annotated[float, Field(ge=0, le=2), NULL_IS_DEFAULT] = Field(default=1.0, description="0 is greedy.")
    top_p: Unit = Field(default=1.0, description="Draw from the most likely tokens of this total probability.")
    presence_penalty: Penalty = Field(default=0.0, description="Subtracted from tokens that occurred in the answer.")
    frequency_penalty: Penalty = Field(
        default=0.0, description="Subtracted for each time a token occurred in the answer."
    )
    logit_bias: LogitBias | None = Field(default=None, description="Added to the logits of these token ids.")
    seed: int | None = Field(
        default=None,
        ge=-(2**63),
        le=2**63 - 1,
        description="The same seed and request give the same answer. Seeds equal modulo 2**32 - 1 are the same seed. "
        "Default: a random one.",
    )

    top_k: Annotated[int, Field(ge=-1, le=TOKENS_MAX), NULL_IS_DEFAULT] = Field(
        default=0, description="Extension. Draw from this many most likely tokens; 0 or -1 is all."
    )
    min_p: Unit = Field(
        default=0.0, description="Extension. Drop tokens less likely than this share of the most likely one."
    )
    typical_p: PositiveUnit = Field(default=1.0, description="Extension. Locally typical sampling; 1 is off.")
    repetition_penalty: Annotated[float, Field(gt=0, le=10), NULL_IS_DEFAULT] = Field(
        default=1.0, description="Extension. Divides the logits of recent tokens; 1 is off."
    )
    ignore_eos: Flag = Field(default=False, description="Extension. Go on to max_tokens, whatever the model says.")
    grammar: Annotated[Text, AfterValidator(_shallow)] | None = Field(
        default=None,
        min_length=1,
        max_length=GRAMMAR_CHARS_MAX,
        description="Extension. A GBNF grammar for the answer.",
    )
    timeout: float | None = Field(
        default=None, gt=0, le=TIMEOUT_S_MAX, description="Extension. Most seconds that the request may take."
    )
    adapter: Text | None = Field(
        default=None, min_length=1, max_length=256, description="Extension. One LoRA adapter, at scale 1."
    )
    adapters: Annotated[list[AdapterChoice], Field(fail_fast=True)] | None = Field(
        default=None, max_length=ADAPTERS_MAX, description="Extension. LoRA adapters to apply together."
    )
    user: str | None = Field(default=None, description="Accepted and ignored.")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts, none where the request has none."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def adapter_uses(self) -> tuple[AdapterUse, ...]:
        """The request's adapter set, in its order."""
        if self.adapter is not None:
            return (AdapterUse(self.adapter),)
        return tuple(AdapterUse(choice.name, choice.scale) for choice in self.adapters or ())

    @property
    def include_usage(self) -> bool:
        """Whether a streamed answer ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage is True

    def sampling(self, *, random_seed: int, grammar: Grammar | None = None) -> SamplingParams:
        """The engine's parameters. `random_seed` stands in where the request has no seed."""
        bias = tuple((int(token), value) for token, value in (self.logit_bias or {}).items())
        return SamplingParams(
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=bias,
            seed=seed32(random_seed if self.seed is None else self.seed),
            grammar=grammar,
        )

    @model_validator(mode="after")
    def _shared_rules(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise fault("is only allowed when 'stream' is true", "stream_options")
        if self.adapter is not None and self.adapters is not None:
            raise fault("cannot be given together with 'adapters'", "adapter")
        names = [choice.name for choice in self.adapters or ()]
        if len(set(names)) != len(names):
            raise fault("names the same adapter twice", "adapters")
        for token in self.logit_bias or ():
            if int(token) > TOKENS_MAX:
                raise fault(f"has {token}, which is not a token id", "logit_bias")
        return self
