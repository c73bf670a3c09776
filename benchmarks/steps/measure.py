"""How much of a training step guidance costs, on the paper's networks: the teacher's forward, and the loss.

    python -m benchmarks.steps.measure --save

A student on random 32 x 32 images in colour, guided by a teacher of the same network at the paper's layers and batch;
medians over steps timed one by one (`step_times`). A row per network and guidance, beside those of other devices.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import rows
from bird import BirdLoss, Taps, Teacher
from bird.lab.vision.checkpoints import Settings
from bird.lab.vision.data import Images
from bird.lab.vision.models import MODELS, build
from bird.lab.vision.profiling import StepTimes, step_times
from bird.lab.vision.steps import Guide

RESULTS = Path(__file__).with_name("results.csv")
GUIDANCE = {"linear": {}, "linear, unbiased": {"estimator": "unbiased"}, "RBF": {"kernel": "rbf"}}


@dataclass(frozen=True, kw_only=True)
class Row(rows.Origin):
    """Seconds of a step, of its teacher's forward, and of the ``guidance``'s loss, which old rows do not name."""

    network: str
    loss: float
    batch: int
    step: float
    teacher: float
    guidance: str = ""


def measure(network: str, guidance: str, batch: int, device: torch.device, repeats: int) -> StepTimes:
    """One row's times."""
    torch.manual_seed(0)
    student, layer = build(network, 10), MODELS[network].guide
    pixels = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
    guide = Guide(
        Teacher(build(network, 10), [layer]),
        Taps(student, [layer]),
        BirdLoss(pairs=[(layer, layer)], **GUIDANCE[guidance]),
    )
    images = Images(pixels, torch.arange(batch) % 10)
    return step_times(student, images, Settings(1, batch_size=batch), guide, device=device, repeats=repeats)


def main() -> None:
    parser = rows.parser(__doc__)
    parser.add_argument("--network", nargs="+", default=["resnet18", "mobilenetv2"], choices=list(MODELS))
    parser.add_argument("--batch", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="steps that are timed (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="(default: cpu)")
    options = parser.parse_args()
    about = rows.origin(options.device) | {"batch": options.batch}
    found = []
    for network in options.network:
        for guidance in GUIDANCE:
            times = measure(network, guidance, options.batch, options.device, options.repeats)
            found.append(Row(**about, network=network, guidance=guidance, **asdict(times)))
    others = rows.read(RESULTS, Row) if RESULTS.exists() else []
    kept = [row for row in others if row.device != about["device"]]
    rows.finish(RESULTS, [*kept, *found], rows.page(found), options.save)


if __name__ == "__main__":
    main()
