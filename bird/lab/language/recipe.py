"""Experiments with language models as TOML files: preferences, and weak-to-strong.

A file is like those of images, with ``kind = "preference"`` or ``"weak-to-strong"`` at its head; each part is
described at its class. A table ``[judges.<name>]`` describes a judge of responses, see `Judging`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from ...losses import BirdLoss
from ..claims import Claim, require_claims
from ..recipe import made, require_known, require_name, require_percents, require_table, require_within, settings_of
from .data.positivity import SHARE

PREFERENCES = {
    "none": "None",
    "dpo": "DPO",
    "dpo-bird": "DPO + BIRD",
    "dpo-bird-unbiased": "DPO + BIRD, unbiased",
    "dpo-bird-permuted": "DPO + BIRD, teacher permuted",
}
WEAK_TO_STRONG = {
    "weak": "Weak model",
    "naive": "Soft labels",
    "bird": "Soft labels + BIRD",
    "bird-unbiased": "Soft labels + BIRD, unbiased",
    "bird-permuted": "Soft labels + BIRD, teacher permuted",
    "bird-pretrained": "Soft labels + BIRD, teacher before its task",
    "bird-anchored": "Soft labels + BIRD, to the student before its task",
    "ceiling": "Ceiling",
}
CONTROLS = "permuted", "pretrained", "anchored"  # what the methods' names end with that run if a recipe names them
RecipePart = TypeVar("RecipePart", "Training", "Guiding")
ROWS = "both", "chosen", "rejected", "prompt"  # see `bird.language.Guidance`
POOLINGS = "last", "first", "mean"  # those that give a row for each text, as a teacher with its own tokenizer needs
JUDGES = ("lexicon", "bag-of-words", "classifier", "language-model", "endpoint")


@dataclass(frozen=True)
class Training:
    """Options of training.

    Args:
        epochs: passes over the data.
        batch_size: texts, or pairs of responses, in an optimizer step; CKA compares all of them.
        micro_batch: how many of them are in memory at a time, a divisor of batch_size; None for all.
        lr: the learning rate of Adam at the start; it falls to zero along a cosine.
        max_length: the most tokens of a text; None for the window, or no limit of preferences.
        preference_beta: DPO's own beta: how far from the reference the student may go.
        warmup: the share of the steps in which the learning rate rises.
        bf16: whether to train under autocast in bf16.
        adapters: rank of LoRA adapters on all linear layers; 0 trains every weight.
        max_grad_norm: gradients of a larger norm are scaled down to it; 0 never; None for TRL's 1 where students are
            tuned on preferences, and never elsewhere.
        frozen: how many blocks of a classifier's decoder, from the lowest, keep their weights, with the embeddings;
            what they make of a text is computed once. See `bird.lab.language.frozen`.
    """

    epochs: int = 1
    batch_size: int = 32
    micro_batch: int | None = None
    lr: float = 5e-5
    max_length: int | None = None
    preference_beta: float = 0.1
    warmup: float = 0.0
    bf16: bool = False
    adapters: int = 0
    max_grad_norm: float | None = None
    frozen: int = 0

    def __post_init__(self) -> None:
        require_within(self, epochs=1, batch_size=1, micro_batch=1, max_length=1)
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} must divide batch_size {self.batch_size}")
        for name in ("lr", "preference_beta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, not {getattr(self, name)}")
        if not 0 <= self.warmup < 1 or self.adapters < 0:
            raise ValueError(f"warmup must be in [0, 1) and adapters not negative, not {self.warmup}, {self.adapters}")
        require_within(self, lr=0, preference_beta=0, adapters=0, max_grad_norm=0, frozen=0)

    @property
    def about(self) -> dict[str, Any]:
        """The options as plain data, for the names of stages."""
        return settings_of(self, ("max_grad_norm", "frozen"))


@dataclass(frozen=True)
class Guiding:
    """The options of `bird.language.Guidance` that a recipe may set; the defaults are the same.

    A student that is an encoder is pooled by the mean where this says ``"last"``. A mean over the tokens of a decoder's
    middle blocks needs ``completion_only``: the state of the first token outweighs all others there.
    """

    alpha: float = 0.1
    beta: float = 0.9
    layer: str | None = None
    teacher_layer: str | None = None
    pooling: str = "last"
    teacher_pooling: str | None = None
    completion_only: bool = False
    rows: str = "both"
    loss: str = "cka"
    schedule: str = "constant"
    until: float = 1.0
    share: float | None = None
    gradients: bool = False

    def __post_init__(self) -> None:
        require_within(self, alpha=0, beta=0)
        self._loss("biased")
        require_known("rows", self.rows, ROWS)
        for name in ("pooling", "teacher_pooling"):
            if getattr(self, name) is not None:
                require_known(name, getattr(self, name), POOLINGS)
        if self.completion_only and self.rows == "prompt":
            raise ValueError('rows = "prompt" leaves no completion to pool: choose it or completion_only')
        if self.loss == "cka_difference" and self.rows != "both":
            raise ValueError('loss = "cka_difference" is of chosen and rejected responses: rows = "both"')

    def require_estimator(self, method: str) -> None:
        """Raise a ValueError unless `bird.BirdLoss` takes these options with the unbiased estimator of a method."""
        try:
            self._loss("unbiased")
        except ValueError as error:
            raise ValueError(f"the method {method!r} cannot be so: {error}; list methods without it") from error

    def _loss(self, estimator: str) -> None:
        names = ("alpha", "beta", "loss", "schedule", "until", "share")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        BirdLoss(pairs=[("teacher", "student")], estimator=estimator, **options)


@dataclass(frozen=True)
class Data:
    """The data to train and test on.

    Args:
        source: for preferences "positivity" (movie reviews), "pku-saferlhf", or a file, folder or hub id in TRL's
            format; for weak-to-strong "sentiment", "wordnet-glosses", "sciq", "boolq" or "cosmos_qa".
        limit: at most so many pairs, or rows a half; None for all.
        held_out: at most so many prompts and texts, or test rows; None for all.
        words: leave out texts with more words, and preferences of strings with such a response; None keeps all.
        ranked: how many pairs students rank that nobody was trained on; of published sets from the split "test".
        taught, judged: of "positivity", the share of sentences that train the teacher, and a judge's bag of words.
        part: the rows that score: "test", or "validation" to choose settings by, which "wordnet-glosses" has.
    """

    source: str
    limit: int | None = None
    held_out: int | None = None
    words: int | None = None
    ranked: int = 0
    taught: float = SHARE
    judged: float = SHARE
    part: str = "test"

    def __post_init__(self) -> None:
        require_within(self, limit=2, held_out=2, words=2, ranked=0, taught=(0, 1), judged=(0, 1))
        if self.source != "positivity" and (self.taught, self.judged) != (SHARE, SHARE):
            raise ValueError(f"taught and judged are shares of positivity's sentences, not of {self.source}")
        if not 0 < self.taught < 1 - self.judged:
            raise ValueError(f"taught {self.taught} and judged {self.judged} must leave sentences for all parts")
        require_known("part", self.part, ("test", "validation"))
        if self.part != "test" and self.source != "wordnet-glosses":
            raise ValueError(f"{self.source} has no validation rows, only wordnet-glosses has")

    @property
    def about(self) -> dict[str, Any]:
        """The settings that decide every stage, as far as they are not those of before they could be said."""
        later = ("ranked", "taught", "judged", "part")
        return {name: value for name, value in settings_of(self, later).items() if name in later}


@dataclass(frozen=True)
class Generation:
    """How held-out prompts are answered: see `bird.lab.language.generation.generate`."""

    max_new_tokens: int = 128
    batch_size: int = 32
    greedy: bool = False
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require_within(self, max_new_tokens=1, batch_size=1, temperature=0, top_p=(0, 1))
        if not self.temperature or not self.top_p:
            raise ValueError("temperature and top_p must be above 0; greedy = true takes the most probable token")


@dataclass(frozen=True)
class Judging:
    """A judge, never the teacher: see `bird.lab.language.judges`.

    Args:
        kind: one of `JUDGES`. A "classifier" has two classes, of which class 1 is good.
        model: a name that `bird.lab.language.models.load_network` takes; for "endpoint" the server's name of a model.
        url: of an OpenAI-compatible endpoint.
        key_variable: the environment variable that holds its key.
        max_tokens, key_header, timeout: options of an endpoint, see `bird.lab.language.endpoint.Endpoint`.
    """

    kind: str
    model: str = ""
    url: str = ""
    key_variable: str | None = None
    max_tokens: int = 8
    key_header: str = "Authorization"
    timeout: float = 60

    def __post_init__(self) -> None:
        require_known("kind", self.kind, JUDGES)
        if self.kind in ("classifier", "language-model", "endpoint") and not self.model:
            raise ValueError(f"a judge of kind {self.kind!r} needs a model")
        if self.kind == "endpoint" and not self.url:
            raise ValueError("a judge of kind 'endpoint' needs a url")
        require_within(self, max_tokens=1, timeout=0)

    @property
    def about(self) -> dict[str, Any]:
        """The settings that decide its verdicts, for the names of stages."""
        plain = settings_of(self, ("max_tokens",))
        return {name: value for name, value in plain.items() if name not in ("key_header", "timeout")}


@dataclass(frozen=True)
class Pair:
    """The networks of a teacher and a student, by names that `bird.lab.language.models.load_network` takes.

    Args:
        teacher: for preferences the backbone of a classifier; for weak-to-strong the weak model.
        student: the network that is guided.
        pooling: of the teacher's tokens, as classifier and as guide.
        lr: the student's learning rate; None for that of the transfer.
        paper: by method, the published figure in %: of good responses, or of the gap recovered.
    """

    teacher: str
    student: str
    pooling: str = "mean"
    lr: float | None = None
    paper: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_known("pooling", self.pooling, POOLINGS)
        require_within(self, lr=0)
        if self.lr == 0:
            raise ValueError("lr must be positive, not 0")
        require_percents(self, "paper")


@dataclass(frozen=True)
class Change:
    """The settings that a variant changes; None leaves one as it is."""

    methods: tuple[str, ...] | None = None
    limit: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    alpha: float | None = None
    beta: float | None = None
    layer: str | None = None
    pooling: str | None = None
    rows: str | None = None
    completion_only: bool | None = None
    loss: str | None = None
    schedule: str | None = None
    until: float | None = None
    share: float | None = None
    gradients: bool | None = None

    def __post_init__(self) -> None:
        require_within(self, limit=2, epochs=1, batch_size=1, alpha=0, beta=0)


@dataclass(frozen=True)
class LanguageRecipe:
    """One experiment; the parts are described at their classes.

    Args:
        name: what it is called on the command line.
        kind: "preference" or "weak-to-strong".
        title: the heading of tables and pictures.
        data: to train and test on.
        teacher: options of training the teacher, or the weak model.
        transfer: options of training students, and ceilings.
        networks: by name; each pair is run.
        methods: keys of `PREFERENCES` or of `WEAK_TO_STRONG`; all but the controls.
        guidance: options of the methods with BIRD.
        generation: options of generating responses (preferences).
        judges: by name (preferences); the picture shows the verdicts of the first one.
        variants: by name; "" is the recipe as it is.
        seeds: how many repetitions, with seeds ``first_seed``, ``first_seed`` + 1, ...
        first_seed: of the repetitions.
        claims: registered before the runs, by name. Measures are "ranking" and "margin" of pairs that are ranked, the
            share of good responses by a judge's name, and from weak to strong "accuracy" and "repeated", the share of
            the weak model's mistakes that a student repeats.
    """

    name: str
    kind: str
    title: str
    data: Data
    teacher: Training
    transfer: Training
    networks: Mapping[str, Pair]
    methods: tuple[str, ...] = ()
    guidance: Guiding = Guiding()
    generation: Generation = Generation()
    judges: Mapping[str, Judging] = field(default_factory=dict)
    variants: Mapping[str, Change] = field(default_factory=lambda: {"": Change()})
    seeds: int = 3
    first_seed: int = 0
    claims: Mapping[str, Claim] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_known("kind", self.kind, ("preference", "weak-to-strong"))
        known = PREFERENCES if self.kind == "preference" else WEAK_TO_STRONG
        for method in self.methods + sum(((v.methods or ()) for v in self.variants.values()), ()):
            require_known("methods", method, known)
        if not self.methods:
            object.__setattr__(self, "methods", tuple(m for m in known if not m.endswith(CONTROLS)))
        if self.kind == "preference" and not self.judges:
            raise ValueError("who judges the responses? [judges.<name>] must be there")
        require_within(self, seeds=1, first_seed=0)
        for name in ("networks", "variants"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        for pair in self.networks.values():
            for method in pair.paper:
                require_known("paper", method, known)
        weak = self.kind == "weak-to-strong"
        of_pairs = ("ranking", "margin") if self.data.ranked else ()
        require_claims(self, ("accuracy", "repeated") if weak else (*of_pairs, *self.judges))
        if weak and self.data.ranked:
            raise ValueError("data: ranked is of preferences, not of texts that are classified")
        if self.teacher.adapters or (weak and self.transfer.adapters):
            raise ValueError("adapters are for students that are tuned on preferences, not for classifiers")
        if self.teacher.frozen or (self.transfer.frozen and not weak):
            raise ValueError("frozen is for students of weak-to-strong")
        for name, change in self.variants.items():
            try:
                guiding = self.changed(self.guidance, change)
                for method in change.methods or self.methods:
                    if method.endswith("unbiased"):
                        guiding.require_estimator(method)
                self.changed(self.transfer, change)
            except ValueError as error:
                raise ValueError(f"variants.{name}: {error}") from error
            if weak and (guiding.completion_only or guiding.rows != "both"):
                raise ValueError("rows and completion_only are of preferences, not of texts that are classified")
            if self.kind == "weak-to-strong" and guiding.loss == "cka_difference":
                raise ValueError('loss = "cka_difference" is of preferences, not of texts that are classified')

    def changed(self, part: RecipePart, change: Change) -> RecipePart:
        """A part of the recipe with the settings that a variant changes."""
        own = {f.name: getattr(change, f.name, None) for f in fields(part)}
        return replace(part, **{name: value for name, value in own.items() if value is not None})

    @property
    def titles(self) -> Mapping[str, str]:
        """The names of methods in tables."""
        return PREFERENCES if self.kind == "preference" else WEAK_TO_STRONG


def parse(name: str, data: Mapping[str, Any]) -> LanguageRecipe:
    """The recipe in a file's table.

    Raises:
        ValueError: a key is unknown, missing or has a wrong value; the error names it and what is known.
    """
    table = dict(data) | {"name": name}
    parts = {"data": Data, "teacher": Training, "transfer": Training, "guidance": Guiding, "generation": Generation}
    missing = [part for part in ("data", "teacher", "transfer", "title", "networks") if part not in table]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be there")
    for part, kind in parts.items():
        if part in table:
            table[part] = made(part, kind, table[part])
    for part, each in (("networks", Pair), ("judges", Judging), ("variants", Change)):
        if part in table:
            for key in require_table(part, table[part]):
                if key or part != "variants":
                    require_name(f"the {part} of a recipe:", key)
            table[part] = {key: made(f"{part}.{key}", each, value) for key, value in table[part].items()}
    return made("the recipe", LanguageRecipe, table)
