"""What a call will take, before it is made: the floor, and the work of each provider. Pure arithmetic."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.kernels.problems import Case
from benchmarks.kernels.providers import OURS, better_form
from bird_kernels import plan
from bird_kernels.types import Route


class Ceilings(NamedTuple):
    """What a device was seen to reach: bytes/s of copies by the bytes they move, flop/s of products by number."""

    copies: dict[int, float]
    products: dict[str, float]  # by "dtype precision", as in `number`

    def rate(self, case: Case, provider: str = "") -> float:
        """The flop/s open to a case, whatever way it takes; the float64 copy pays float64's."""
        if provider == "fp64":
            return self.products["float64"]
        exact = self.products["float32 ieee"]
        return max(self.products[number(case)], exact)  # a CPU without units for halves does better in fp32

    def copy(self, moved: int) -> float:
        """Bytes/s open to a case that moves so many: those of a copy no smaller, whose data lie in the same cache."""
        return self.copies[min((size for size in self.copies if size >= moved), default=max(self.copies))]


def number(case: Case) -> str:
    """What the rate of products depends on: the dtype and, for fp32, the precision."""
    return f"{case.dtype} {case.precision}".strip()


def floor(case: Case, ceilings: Ceilings) -> float:
    """Seconds below which no call can be: the cheaper route's products, or the bytes that must move."""
    flops = plan.route_flops(_route(case), case.n, case.p, case.q, case.backward, False)
    moved = traffic(case)
    return max(flops / ceilings.rate(case), moved / ceilings.copy(moved))


def traffic(case: Case) -> int:
    """Bytes that the cheaper route must move."""
    return plan.minimum_bytes(case.spec(torch.device("cpu")), _route(case))


def _route(case: Case) -> Route:
    return "gram" if case.problem == "rbf" else plan.choose_route(case.n, case.p, case.q)


def _form(provider: str, case: Case) -> str:
    if provider in OURS:
        return "ours"
    if provider == "compiled":
        return better_form(case)
    return {"fp64": "feature", "pytorch-cka": "gram"}.get(provider, provider)


def flops(provider: str, case: Case) -> float:
    """Operations of the products of one call, as library calls that know of no symmetry do them."""
    n, p, q = case.n, case.p, case.q
    form = _form(provider, case)
    if form == "ours":
        return plan.route_flops(_route(case), n, p, q, case.backward, False)
    forward, backward = {
        "naive": (24 * n**3 + 6 * n * n * (p + q), 12 * n**3 + 12 * n * n * p),
        "gram": (2 * n * n * (p + q), 4 * n * n * p),
        "feature": (2 * n * (p * p + q * q + p * q), 2 * n * (p * q + 2 * p * p)),
    }[form]
    return forward + backward * case.backward


def too_slow(provider: str, case: Case, ceilings: Ceilings, patience: float) -> str | None:
    """The reason not even to try: a call takes more seconds than ``patience``; or None.

    There is no end to the patience with ours and with the better of the hand-written forms: they are the question.
    """
    seconds = flops(provider, case) / ceilings.rate(case, provider)
    if seconds > patience and provider not in OURS | {better_form(case)}:
        return f"too slow (at least {seconds:.0f} s a call)"
    return None
