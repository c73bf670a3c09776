"""What a call will take, before it is made: the floor, the work and the memory of each provider. Pure arithmetic.

Memory counts matrices that are alive together, as PyTorch's allocator was seen to hold them; it decides whether a call
is made at all, so it is meant to be right within a third, not exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.kernels.problems import Case
from benchmarks.kernels.providers import OURS, better_form
from bird_kernels import plan
from bird_kernels.types import Route

GIB = 2**30


class Ceilings(NamedTuple):
    """What a device was seen to reach: bytes/s of copies by the bytes they move, flop/s of products by number."""

    copies: dict[int, float]
    products: dict[str, float]  # by "dtype precision", as in `number`

    def rate(self, case: Case, provider: str = "") -> float:
        """The flop/s open to a case, whatever way it takes; the float64 copy pays float64's."""
        if provider == "fp64":
            return self.products["float64"]
        exact = self.products["float32 ieee"]
        if case.precision == "tf32x3":
            return max(self.products["float32 tf32"] / 3, exact)
        return max(self.products[number(case)], exact)  # a CPU without units for halves does better in fp32

    def copy(self, moved: int) -> float:
        """Bytes/s open to a case that moves so many: those of a copy no smaller, whose data lie in the same cache."""
        return self.copies[min((size for size in self.copies if size >= moved), default=max(self.copies))]


def number(case: Case) -> str:
    """What the rate of products depends on: the dtype and, for fp32, the precision."""
    return f"{case.dtype} {case.precision}".strip()


def floor(case: Case, ceilings: Ceilings, device: torch.device) -> float:
    """Seconds below which no call can be: the cheaper route's products, or the bytes that must move."""
    flops = plan.route_flops(_route(case), case.n, case.p, case.q, case.backward, False)
    moved = traffic(case, device)
    return max(flops / ceilings.rate(case), moved / ceilings.copy(moved))


def traffic(case: Case, device: torch.device) -> int:
    """Bytes that the cheaper route must move."""
    return plan.minimum_bytes(case.spec(device), _route(case))


def _route(case: Case) -> Route:
    return "gram" if case.problem == "rbf" else plan.choose_route(case.n, case.p, case.q)


def _form(provider: str, case: Case) -> str:
    if provider in OURS:
        return "ours"
    if provider == "compiled":
        return better_form(case).__name__
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


def memory(provider: str, case: Case) -> int:
    """Bytes of one call beyond its inputs, gradient included."""
    n, p, q = case.n, case.p, case.q
    size = case.torch_dtype.itemsize
    wide = 8 if provider == "fp64" else 4
    form = _form(provider, case)
    gradient = n * p * size * case.backward
    copies = n * (p + q) * (wide + (size if size < wide else 0))  # centred, and rounded again
    if form == "naive":
        matrices = 19 if case.problem == "rbf" else 11
        return n * n * size * (matrices if case.backward else 5) + gradient
    if form == "gram":
        matrices = 9 if case.problem == "rbf" else 4
        return n * n * 4 * (matrices if case.backward else 3) + copies + gradient
    if form == "feature":
        return (p * p + q * q + p * q) * wide * (2 if case.backward else 1) + copies + gradient
    route = _route(case)
    square = 2 * n * n if route == "gram" else p * p + q * q + p * q
    return square * 8 + copies + gradient


def needed(provider: str, case: Case) -> int:
    """Bytes that the device must hold for a measurement: inputs, a call, and gradients in float64 to judge it by."""
    n, p, q = case.n, case.p, case.q
    return n * (p + q) * case.torch_dtype.itemsize + 24 * n * p * case.backward + memory(provider, case)


def why_not_run(provider: str, case: Case, ceilings: Ceilings, available: int, patience: float) -> str | None:
    """The reason not even to try: more bytes than are ``available``, more seconds than ``patience``; or None.

    There is no end to the patience with ours and with the better of the hand-written forms: they are the question.
    """
    wanted = needed(provider, case)
    if wanted > available:
        return f"out of memory (needs {wanted / GIB:.1f} GiB)"
    seconds = flops(provider, case) / ceilings.rate(case, provider)
    if seconds > patience and provider not in OURS | {better_form(case).__name__}:
        return f"too slow (at least {seconds:.0f} s a call)"
    return None
