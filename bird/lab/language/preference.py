"""Recipes of preferences as stages: a teacher, students tuned with and without it, their responses, and verdicts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...language.guidance import Guidance, Guide, concatenated
from ..duration import steps_to_train
from ..experiment import Cell
from ..stages import Stage
from .alignment import text_alignment
from .data import Material, Preference, Text, as_text, distinct_pairs, token_ids
from .data.files import local_or_hub
from .data.positivity import HELD_OUT, LEAD, positivity
from .data.preferences import PKU, pku_material, preference_material
from .data.snippets import snippets
from .experiment import (
    LanguageExperiment,
    classifier,
    controlled,
    fresh_network,
    pair_title,
    texts_and_labels,
    trained_classifier,
)
from .generation import generate, perplexity, require_room
from .judges import BagOfWords, ClassifierJudge, LanguageModel, Lexicon, require_independent
from .models import load_description, load_network, locate_network, require_decoder
from .recipe import Change, Data, Judging, Pair, Training
from .verdicts import Judge

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .endpoint import Endpoint

SAFETY = "pku-saferlhf"


@dataclass(frozen=True)
class Preferences(LanguageExperiment):
    """The experiment: no tuning, DPO, and DPO with BIRD, for every pair of networks, variant and seed."""

    def check(self) -> None:
        """Check what `LanguageExperiment` checks, the data, and that every judge can be made.

        Raises:
            FileNotFoundError: the data set or a judge's network is missing; the error says what is expected where.
            ImportError: a library that a judge or adapters need is missing.
            ValueError: a judge's key is not in the environment, a judge cannot be made as the recipe says, or a prompt
                leaves a student no room for a response.
        """
        for pair in self.recipe.networks.values():
            require_decoder(pair.student, "a student that is tuned on preferences")
        super().check()
        material = self.material(0)
        self._pairs(0)
        for pair in self.recipe.networks.values():
            self._check_lengths(pair, material)
        if self.recipe.transfer.adapters:
            self.require_library("peft")
        for name, judging in self.recipe.judges.items():
            try:
                self._check_judge(judging, material)
            except (ValueError, FileNotFoundError) as error:
                raise type(error)(f"judges.{name}: {error}") from error

    def _check_lengths(self, pair: Pair, material: Material) -> None:
        """Check that a student has positions for every prompt with a whole response, and for the held-out texts."""
        config, tokenizer = load_description(pair.student)
        try:
            prompts = [token_ids(tokenizer, prompt) for prompt in material.prompts]
            texts = [[*token_ids(tokenizer, text), tokenizer.eos_token_id] for text in material.texts]  # see alignment
            require_room(config, "prompt", prompts, self.recipe.generation.max_new_tokens)
            require_room(config, "held-out text", texts)
        except ValueError as error:
            raise ValueError(f"student {pair.student}: {error}") from error

    def _check_judge(self, judging: Judging, material: Material) -> None:
        if judging.kind == "lexicon":
            self.require_library("vaderSentiment")
        elif judging.kind == "bag-of-words" and len({row.label for row in material.judged}) < 2:
            raise ValueError(f"{self.recipe.data.source} has no texts to train a bag of words on: choose another kind")
        elif judging.kind == "endpoint":
            endpoint(judging, None)
        elif judging.kind in ("classifier", "language-model"):
            if judging.kind == "language-model":
                require_decoder(judging.model, "a judge of kind 'language-model'")
            locate_network(judging.model)
        if judging.key_variable is not None and not os.environ.get(judging.key_variable):
            raise ValueError(f"the judge's key is expected in the environment variable {judging.key_variable}")

    def cell(self, networks: str, variant: str, method: str, seed: int) -> Cell:
        """The stages of an entry."""
        pair = self.recipe.networks[networks]
        change, training = self.change(pair, variant)
        teacher = self._teacher(pair, seed)
        policy = None if method == "none" else self._policy(pair, change, training, method, teacher, seed)
        responses = self._responses(pair, policy, seed)
        scores = {"teacher": teacher, "responses": responses, "alignment": self._aligned(pair, policy, teacher, seed)}
        if self.recipe.data.ranked:
            scores["teacher's ranking"] = self._teachers_ranking(pair, teacher, seed)
            if policy is not None:
                scores["ranking"] = self._ranking(pair, policy, training, seed)
        for name, judging in self.recipe.judges.items():
            scores[f"judge {name}"] = self._verdicts(pair, judging, responses, teacher, seed)
        return Cell(networks, variant, method, seed, scores, policy)

    def prompts(self, seed: int) -> list[str]:
        """The held-out prompts, as text."""
        return [as_text(prompt) for prompt in self.material(seed).prompts]

    def material(self, seed: int) -> Material:
        """The texts of a seed, no more prompts and held-out texts than the recipe asks for."""
        return _material(self.recipe.data, seed, self.data_root)

    def _teacher(self, pair: Pair, seed: int) -> Stage:
        """A classifier that tells good responses from bad ones; result: its accuracy on rows that it has not seen."""
        about = self.about(
            seed,
            held_out=self.recipe.data.held_out,  # what is held out leaves the rest
            network=pair.teacher,
            student=pair.student,  # whose chat template it reads
            pooling=pair.pooling,
            training=self.recipe.teacher.about,
        )

        def make(folder: Path) -> dict[str, Any]:
            from .classifiers import certain, class_probabilities, train_classifier

            rows = self.material(seed).taught
            model, tokenizer = classifier(pair.teacher, pair.pooling, seed)
            read = self._reader(pair, tokenizer)
            student = fresh_network(pair.student, "causal")[1]
            texts = [read(*spoken(student, prompt, response)) for prompt, response, _ in rows]
            labels = [label for *_, label in rows]
            kept = len(rows) - max(1, len(rows) // 10)
            history = train_classifier(
                model, tokenizer, texts[:kept], certain(labels[:kept]), self.recipe.teacher, folder / "training",
                seed=seed, **self.surroundings,
            )  # fmt: skip
            found = class_probabilities(model, tokenizer, texts[kept:], max_length=self.recipe.teacher.max_length)
            right = found.argmax(1) == torch.tensor(labels[kept:])
            return {"history": history, "accuracy": right.double().mean().item()}

        return Stage("teacher", about, make, title=pair_title(pair, seed))

    def _reader(self, pair: Pair, tokenizer: PreTrainedTokenizerBase) -> Callable[[str, str], str]:
        """A function of prompt and completion that gives the teacher's text: without the lead, within its window."""
        return partial(_read, tokenizer, self.recipe.teacher.max_length or 512)

    def _guidance(self, pair: Pair, change: Change, method: str, teacher: Stage) -> Guidance:
        model, tokenizer = trained_classifier(pair.teacher, pair.pooling, teacher.folder(self.root), self.device)
        return Guidance(
            model,
            tokenizer,
            text=self._reader(pair, tokenizer),
            **controlled(method)
            | self.guiding(change)
            | {"teacher_pooling": self.recipe.guidance.teacher_pooling or pair.pooling},
        )

    def _policy(self, pair: Pair, change: Change, training: Training, method: str, teacher: Stage, seed: int) -> Stage:
        """A student tuned on preferences; result: what was logged at each step."""
        about = self.about_training(seed, change, network=pair.student, training=training.about, method=method)
        guided = "bird" in method
        if guided:
            about |= {"guidance": self.guiding(change)}

        def make(folder: Path) -> dict[str, Any]:
            from .policies import train_policy

            model, tokenizer = fresh_network(pair.student, "causal")
            guidance = self._guidance(pair, change, method, teacher) if guided else None
            pairs = self._pairs(seed)[0][: self.limit(change)]
            steps = steps_to_train(len(pairs), training.batch_size, training.epochs)
            history = train_policy(
                model, tokenizer, pairs, training, folder / "training", guidance=guidance, seed=seed,
                save_every=max(5, steps // 5), **self.surroundings,
            )  # fmt: skip
            return {"history": history}

        return Stage(f"policy-{method}", about, make, (teacher,) if guided else (), pair_title(pair, seed))

    def _pairs(self, seed: int) -> tuple[list[Preference], list[Preference]]:
        """The pairs to train on, and those to be ranked.

        Raises:
            ValueError: there are fewer pairs to be ranked than the recipe asks for.
        """
        material, count = self.material(seed), self.recipe.data.ranked
        trained, tested = ([row for row in rows if self._is_short(row)] for rows in (material.pairs, material.tested))
        if not material.tested:
            trained, tested = trained[count:], trained[:count]
        if len(tested) < count:
            raise ValueError(f"data: ranked asks for {count} pairs, and of seed {seed} there are {len(tested)}")
        return trained, tested[:count]

    def _is_short(self, pair: Preference) -> bool:
        most = self.recipe.data.words
        texts = [text for text in (pair.chosen, pair.rejected) if isinstance(text, str)]
        return most is None or all(len(text.split()) <= most for text in texts)

    def _ranking(self, pair: Pair, policy: Stage | None, training: Training, seed: int) -> Stage:
        """How a student ranks pairs that nobody was trained on; None for the reference: their log-probabilities.

        Result: ``margins``, of each pair DPO's implicit reward of the chosen response less that of the rejected one,
        with their mean and the share above 0.
        """
        data, how = self.recipe.data, {"max_length": training.max_length, "bf16": training.bf16}
        about = self.about(seed, network=pair.student, held_out=data.held_out, words=data.words, **how)
        reference = None if policy is None else self._ranking(pair, None, training, seed)

        def make(folder: Path) -> dict[str, Any]:
            from .policies import log_probabilities

            model, tokenizer = self._student(pair, policy)
            _, pairs = self._pairs(seed)
            found = log_probabilities(model, tokenizer, pairs, training, folder / "ranking", **self.surroundings)
            if reference is None:
                return dict(found)
            before, beta = reference.result(self.root) or {}, training.preference_beta
            gains = {k: [now - then for now, then in zip(found[k], before[k], strict=True)] for k in found}
            margins = [beta * (good - bad) for good, bad in zip(gains["chosen"], gains["rejected"], strict=True)]
            return {"accuracy": fmean(margin > 0 for margin in margins), "margin": fmean(margins), "margins": margins}

        title = pair_title(pair, seed)
        if policy is None or reference is None:
            return Stage("reference", about, make, title=title)
        return Stage("ranking", about, make, (policy, reference), title)

    def _teachers_ranking(self, pair: Pair, teacher: Stage, seed: int) -> Stage:
        """How the teacher ranks the same pairs; result: the share of them whose chosen response it finds better."""
        about = self.about(seed, held_out=self.recipe.data.held_out, words=self.recipe.data.words)

        def make(folder: Path) -> dict[str, Any]:
            from .classifiers import class_probabilities

            model, tokenizer = trained_classifier(pair.teacher, pair.pooling, teacher.folder(self.root), self.device)
            read, speaker = self._reader(pair, tokenizer), fresh_network(pair.student, "causal")[1]
            _, pairs = self._pairs(seed)
            good, bad = (
                class_probabilities(
                    model,
                    tokenizer,
                    [read(*spoken(speaker, row.prompt, getattr(row, name))) for row in pairs],
                    max_length=self.recipe.teacher.max_length,
                )[:, 1]
                for name in ("chosen", "rejected")
            )
            return {"accuracy": (good > bad).double().mean().item()}

        return Stage("teacher-ranking", about, make, (teacher,), pair_title(pair, seed))

    def _student(self, pair: Pair, policy: Stage | None) -> tuple[Any, PreTrainedTokenizerBase]:
        model, tokenizer = fresh_network(pair.student, "causal")
        if policy is not None:
            from .policies import WEIGHTS
            from .training import restore

            restore(model, policy.folder(self.root) / "training" / WEIGHTS)
        return nn.Module.to(model, self.device), tokenizer

    def _responses(self, pair: Pair, policy: Stage | None, seed: int) -> Stage:
        """A student's responses; result: those, its perplexity, and the share of distinct pairs of words."""
        options = asdict(self.recipe.generation)
        about = self.about(seed, network=pair.student, generation=options, held_out=self.recipe.data.held_out)

        def make(folder: Path) -> dict[str, Any]:
            material = self.material(seed)
            model, tokenizer = self._student(pair, policy)
            path = folder / "responses.jsonl"
            responses = generate(
                model, tokenizer, material.prompts, path=path, seed=seed, progress=self.progress, **options
            )
            return {
                "responses": responses,
                "perplexity": perplexity(model, tokenizer, material.texts),
                "distinct": distinct_pairs(responses),
            }

        return Stage("responses", about, make, () if policy is None else (policy,), pair_title(pair, seed))

    def _verdicts(self, pair: Pair, judging: Judging, responses: Stage, teacher: Stage, seed: int) -> Stage:
        """A judge's verdicts on responses; result: 1, 0 or null for each."""
        about = self.about(seed, judge=judging.about)

        def make(folder: Path) -> dict[str, Any]:
            material = self.material(seed)
            judge = self._judge(judging, material, folder)
            if isinstance(judge, (ClassifierJudge, LanguageModel)):
                model, _ = trained_classifier(pair.teacher, pair.pooling, teacher.folder(self.root), self.device)
                require_independent(judge.model, model)
            answers = (responses.result(self.root) or {})["responses"]
            verdicts = judge(material.prompts, answers)
            return {"verdicts": [None if verdict is None else int(verdict) for verdict in verdicts], "name": judge.name}

        return Stage("verdicts", about, make, (responses, teacher), pair_title(pair, seed))

    def _judge(self, judging: Judging, material: Material, folder: Path) -> Judge:
        if judging.kind == "lexicon":
            return Lexicon()
        if judging.kind == "bag-of-words":
            texts, labels = texts_and_labels(material.judged)
            return BagOfWords(texts, [bool(label) for label in labels])
        if judging.kind == "endpoint":
            return endpoint(judging, folder / "answers.jsonl")
        if judging.kind == "classifier":
            model, tokenizer = load_network(judging.model, "classifier")
            return ClassifierJudge(nn.Module.to(model, self.device), tokenizer, name=judging.model)
        model, tokenizer = load_network(judging.model, "causal")
        return LanguageModel(nn.Module.to(model, self.device), tokenizer, name=judging.model)

    def _aligned(self, pair: Pair, policy: Stage | None, teacher: Stage, seed: int) -> Stage:
        """Alignment of a student with the teacher; result: their unbiased CKA on held-out texts."""
        held_out, guiding = self.recipe.data.held_out, self.guiding(Change())
        about = self.about(seed, network=pair.student, held_out=held_out, guidance=guiding)
        if guiding["completion_only"]:
            about["without"] = "the first token"

        def make(folder: Path) -> dict[str, Any]:
            model, tokenizer = self._student(pair, policy)
            plain = Change(loss="cka", gradients=False)
            guide = Guide(self._guidance(pair, plain, "unbiased", teacher), model, tokenizer)
            return {"cka": text_alignment(guide, model, tokenizer, self.material(seed).texts)}

        parents = (teacher,) if policy is None else (policy, teacher)
        return Stage("alignment", about, make, parents, pair_title(pair, seed))


def endpoint(judging: Judging, cache: Path | None) -> Endpoint:
    """A recipe's judge on a server."""
    from .endpoint import Endpoint

    options: dict[str, Any] = {name: getattr(judging, name) for name in ("max_tokens", "key_header", "timeout")}
    return Endpoint(judging.url, judging.model, judging.key_variable, cache=cache, **options)


def spoken(tokenizer: PreTrainedTokenizerBase, prompt: Text, response: Text) -> tuple[str, str]:
    """Prompt and response as text, with the chat template but without special tokens, as guidance decodes them."""
    if isinstance(prompt, str) and isinstance(response, str):
        return prompt, response
    assert not isinstance(prompt, str)
    assert not isinstance(response, str)
    whole: Any = tokenizer.apply_chat_template([*prompt, *response], tokenize=True, return_dict=True)
    asked: Any = tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=True, add_generation_prompt=True)
    texts = [str(tokenizer.decode(ids["input_ids"], skip_special_tokens=True)) for ids in (asked, whole)]
    return texts[0], texts[1].removeprefix(texts[0])


def _read(tokenizer: Any, window: int, prompt: str, completion: str) -> str:
    """The text without the lead that a prompt may have; if it is too long, the end of it, where the response stands."""
    text = concatenated(prompt, completion).removeprefix(f"{LEAD} ")
    offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)["offset_mapping"]
    room = window - tokenizer.num_special_tokens_to_add()
    return text if len(offsets) <= room else text[offsets[-room][0] :]


@lru_cache(maxsize=4)
def _material(data: Data, seed: int, root: Path | None) -> Material:
    held_out = data.held_out
    if data.source == "positivity":
        count = HELD_OUT if held_out is None else held_out
        parts = positivity(snippets(root), seed, held_out=count, taught=data.taught, judged=data.judged)
        return replace(parts, texts=parts.texts[:held_out])
    if data.source == SAFETY:
        return pku_material(local_or_hub(data.source, PKU, root), held_out)
    return preference_material(data.source, seed, held_out)
