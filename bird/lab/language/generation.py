"""Responses of a causal language model that do not depend on their batch, and its perplexity.

    responses = generate(model, tokenizer, prompts, max_new_tokens=64, path=Path("responses.jsonl"))

Each prompt has its own random numbers, so that a response depends on model, prompt and seed only. transformers'
``generate`` is not used: a model's default settings (penalties, top-k) have no effect, and the tokenizer's padding
settings are neither used nor changed.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from ...features import evaluating, unwrap
from ..stages import Lines, require_same
from .data import Prompt, padded, token_ids
from .weights import fingerprint

__all__ = ["generate", "perplexity", "sample"]


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    greedy: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    path: Path | None = None,
    progress: bool | None = None,
) -> list[str]:
    """One response for each prompt: the model's continuation, without special tokens and the end token.

    Args:
        model: a causal LM of transformers, on any device; its modules' modes are restored.
        tokenizer: its tokenizer, which is not changed.
        prompts: strings, which are continued, or conversations, to which the chat template is applied.
        max_new_tokens: where a response is cut that does not end: at the model's or the tokenizer's end of text.
        batch_size: prompts at a time; changes speed and memory, and logits by rounding only.
        greedy: take the most probable token; temperature, top_p and seed then do nothing.
        temperature: what logits are divided by.
        top_p: draw from the most probable tokens that together have this probability (Holtzman et al., ICLR 2020).
        seed: with the prompt's tokens it decides the draws: the same prompt has the same response wherever it stands,
            and another one with another seed.
        path: keep each finished batch here, as JSON lines, and go on from what is there; None to keep nothing.
        progress: a bar; None to show it on a terminal only.

    Raises:
        ValueError: an option out of range; a prompt without tokens, or longer than the model's positions allow;
            ``path`` holds responses to other prompts, of another model or with other settings, or something else.
        FloatingPointError: the model's logits are NaN.
    """
    if min(max_new_tokens, batch_size) < 1:
        raise ValueError(f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}")
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature must be above 0, got {temperature}; for the most probable token pass greedy=True"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    rows = [token_ids(tokenizer, prompt) for prompt in prompts]
    for i, row in enumerate(rows):
        _check_length(model, f"prompt {i}", len(row), max_new_tokens)
    keys = [hashlib.sha256(json.dumps(row).encode()).hexdigest() for row in rows]
    about: dict[str, Any] = {"max_new_tokens": max_new_tokens, "greedy": greedy}
    if not greedy:
        about |= {"temperature": temperature, "top_p": top_p, "seed": seed}
    done, lines = _kept(path, about, keys, model) if path is not None else ({}, None)
    todo = [i for i in range(len(prompts)) if i not in done]
    ends = _ends(model, tokenizer)
    bar = tqdm(
        total=len(prompts), initial=len(done), unit="response", disable=None if progress is None else not progress
    )
    with bar, evaluating(model) as device:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            draws = None if greedy else torch.stack([_draws(seed, keys[i], max_new_tokens) for i in batch]).to(device)
            tokens = _continue(
                [rows[i] for i in batch], model, draws, max_new_tokens, ends, temperature=temperature, top_p=top_p
            )
            new = {
                i: tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                for i, row in zip(batch, tokens, strict=True)
            }
            done |= new
            if lines is not None:
                lines.append(*({"index": i, "prompt": keys[i], "response": text} for i, text in new.items()))
            bar.update(len(batch))
    return [done[i] for i in range(len(prompts))]


def sample(logits: Tensor, draws: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Tokens ``[n]`` drawn from softmax(logits / temperature), cut to its nucleus, by inverting its sum in fp64.

    Args:
        logits: ``[n, vocabulary]``.
        draws: uniform in [0, 1), ``[n]``, fp64.
        temperature: above 0.
        top_p: the nucleus is the smallest set of most probable tokens with at least this probability.
    """
    p = (logits.double() / temperature).softmax(dim=-1)
    if top_p < 1:
        falling, order = p.sort(dim=-1, descending=True, stable=True)
        outside = falling.cumsum(dim=-1) - falling >= top_p  # those before it are enough
        p = p.masked_fill(outside.gather(-1, order.argsort(dim=-1)), 0)
    mass = p.cumsum(dim=-1)
    # From (0, total]: no token of probability 0 is ever the first to reach it.
    reach = (1 - draws)[:, None] * mass[:, -1:]
    return torch.searchsorted(mass, reach).squeeze(1)


