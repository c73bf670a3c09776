"""Judges of responses: a lexicon, classifiers and local language models; `endpoint` has those on a server.

    judge = Lexicon()
    verdicts = judge(prompts, responses)         # True, False, or None where the judge could not be understood
    require_independent(network, teacher)        # raises where the judge's network is the teacher's

A judge must not be the teacher: it would reward a student for imitating it. The libraries that judges need are looked
for before a recipe trains anything (`Preferences.check`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...features import evaluating
from .data import Prompt
from .generation import generate
from .verdicts import Verdict, question, read_verdict

POSITIVE = 0.05  # VADER's authors call a compound score of so much and more positive


class Lexicon:
    """VADER (Hutto and Gilbert, ICWSM 2014): the rules and rated words of vaderSentiment; good is positive."""

    name = "VADER lexicon"

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """A verdict, never None, for each response; an empty response has the score 0 and is not good."""
        texts = [response for _, response in zip(prompts, responses, strict=True)]
        return [self._analyzer.polarity_scores(text)["compound"] > POSITIVE for text in texts]


class BagOfWords:
    """Words and pairs of words by TF-IDF, and logistic regression on them, both of scikit-learn.

    It is independent of language models, except for its training texts: use others than the student's.
    ``pipeline`` is the fitted pipeline of scikit-learn.

    Args:
        texts: to be trained on.
        labels: whether each is good; both must occur.

    Raises:
        ValueError: one kind of label only, or not one for each text.
    """

    name = "bag of words"

    def __init__(self, texts: Sequence[str], labels: Sequence[bool]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from threadpoolctl import threadpool_limits  # scikit-learn's own

        if len(texts) != len(labels) or len({bool(label) for label in labels}) < 2:
            raise ValueError(f"a label for each text, and both of them, are needed; got {len(labels)} for {len(texts)}")
        self.pipeline = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=1000)
        )
        with threadpool_limits(torch.get_num_threads()):
            self.pipeline.fit(list(texts), [bool(label) for label in labels])

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """A verdict, never None, for each response; a response without a known word gets the more frequent label."""
        texts = [response for _, response in zip(prompts, responses, strict=True)]
        return [bool(good) for good in self.pipeline.predict(texts)] if texts else []


class ClassifierJudge:
    """A sequence classifier of transformers with two classes, of which class 1 is good.

    Args:
        model: text to logits ``[n, 2]``, on any device; its modules' modes are restored.
        tokenizer: its tokenizer, with a padding token. Longer texts than it allows are truncated.
        name: in results: which model it is.
        batch_size: texts at a time.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, name: str, batch_size: int = 32) -> None:
        self.model, self.tokenizer, self.name, self.batch_size = model, tokenizer, name, batch_size

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """A verdict for each response, None where the logits are not finite."""
        texts = [response for _, response in zip(prompts, responses, strict=True)]
        found: list[Verdict] = []
        with evaluating(self.model) as device:
            for start in range(0, len(texts), self.batch_size):
                batch = texts[start : start + self.batch_size]
                # on the right, whatever the tokenizer is set to: encoders count positions from the left end
                inputs = self.tokenizer(batch, padding=True, padding_side="right", truncation=True, return_tensors="pt")
                logits = self.model(**inputs.to(device)).logits
                good, known = (logits.argmax(dim=1) == 1).tolist(), logits.isfinite().all(dim=1).tolist()
                found += [verdict if sure else None for verdict, sure in zip(good, known, strict=True)]
        return found


class LanguageModel:
    """A causal language model that is asked for one word, as in Zheng et al. (NeurIPS 2023); greedy.

    Args:
        model: an instruction-tuned causal LM of transformers, on any device; its modules' modes are restored.
        tokenizer: its tokenizer; the question goes through its chat template if it has one.
        name: in results: which model it is.
        batch_size: questions at a time.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, name: str, batch_size: int = 16) -> None:
        self.model, self.tokenizer, self.name, self.batch_size = model, tokenizer, name, batch_size

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """A verdict for each response, None where the answer's first word is neither of the two."""
        questions: list[Prompt] = [question(*pair) for pair in zip(prompts, responses, strict=True)]
        if getattr(self.tokenizer, "chat_template", None):
            questions = [[{"role": "user", "content": str(text)}] for text in questions]
        options: dict[str, Any] = {"max_new_tokens": 8, "batch_size": self.batch_size, "greedy": True}
        answers = generate(self.model, self.tokenizer, questions, progress=False, **options)
        return [read_verdict(answer) for answer in answers]


def require_independent(network: nn.Module, teacher: nn.Module) -> None:
    """Raise a ValueError if a judge's network has matrices in common with the teacher's (`shared_weights`).

    It is then the teacher, a copy of it in whatever precision, or another head on the same body.
    """
    share = shared_weights(network, teacher)
    if share:
        raise ValueError(
            f"the judge has {share:.2%} of its weights from the teacher, so it would judge what it taught:"
            " take a model of other origin"
        )


def shared_weights(model: nn.Module, other: nn.Module) -> float:
    """The share of a network's matrices, by elements, that are matrices of another one too.

    Compared are values in bf16, whatever their names: the same weights in another precision, in a wrapper, or under
    another head are the same weights. Vectors, and matrices all of one value, do not count: independent networks
    start with the same ones.
    """
    ours, theirs = (
        [p.detach() for p in network.parameters() if p.ndim > 1 and p.numel()] for network in (model, other)
    )
    shapes = {p.shape for p in ours} & {p.shape for p in theirs}  # nothing else needs to be hashed
    known = {_digest(p) for p in theirs if p.shape in shapes}
    same = [p for p in ours if p.shape in shapes and (p != p.flatten()[0]).any() and _digest(p) in known]
    return sum(p.numel() for p in same) / sum(p.numel() for p in ours)


def _digest(matrix: Tensor) -> bytes:
    values = matrix.bfloat16() if matrix.is_floating_point() else matrix
    return hashlib.sha256(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).digest()
