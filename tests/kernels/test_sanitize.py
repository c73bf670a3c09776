"""What compute-sanitizer looks at on a GPU (test_cuda.py) computes what it should; here in plain PyTorch."""

from __future__ import annotations

import torch

from bird_kernels import plan
from tests.accuracy import errors, evaluate, truth
from tests.kernels import sanitize


def test_the_checked_problems(device: torch.device) -> None:
    seen = set()
    for call in sanitize.calls("library", device):
        found = evaluate(call.function, call.x, call.y)
        true = truth(call.x, call.y, call.estimator, mask=call.mask, kernel=call.kernel)
        true = true._replace(**{name: call.pairs * value for name, value in true._asdict().items()})
        allowed = 1e-2 if call.x.dtype == torch.bfloat16 else 1e-5
        assert max(errors(found, true).values()) < allowed, call
        seen.add((len(call.x) > plan.FEW_ROWS, call.kernel is not None, call.pairs, call.x.dtype, call.estimator))
    single = {(False, False, 1, dtype, e) for dtype in (torch.float32, torch.bfloat16) for e in ("biased", "unbiased")}
    others = {(False, rbf, 2 - rbf, torch.float32, e) for rbf in (False, True) for e in ("biased", "unbiased")}
    assert seen == single | others | {(True, False, 1, torch.float32, "unbiased")}


def test_the_native_part_is_asked_what_it_takes(device: torch.device) -> None:
    calls = list(sanitize.calls("native", device))
    assert {len(call.x) for call in calls} == {5, 37, 130}
    assert {call.kernel for call in calls} == {None}
