"""How much of a training step guidance costs, on the paper's networks: the teacher's forward, and the loss.

    python -m benchmarks.steps.measure --save

A student on random 32 x 32 images in colour, guided by a teacher of the same network at the paper's layers and batch;
medians over steps timed one by one (`bird.profiling.step_times`). A row per network and loss, appended to results.csv.
"""

from __future__ import annotations

import argparse
import csv
import io
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.kernels.results import origin, write_text
from bird import BirdLoss, Taps, Teacher
from bird.lab.vision.checkpoints import Settings
from bird.lab.vision.data import Images
from bird.lab.vision.models import MODELS, build
from bird.lab.vision.profiling import StepTimes, step_times
from bird.lab.vision.steps import Guide

RESULTS = Path(__file__).with_name("results.csv")
LOSSES = {"linear": {}, "linear, unbiased": {"estimator": "unbiased"}, "RBF": {"kernel": "rbf"}}


def measure(network: str, loss: str, batch: int, device: torch.device, repeats: int) -> StepTimes:
    """One row's times."""
    torch.manual_seed(0)
    student, layer = build(network, 10), MODELS[network].guide
    pixels = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
    guide = Guide(
        Teacher(build(network, 10), [layer]),
        Taps(student, [layer]),
        BirdLoss(pairs=[(layer, layer)], **LOSSES[loss]),
    )
    images = Images(pixels, torch.arange(batch) % 10)
    return step_times(student, images, Settings(1, batch_size=batch), guide, device=device, repeats=repeats)


def save(rows: list[dict[str, object]]) -> None:
    """Beside those of other devices."""
    kept: list[dict[str, object]] = []
    if RESULTS.exists():
        with RESULTS.open(newline="", encoding="utf-8") as file:
            kept = [row for row in csv.DictReader(file) if row["device"] != rows[0]["device"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([*kept, *rows])
    write_text(RESULTS, text.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["resnet18", "mobilenetv2"], choices=list(MODELS))
    parser.add_argument("--batch", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="steps that are timed (default: %(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="(default: cpu)")
    parser.add_argument("--save", action="store_true", help=f"keep the rows in {RESULTS.name}")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for network in options.network:
        for loss in LOSSES:
            times = measure(network, loss, options.batch, options.device, options.repeats)
            about = asdict(origin(options.device)) | {"network": network, "loss": loss, "batch": options.batch}
            rows.append(about | {name: f"{seconds:.4g}" for name, seconds in asdict(times).items()})
            shares = ", ".join(f"{name} {getattr(times, name) / times.step:.1%}" for name in ("teacher", "loss"))
            print(f"{network}, {loss}, {options.batch} images: {1e3 * times.step:.0f} ms a step; {shares}", flush=True)
    if options.save:
        save(rows)


if __name__ == "__main__":
    main()
