"""Responses of a causal language model that do not depend on their batch, and its perplexity.

    responses = generate(model, tokenizer, prompts, max_new_tokens=64, path=Path("responses.jsonl"))

Each prompt has its own random numbers, so that a response depends on model, prompt and seed only. transformers'
``generate`` is not used: it takes every option that is left open from the model's generation config, which may hold
penalties and suppressed tokens, and it draws for a whole batch from one generator. The tokenizer's padding settings are
neither used nor changed.
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
from ...language.guidance import without_adapters
from ..stages import Lines
from .data import Prompt, padded_batch, token_ids


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
        max_new_tokens: the most tokens of a response, which ends before at the model's or the tokenizer's end of text.
        batch_size: prompts at a time; changes speed and memory, and logits by rounding only.
        greedy: take the most probable token; temperature, top_p and seed then do nothing.
        temperature: what logits are divided by.
        top_p: draw from the most probable tokens that together have this probability (Holtzman et al., ICLR 2020).
        seed: with the prompt's tokens it decides the draws: the same prompt has the same response wherever it stands,
            and another one with another seed.
        path: keep each finished batch here, as JSON lines, and go on from what is there; None to keep nothing. The
            file says which prompts it answers. Its folder must be named after all else that decides the responses, as
            a stage's is: the weights and the options.
        progress: whether to show a bar; None: on a terminal only.

    Raises:
        ValueError: a prompt without tokens, or longer than the model's positions allow; ``path`` holds responses to
            other prompts, or something else.
        FloatingPointError: the model's logits are NaN.
    """
    rows = [token_ids(tokenizer, prompt) for prompt in prompts]
    require_room(unwrap(model), "prompt", rows, max_new_tokens)
    keys = [hashlib.sha256(json.dumps(row).encode()).hexdigest() for row in rows]
    lines = None if path is None else Lines(path)
    done = {} if lines is None else _kept(lines, keys)
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
    require_room(unwrap(model), "text", rows)
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ValueError("perplexity needs a text of at least two tokens")
    total = 0.0
    with evaluating(model) as device:
        for start in range(0, len(rows), batch_size):
            ids, mask = padded_batch(rows[start : start + batch_size], device=device).values()
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            losses = functional.cross_entropy(logits[:, :-1].float().mT, ids[:, 1:], reduction="none")
            total += losses.double()[mask[:, 1:].bool()].sum().item()
    return math.exp(total / sum(len(row) - 1 for row in rows))


def require_room(config: Any, what: str, rows: Sequence[Sequence[int]], new: int = 0) -> None:
    """Raise a ValueError unless a network has positions for each row of token ids and so many new tokens.

    Args:
        config: the network's configuration, or the network.
        what: a row is called, for the error.
        rows: of token ids.
        new: how many tokens may follow each.
    """
    most = getattr(getattr(config, "config", config), "max_position_embeddings", None) or math.inf
    longest = max(range(len(rows)), key=lambda i: len(rows[i]), default=None)
    if longest is None or len(rows[longest]) + new <= most:
        return
    count = len(rows[longest])
    grown = f" with {new} new ones" if new else ""
    fits = f", or let at most {most - count} be generated (max_new_tokens)" if new and count < most else ""
    raise ValueError(
        f"{what} {longest} has {count} tokens{grown}, and the model has {most} positions: shorten it{fits}"
    )


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
    """Yield the tokens that follow each row, without the end token; the most probable ones if ``draws`` is None."""
    device = next(model.parameters()).device
    ids, mask = padded_batch(rows, left=True, device=device).values()
    stops = torch.tensor(sorted(ends), dtype=torch.int64, device=device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    takes = set(inspect.signature(without_adapters(model).forward).parameters)
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


def _ends(model: nn.Module, tokenizer: Any) -> set[int]:
    """The ids of all end tokens; chat models list some of them in their generation config only."""
    known = getattr(getattr(unwrap(model), "generation_config", None), "eos_token_id", None)
    several = [*known] if isinstance(known, (list, tuple)) else [known]
    return {int(end) for end in [*several, tokenizer.eos_token_id] if end is not None}


def _draws(seed: int, key: str, count: int) -> Tensor:
    """The prompt's uniform random numbers, fp64 ``[count]``, equal on all devices."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(count, dtype=torch.float64, generator=generator)


def _kept(lines: Lines, keys: Sequence[str]) -> dict[int, str]:
    """The responses that a file holds, by the number of their prompt."""
    done = {}
    for row in lines.rows:
        if "responses" in row:  # the first line of files of before, which repeated what the stage's name says
            continue
        index = row.get("index")
        if not isinstance(index, int) or not 0 <= index < len(keys) or row.get("prompt") != keys[index]:
            raise ValueError(f"{lines.path} is damaged, or answers other prompts: delete it to start over")
        done[index] = row["response"]
    return done
