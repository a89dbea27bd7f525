"""How the guard's classifier is made: windows to learn from, the encoder, its training, its export, its calibration."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from guard_model import scoring  # noqa: E402
from guard_model.augment import Example, plain, surrounded, wrapped  # noqa: E402
from guard_model.data import WRITTEN, Prompt, Template  # noqa: E402
from guard_model.encoder import HEADS, SPAN, Encoder, pretrained  # noqa: E402
from guard_model.encoding import OUTPUTS, WINDOW, Encoding  # noqa: E402
from guard_model.training import Recipe, batches, doubted, padded, train  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from guards.card import Scale  # noqa: E402
from guards.ngrams import hashed  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(60)), "bomb", "bread", "##s"]
WIDTH, INNER, LAYERS = 2 * HEADS, 40, 3
Array = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a BERT of random weights, as the encoder's directory holds them."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = Tokenizer(WordPiece({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(_weights(), folder / "model.safetensors")
    return folder


def _weights() -> dict[str, Array]:
    draw = np.random.default_rng(0)

    def some(*shape: int) -> Array:
        return draw.normal(0, 0.2, shape).astype(np.float32)

    def norm(name: str) -> dict[str, Array]:
        return {f"{name}.weight": 1 + some(WIDTH), f"{name}.bias": some(WIDTH)}

    def linear(name: str, out: int, into: int) -> dict[str, Array]:
        return {f"{name}.weight": some(out, into), f"{name}.bias": some(out)}

    found = {
        "embeddings.word_embeddings.weight": some(len(WORDS), WIDTH),
        "embeddings.position_embeddings.weight": some(512, WIDTH),
        "embeddings.token_type_embeddings.weight": some(2, WIDTH),
        **norm("embeddings.LayerNorm"),
    }
    for layer in range(LAYERS + 1):
        place = f"encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            found |= linear(f"{place}.attention.self.{name}", WIDTH, WIDTH)
        found |= linear(f"{place}.attention.output.dense", WIDTH, WIDTH)
        found |= norm(f"{place}.attention.output.LayerNorm") | norm(f"{place}.output.LayerNorm")
        found |= linear(f"{place}.intermediate.dense", INNER, WIDTH) | linear(f"{place}.output.dense", WIDTH, INNER)
    return found


def _reference(ids: list[int], layers: int) -> list[Array]:
    """BERT written out in numpy, for one text: the states after each layer, (tokens, width). The first: embedded."""
    w = _weights()

    def norm(x: Array, name: str) -> Array:
        spread = np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return np.asarray((x - x.mean(-1, keepdims=True)) / spread * w[f"{name}.weight"] + w[f"{name}.bias"])

    def linear(x: Array, name: str) -> Array:
        return np.asarray(x @ w[f"{name}.weight"].T + w[f"{name}.bias"])

    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
    states = [norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")]
    for layer in range(layers):
        x, place = states[-1], f"encoder.layer.{layer}"
        q, k, v = (linear(x, f"{place}.attention.self.{name}") for name in ("query", "key", "value"))
        mixed, size = np.zeros_like(x), WIDTH // HEADS
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            weights = np.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
            mixed[:, part] = weights / weights.sum(-1, keepdims=True) @ v[:, part]
        x = norm(x + linear(mixed, f"{place}.attention.output.dense"), f"{place}.attention.output.LayerNorm")
        inner = linear(x, f"{place}.intermediate.dense")
        inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        states.append(norm(x + linear(inner, f"{place}.output.dense"), f"{place}.output.LayerNorm"))
    return states


def _encoder(folder: Path, layers: int = LAYERS, early: int = 1) -> Encoder:
    torch.manual_seed(0)
    return pretrained(folder / "model.safetensors", layers, early).eval()


def _scores(encoder: Encoder, rows: list[list[int]]) -> Array:
    """Early and late logits, (2, rows, outputs)."""
    with torch.inference_mode():
        return torch.stack(encoder(*padded(rows))).numpy()


def _spans(states: Array) -> Array:
    """The mean and the highest values of the whole, and of spans of SPAN tokens, three quarters of them there."""
    spans = [states[begin : begin + SPAN] for begin in range(0, len(states), SPAN // 2)]
    spans = [states, *(span for span in spans if len(span) >= 0.75 * SPAN)]
    return np.array([np.concatenate([span.mean(0), span.max(0)]) for span in spans])


@pytest.mark.parametrize(("layers", "early"), [(2, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("length", [4, 24, 39, 40, 64])
def test_the_encoder_computes_what_bert_computes(folder: Path, layers: int, early: int, length: int) -> None:
    ids = [2, *np.random.default_rng(1).integers(4, 64, length - 2).tolist(), 3]
    encoder = _encoder(folder, layers, early)
    states = _reference(ids, layers)
    late = np.array([np.concatenate([states[-1][0], span]) for span in _spans(states[-2])])
    with torch.inference_mode():
        expected = [
            head(torch.tensor(features, dtype=torch.float32)).numpy().max(0, keepdims=True)
            for head, features in ((encoder.early_head, _spans(states[early])), (encoder.head, late))
        ]
    np.testing.assert_allclose(_scores(encoder, [ids]), expected, atol=1e-5)


def test_padding_changes_nothing(folder: Path) -> None:
    rows = [[2, 9, 3], [2, *range(4, 40), 3], [2, 11, 12, 3], [2, *range(4, 14), 3], [2, *range(4, 24), 3]]
    ids, seen = padded(rows)
    assert seen is not None
    assert ids.shape == seen.shape == (5, 38)
    encoder = _encoder(folder)
    alone = np.concatenate([_scores(encoder, [row]) for row in rows], axis=1)
    np.testing.assert_allclose(_scores(encoder, rows), alone, atol=1e-5)


def test_the_exported_network_says_the_same(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    from guard_model.export import write_model

    encoder = _encoder(folder)
    write_model(encoder, folder / "tokenizer.json", tmp_path / "model")
    first, rest = (
        onnxruntime.InferenceSession(str(tmp_path / "model" / name), providers=["CPUExecutionProvider"])
        for name in ("first.onnx", "rest.onnx")
    )
    rows = [[2, *range(4, 20), 3], [2, *range(20, 36), 3]]
    states, early = first.run(None, {"ids": np.array(rows)})
    assert states.shape == (2, 18, WIDTH)
    (late,) = rest.run(None, {"states": states})
    for found, expected in zip((early, late), _scores(encoder, rows), strict=True):
        assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_batches_are_of_like_length_and_bounded(folder: Path) -> None:
    chance = random.Random(1)
    texts = [" ".join("bread" for _ in range(chance.randrange(1, 90))) for _ in range(200)]
    examples = [plain(Prompt(text, False, "benign", "s", "en", str(n))) for n, text in enumerate(texts)]
    windows = Encoding(folder / "tokenizer.json").training_windows(examples, chance)
    found = batches(windows, 400, chance)
    assert sorted(len(window.ids) for batch in found for window in batch) == sorted(len(w.ids) for w in windows)
    for batch in found:
        longest = max(len(window.ids) for window in batch)
        assert len(batch) * longest <= 400
        assert longest - min(len(window.ids) for window in batch) < 24


LONG = Prompt(" ".join(f"w{n % 60}" for n in range(600)), False, "benign", "long", "en", "1")
BAD = Prompt("bomb bomb bomb bomb bomb", True, "direct", "bad", "en", "1", frozenset({"weapons"}))


@pytest.mark.parametrize("seed", range(12))
def test_an_unsafe_window_holds_what_makes_it_unsafe(folder: Path, seed: int) -> None:
    encoding = Encoding(folder / "tokenizer.json")
    example = surrounded(BAD, LONG, random.Random(seed))
    (window,) = encoding.training_windows([example], random.Random(seed))
    assert len(window.ids) <= WINDOW
    assert window.ids.count(WORDS.index("bomb")) >= 5


def test_labels_and_what_is_known_of_them(folder: Path) -> None:
    template = Template("w1 {prompt} w2", "t", "1")
    harmless = replace(LONG, text="bread")
    examples: list[Example] = [plain(BAD), plain(harmless), wrapped(BAD, template), wrapped(harmless, template)]
    windows = Encoding(folder / "tokenizer.json").training_windows(examples, random.Random(0))
    assert [window.labels[:2] for window in windows] == [(1, 0), (0, 0), (1, 1), (0, 1)]
    assert [window.known[:2] for window in windows] == [(1, 1), (1, 1), (1, 1), (0, 1)]
    weapons = OUTPUTS.index("weapons")
    assert [window.labels[weapons] for window in windows] == [1, 0, 1, 0]
    assert [window.known[weapons] for window in windows] == [1, 0, 1, 0]


@pytest.mark.parametrize("frozen", [1, 2])
def test_training_learns(folder: Path, frozen: int) -> None:
    chance = random.Random(0)
    encoding = Encoding(folder / "tokenizer.json")
    prompts = [
        Prompt(
            " ".join([*chance.choices(WORDS[4:64], k=5), "bomb" if n % 2 else "bread"]), n % 2 == 1, "k", "s", "en", ""
        )
        for n in range(400)
    ]
    encoder = _encoder(folder, 3)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    recipe = Recipe(
        layers=3, early=1, frozen=frozen, early_epochs=8, epochs=8, probe_epochs=2,
        probe_rate=5e-3, rate=2e-3, head_rate=5e-3, batch_tokens=256, doubtful=0.5, certain=0.5,
    )  # fmt: skip
    examples = [plain(prompt) for prompt in prompts]
    train(encoder, lambda _: encoding.training_windows(examples, chance), recipe)
    logits = _scores(encoder, [encoding.framed(ids) for ids in encoding.ids([prompt.text for prompt in prompts])])
    for early_or_late, least in zip(logits, (0.75, 0.95), strict=True):  # below a frozen layer little can be learned
        right = (early_or_late[:, 0] > 0) == np.array([prompt.unsafe for prompt in prompts])
        assert right.mean() > least
    tuned = encoder.state_dict()
    body = [name for name in before if "head." not in name]
    still = [name for name in body if torch.equal(tuned[name], before[name])]
    trained = tuple(f"layers.{layer}." for layer in range(frozen, 3))
    assert still == [name for name in body if not name.startswith(trained)]
    assert not any(torch.equal(tuned[name], before[name]) for name in ("head.0.weight", "early_head.0.weight"))


def test_layers_under_the_early_head_stay_as_they_are(folder: Path) -> None:
    with pytest.raises(ValueError, match="early head stands on 2"):
        train(_encoder(folder, 3, early=2), lambda _: [], Recipe(layers=3, early=2, frozen=1))


@pytest.mark.parametrize(("doubtful", "certain", "kept"), [(0.25, 0.0, 25), (0.0, 0.0, 0), (0.0, 1.0, 100)])
def test_what_the_late_layers_are_trained_on(folder: Path, doubtful: float, certain: float, kept: int) -> None:
    encoder, encoding = _encoder(folder, 3), Encoding(folder / "tokenizer.json")
    chance = random.Random(0)
    words = [" ".join(chance.choices(WORDS[4:64], k=chance.randrange(3, 40))) for _ in range(100)]
    harmless = [plain(Prompt(text, False, "benign", "s", "en", text)) for text in words]
    template = Template("w1 {prompt} w2", "t", "1")
    others = [plain(BAD), wrapped(BAD, template), wrapped(replace(LONG, text="bread"), template)]
    windows = encoding.training_windows([*others, *harmless], chance)
    recipe = Recipe(doubtful=doubtful, certain=certain)
    found = doubted(encoder, windows, recipe, random.Random(1))
    assert len(found) == 3 + kept
    assert [window in found for window in windows[:3]] == [True] * 3  # what is harmful or a jailbreak stays
    early, _ = _scores(encoder, [window.ids for window in windows[3:]])
    surest = sorted(early[:, 0])[-kept:] if kept else []
    assert kept == 100 or sorted(float(early[windows[3:].index(w), 0]) for w in found[3:]) == pytest.approx(surest)


def _row(fold: str, kind: str, log_odds: float, *, unsafe: bool = False, foreign: bool = False) -> scoring.Scored:
    return scoring.Scored(fold, kind, "i", "s", "en", kind, unsafe, log_odds, log_odds, 1.0, foreign)


def test_scores_are_kept(tmp_path: Path) -> None:
    rows = [_row("a", "direct", 1.5, unsafe=True), _row("b", "benign", -2.0)]
    scoring.write(tmp_path / "x.jsonl", rows)
    assert scoring.read(tmp_path / "x.jsonl") == rows
    assert list(tmp_path.iterdir()) == [tmp_path / "x.jsonl"]


def test_log_odds() -> None:
    assert scoring.log_odds(0.5) == 0
    assert scoring.log_odds(1.0) == pytest.approx(-scoring.log_odds(0.0))
    assert scoring.log_odds(1.0) < 40
    assert Scale().probability(scoring.log_odds(0.3)) == pytest.approx(0.3)


def test_calibration() -> None:
    pytest.importorskip("sklearn")
    from guard_model import calibrate

    draw = np.random.default_rng(0)
    rows = [_row("ab"[n % 2], "benign", float(x)) for n, x in enumerate(draw.normal(-2, 1, 4000))]
    rows += [_row("ab"[n % 2], "direct", float(x), unsafe=True) for n, x in enumerate(draw.normal(2, 1, 4000))]
    rows += [_row("a", "benign", float(x), foreign=True) for x in draw.normal(1, 2, 4000)]
    scale = calibrate.scales(rows)["unsafe"]
    # Two normal distributions four spreads apart: the true log-odds are 4 x.
    assert scale.slope == pytest.approx(4, rel=0.15)
    assert scale.bias == pytest.approx(0, abs=0.3)
    limits = calibrate.thresholds(rows, scale)
    benign = [scale.probability(row.log_odds) for row in rows if row.set == "benign" and not row.foreign]
    assert np.mean(np.array(benign) > limits["balanced"]) == pytest.approx(0.01, abs=0.001)
    assert np.mean(np.array(benign) > limits["strict"]) == pytest.approx(0.05, abs=0.001)
    foreign = calibrate.foreign_scale(rows, scale, limits)
    assert foreign.slope == pytest.approx(0.5, rel=0.2)  # they score three spreads too high, and twice as wide
    mended = calibrate.foreign_scaled(rows, scale, foreign)
    probabilities = np.array([scale.probability(row.log_odds) for row in mended if row.foreign])
    assert np.mean(probabilities > limits["balanced"]) == pytest.approx(0.01, abs=0.001)
    assert np.mean(probabilities > limits["strict"]) == pytest.approx(0.05, abs=0.001)
    alike = [replace(row, log_odds=3.0) if row.foreign else row for row in rows]
    assert calibrate.foreign_scale(alike, scale, limits).slope == 1.0
    assert calibrate.foreign_scale([row for row in rows if not row.foreign], scale, limits) == Scale()
    # Written prompts in other languages, which score higher still, are no more often over a level than in English.
    ours = {"set": "in_distribution", "source": WRITTEN}
    spread = [
        replace(_row("all", "benign", float(value), foreign=foreign), **ours)
        for foreign, mean in ((False, -1.0), (True, 6.0))
        for value in np.random.default_rng(1).normal(mean, 1, 2000)
    ]
    stricter = calibrate.foreign_scale([*rows, *spread], scale, limits)
    for level, limit in limits.items():
        mended = calibrate.foreign_scaled([*rows, *spread], scale, stricter)
        shares = [
            np.mean([scale.probability(row.log_odds) > limit for row in mended if row.foreign == foreign and kind(row)])
            for foreign in (False, True)
            for kind in (lambda row: row.source == WRITTEN, lambda row: row.set == "benign")
        ]
        english, _, others, left_out = shares
        assert others == pytest.approx(english, abs=0.002)
        assert left_out < calibrate.LEVEL_RATES[level]  # of sources left out the fewer
    harmful = [replace(row, unsafe=True) for row in spread]
    assert calibrate.foreign_scale([*rows, *harmful], scale, limits) == foreign
    mended = calibrate.foreign_scaled(rows, scale, foreign)
    report = calibrate.report(mended, scale, limits)
    assert report["calibration_error"] < 0.02
    one_fold = [row for row in mended if row.fold == "a"]
    assert calibrate.report(one_fold, scale, limits)["calibration_error"] is None
    assert report["auc_direct_benign"] > 0.9
    assert report["levels"]["balanced"]["fold"]["a/direct"][1] == 2000


def test_the_report_tells_labels_that_a_second_reading_shares() -> None:
    pytest.importorskip("sklearn")
    from guard_model import calibrate

    rows = [_row(fold, "benign", -1.0 - n) for n in range(100) for fold in "ab"]
    rows += [_row(fold, "direct", 1.0 + n, unsafe=True) for n in range(100) for fold in "ab"]
    # Harmless, whatever their source says, and scored so.
    rows += [replace(_row("a", "direct", -9.0, unsafe=True), agreed=False)] * 100
    found = calibrate.calibrated(rows)
    assert found.scales["unsafe"].probability(0) == pytest.approx(0.5, abs=0.05)
    report = calibrate.report(rows, found.scales["unsafe"], found.thresholds)
    levels = report["levels"]["strict"]
    assert levels["set"]["direct"][:2] == [200, 300]
    assert levels["set_agreed"]["direct"][:2] == [200, 200]
    assert levels["set_agreed"]["benign"] == levels["set"]["benign"]
    assert report["calibration_error_agreed"] < report["calibration_error"]


def test_what_passes_after_the_first_layers() -> None:
    pytest.importorskip("sklearn")
    from guard_model import calibrate

    draw = np.random.default_rng(0)
    rows = []
    for n in range(4000):
        unsafe = n % 2 == 1
        late = float(draw.normal(3 if unsafe else -3, 1))
        row = _row("ab"[n // 2 % 2], "direct" if unsafe else "benign", late, unsafe=unsafe)
        rows.append(replace(row, early=late / 2 + float(draw.normal(0, 1))))
    found = calibrate.calibrated(rows)
    flagged = [row for row in rows if row.unsafe and found.scales["unsafe"].probability(row.log_odds) > 0.5]
    assert np.mean([row.early < found.passing for row in flagged]) == pytest.approx(0.01, abs=0.002)
    harmless = [row for row in rows if not row.unsafe]
    assert np.mean([row.early < found.passing for row in harmless]) > 0.5
    guarded = calibrate.as_guarded(rows, found)
    for before, after in zip(rows, guarded, strict=True):
        assert after.log_odds == (
            min(before.early, before.log_odds) if before.early < found.passing else before.log_odds
        )
    nothing = calibrate.calibrated([row for row in rows if not row.unsafe])
    assert nothing.passing == -math.inf


def test_ngrams_are_fitted(folder: Path) -> None:
    pytest.importorskip("sklearn")
    from guard_model import ngrams

    encoding = Encoding(folder / "tokenizer.json")
    prompts = [
        Prompt(f"w{n % 40} {'bomb' if n % 2 else 'bread'} w{n % 7}", n % 2 == 1, "k", "s", "en", "") for n in range(200)
    ]
    template = Template("w50 {prompt} w51", "t", "1")
    examples = [plain(prompt) for prompt in prompts]
    # Of a harmless question in a jailbreak nobody says that it is harmless: nothing is learned from it.
    examples += [wrapped(prompt, template) for prompt in prompts if not prompt.unsafe]
    found = ngrams.fitted(encoding.training_windows(examples, random.Random(0)), seed=0)
    bad, good, unknown = found.logits(["w3 bomb w2", "w3 bread w2", "zz yy"])
    assert bad > 1
    assert good < -1
    assert good < unknown < bad
    assert found.rarity[np.concatenate(hashed("w50"))].sum() < found.rarity[np.concatenate(hashed("w39"))].sum()
