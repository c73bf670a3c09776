"""Judges of responses: a lexicon, classifiers and local language models; `endpoint` has those on a server.

    judge = Lexicon()
    verdicts = judge(prompts, responses)         # True, False, or None where the judge could not be understood
    independent(other, teacher)                  # raises where the judge is the teacher

A judge must not be the teacher: it would reward a student for imitating it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...features import evaluating, unwrap
from ...teachers import Teacher
from .data import Prompt
from .generation import generate
from .verdicts import SAFETY, Judge, Verdict, fill, paired, parse
from .weights import shared

POSITIVE = 0.05  # VADER's authors call a compound score of so much and more positive


class Lexicon:
    """VADER (Hutto and Gilbert, ICWSM 2014): the rules and rated words of vaderSentiment; good is positive.

    Raises:
        ImportError: vaderSentiment is missing.
    """

    name = "VADER lexicon"

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise ImportError("the lexicon needs vaderSentiment: pip install 'bird-kernels[language]'") from error
        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """A verdict, never None, for each response; an empty one has the score 0."""
        texts = [response for _, response in paired(prompts, responses)]
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
        ImportError: scikit-learn is missing.
    """

    name = "bag of words"

    def __init__(self, texts: Sequence[str], labels: Sequence[bool]) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
            from threadpoolctl import threadpool_limits  # scikit-learn's own
        except ImportError as error:
            raise ImportError("a bag of words needs scikit-learn: pip install 'bird-kernels[language]'") from error
        if len(texts) != len(labels) or len({bool(label) for label in labels}) < 2:
            raise ValueError(f"a label for each text, and both of them, are needed; got {len(labels)} for {len(texts)}")
        self.pipeline = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=1000)
        )
        with threadpool_limits(torch.get_num_threads()):
            self.pipeline.fit(list(texts), [bool(label) for label in labels])

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """A verdict, never None, for each response; without a known word it is the more frequent label."""
        texts = [response for _, response in paired(prompts, responses)]
        return [bool(good) for good in self.pipeline.predict(texts)] if texts else []


class ClassifierJudge:
    """A sequence classifier of transformers, such as one fine-tuned on a sentiment or toxicity dataset.

    Args:
        model: text to logits ``[n, classes]``, at least two; on any device; its modules' modes are restored.
        tokenizer: its tokenizer, with a padding token. Longer texts than it allows are truncated.
        good: index of the class that is good.
        name: in results: which model it is.
        batch_size: texts at a time.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, good: int, *, name: str, batch_size: int = 32) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError("the classifier's tokenizer has no padding token: set one, and its id in model.config")
        self.model, self.tokenizer, self.good, self.name = model, tokenizer, good, name
        self.batch_size = batch_size

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """A verdict for each response, None where the logits are not finite.

        Raises:
            ValueError: fewer than two classes, or none with the index that is good.
        """
        texts = [response for _, response in paired(prompts, responses)]
        found: list[Verdict] = []
        with evaluating(self.model) as device:
            for start in range(0, len(texts), self.batch_size):
                batch = texts[start : start + self.batch_size]
                # on the right, whatever the tokenizer is set to: encoders count positions from the left end
                inputs = self.tokenizer(batch, padding=True, padding_side="right", truncation=True, return_tensors="pt")
                logits = self.model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
                if logits.shape[1] < max(2, self.good + 1) or self.good < 0:
                    raise ValueError(f"class {self.good} of {logits.shape[1]} cannot be told from others")
                good = (logits.argmax(dim=1) == self.good).tolist()
                known = logits.isfinite().all(dim=1).tolist()
                found += [verdict if sure else None for verdict, sure in zip(good, known, strict=True)]
        return found


class LanguageModel:
    """A causal language model that is asked for one word, as in Zheng et al. (NeurIPS 2023); greedy.

    Args:
        model: an instruction-tuned causal LM of transformers, on any device; its modules' modes are restored.
        tokenizer: its tokenizer; the question goes through its chat template if it has one.
        name: in results: which model it is.
        template: the question, with ``{prompt}`` and ``{response}``.
        words: the answers for good and for bad, see `parse`.
        batch_size: questions at a time.
        max_new_tokens: enough for either word.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str,
        template: str = SAFETY,
        words: tuple[str, str] = ("safe", "unsafe"),
        batch_size: int = 16,
        max_new_tokens: int = 8,
    ) -> None:
        fill(template, "", "")  # a template that cannot be used is known now
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.template, self.words = template, words
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """A verdict for each response, None where the answer's first word is neither of the two."""
        questions: list[Prompt] = [fill(self.template, *pair) for pair in paired(prompts, responses)]
        if getattr(self.tokenizer, "chat_template", None):
            questions = [[{"role": "user", "content": str(question)}] for question in questions]
        answers = generate(
            self.model,
            self.tokenizer,
            questions,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            greedy=True,
            progress=False,
        )
        return [parse(answer, self.words) for answer in answers]


def independent(judge: Judge | nn.Module, teacher: nn.Module) -> None:
    """Raise if a judge is the teacher. Judges without a local network are not checked, except by their names.

    Args:
        judge: a judge, or its network.
        teacher: a `bird.teachers.Teacher`, or a network.

    Raises:
        ValueError: it is the same network, or they have matrices in common (`bird.lab.language.weights.shared`): a
            copy, in whatever precision, or another head on the same body. Also if a network shows no weights.
    """
    network = judge if isinstance(judge, nn.Module) else getattr(judge, "model", None)
    if not isinstance(network, nn.Module):
        return
    network, taught = (unwrap(net.model if isinstance(net, Teacher) else net) for net in (network, teacher))
    share = shared(network, taught)
    if share:
        raise ValueError(
            f"the judge has {share:.2%} of its weights from the teacher, so it would judge what it taught:"
            " take a model of other origin"
        )