def perplexity(model: nn.Module, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 8) -> float:
    """exp of the mean negative log likelihood of a token given those before it, over all tokens of all texts.

    A text's first token is not predicted and is left out; if the tokenizer starts texts with a special token, that is
    the first. Special tokens that the tokenizer adds at the end are included.

    Args:
        model: a causal LM of transformers, on any device; its modules' modes are restored.
        tokenizer: its tokenizer, which is not changed.
        texts: never truncated.
        batch_size: texts at a time.

    Raises:
        ValueError: no text has two tokens, or one is longer than the model's positions allow.
    """
    rows = [list(tokenizer(text)["input_ids"]) for text in texts]
    for i, row in enumerate(rows):
        _check_length(model, f"text {i}", len(row), 0)
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ValueError("perplexity needs a text of at least two tokens")
    total = 0.0
    with evaluating(model) as device:
        for start in range(0, len(rows), batch_size):
            ids, mask = (part.to(device) for part in padded(rows[start : start + batch_size], left=False))
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            losses = functional.cross_entropy(logits[:, :-1].float().mT, ids[:, 1:], reduction="none")
            total += losses.double()[mask[:, 1:].bool()].sum().item()
    return math.exp(total / sum(len(row) - 1 for row in rows))


def _continue(
    rows: Sequence[Sequence[int]],
    model: nn.Module,
    draws: Tensor | None,
    limit: int,
    ends: set[int],
    *,
    temperature: float,
    top_p: float,
) -> Iterator[list[int]]:
    """The tokens that follow each row, up to its end, which is left out; ``draws`` None for the most probable ones."""
    device = next(model.parameters()).device
    ids, mask = (part.to(device) for part in padded(rows, left=True))
    stops = torch.tensor(sorted(ends), dtype=torch.int64, device=device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    takes = _takes(model)
    memory = "cache" if "cache" in takes else "past_key_values"  # its name in transformers from 5.24 on, and before
    tokens: list[Tensor] = []
    past, over = None, torch.zeros(len(rows), dtype=torch.bool, device=device)
    for step in range(limit):
        options: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        options = {name: value for name, value in options.items() if name in takes}
        output = model(input_ids=ids, attention_mask=mask, use_cache=True, **options, **{memory: past})
        logits = output.logits[:, -1]
        if logits.isnan().any():
            raise FloatingPointError("the model's logits are NaN: its weights are broken, or its precision overflows")
        chosen = logits.argmax(dim=-1) if draws is None else sample(logits, draws[:, step], temperature, top_p)
        tokens.append(chosen)
        over |= torch.isin(chosen, stops)
        if over.all():
            break
        past = getattr(output, memory)
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    for row in torch.stack(tokens, dim=1).tolist():
        yield row[: next((i for i, token in enumerate(row) if token in ends), limit)]


def _takes(model: nn.Module) -> set[str]:
    """The arguments of a model's forward; of an adapter's, which hands on what it is given, the model's inside."""
    network: Any = unwrap(model)
    if hasattr(network, "get_base_model"):  # of peft
        network = network.get_base_model()
    return set(inspect.signature(network.forward).parameters)


def _ends(model: nn.Module, tokenizer: Any) -> set[int]:
    """The ids of all end tokens: chat models also list some in their generation config only."""
    known = getattr(getattr(unwrap(model), "generation_config", None), "eos_token_id", None)
    several = [*known] if isinstance(known, (list, tuple)) else [known]
    return {int(end) for end in [*several, tokenizer.eos_token_id] if end is not None}


def _draws(seed: int, key: str, count: int) -> Tensor:
    """The prompt's uniform random numbers, fp64 ``[count]``, equal on all devices."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(count, dtype=torch.float64, generator=generator)


def _check_length(model: nn.Module, what: str, length: int, new: int) -> None:
    most = getattr(getattr(unwrap(model), "config", None), "max_position_embeddings", None)
    if most is not None and length + new > most:
        grown = f" with {new} new ones" if new else ""
        raise ValueError(f"{what} has {length} tokens{grown}, and the model has {most} positions: shorten it")


def _kept(path: Path, about: dict[str, Any], keys: Sequence[str], model: nn.Module) -> tuple[dict[int, str], Lines]:
    """The responses that the file holds, by prompt, and the file to add to."""
    about = about | {
        "prompts": len(keys),
        "of prompts": hashlib.sha256("".join(keys).encode()).hexdigest(),
        "of weights": fingerprint(model),
    }
    lines = Lines(path)
    if not lines.rows:
        lines.append({"responses": about})
        return {}, lines
    first, *rows = lines.rows
    old = first.get("responses")
    if not isinstance(old, dict):
        raise ValueError(f"{path} does not hold responses: choose another path")
    require_same(old, about, f"{path} holds other responses", "delete it, or choose another path")
    done = {}
    for row in rows:
        index = row.get("index")
        if not isinstance(index, int) or not 0 <= index < len(keys) or row.get("prompt") != keys[index]:
            raise ValueError(f"{path} is damaged: it answers a prompt that there is not; delete it to start over")
        done[index] = row["response"]
    return done, lines
