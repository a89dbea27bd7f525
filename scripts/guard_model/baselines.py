"""Cheap classifiers to compare with: logistic regression on TF-IDF and on averaged word vectors."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from guard_model.augment import Example
from guard_model.data import Fold, Prompt, Template
from guard_model.encoding import Encoding
from guard_model.runs import Mix, fold_name, mixed
from guard_model.scoring import Scored
from guard_model.splits import split
from guards.text import clean

Scores = npt.NDArray[np.float64]
Fit = Callable[[Sequence[str], Sequence[bool]], Callable[[Sequence[str]], Scores]]


def tfidf(texts: Sequence[str], labels: Sequence[bool]) -> Callable[[Sequence[str]], Scores]:
    """Words and pairs of words, weighed by TF-IDF; logistic regression."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model = LogisticRegression(C=4.0, max_iter=300, class_weight="balanced")
    model.fit(vectorizer.fit_transform(texts), labels)
    return lambda found: np.asarray(model.decision_function(vectorizer.transform(found)), dtype=float)


def word_vectors(encoder_folder: Path) -> Fit:
    """The mean of the encoder's own embeddings of words and word pieces; logistic regression."""
    encoding = Encoding(encoder_folder / "tokenizer.json")
    table = next(
        value
        for key, value in load_file(encoder_folder / "model.safetensors").items()
        if key.endswith("word_embeddings.weight")
    ).astype(np.float32)

    def means(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.array([table[ids or [encoding.end]].mean(0) for ids in encoding.ids(texts)])

    def fit(texts: Sequence[str], labels: Sequence[bool]) -> Callable[[Sequence[str]], Scores]:
        x = means(texts)
        centre, spread = x.mean(0), x.std(0) + 1e-6
        model = LogisticRegression(C=0.1, max_iter=300, class_weight="balanced")
        model.fit((x - centre) / spread, labels)
        return lambda found: np.asarray(model.decision_function((means(found) - centre) / spread), dtype=float)

    return fit


def scored(fit: Fit, prompts: Sequence[Prompt], templates: Sequence[Template], fold: Fold, seed: int) -> list[Scored]:
    """Trained on the examples of one pass of the encoder's training, whole texts instead of windows, and scored on the
    same sets."""
    found = split(prompts, templates, fold, seed=seed)
    examples = mixed(found, Mix(), random.Random(seed), seed)
    examples = [example for example in examples if example.unsafe or not example.jailbreak]  # as the encoder's loss
    score = fit(*_texts(examples, seed))
    rows = []
    for name, members in found.sets.items():
        if not members:
            continue
        values = score([clean(prompt.text) for prompt in members])
        rows += [
            Scored(
                fold_name(fold), name, p.id, p.source, p.lang, p.kind, p.unsafe, float(value), 0.0, 0.0, agreed=p.agreed
            )
            for p, value in zip(members, values, strict=True)
        ]
    return rows


def _texts(examples: Sequence[Example], seed: int) -> tuple[list[str], list[bool]]:
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    return [clean(example.text) for example in shuffled], [example.unsafe for example in shuffled]
