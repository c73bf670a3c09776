"""Where a step of a small network spends its time on one core, and whether another arrangement would be faster.

    python -m benchmarks.training.measure --save

resnet-tiny (47,000 parameters) guided by mobilenetv2-tiny, 64 random images of 3 x 32 x 32. Parts are timed in turns,
and so are arrangements of the same work, forward and backward of four students with other weights: the laboratory's
(one after another, channels last), contiguous, compiled, as one `torch.func.vmap`, and as one network of grouped
convolutions. Before that the gradients of all four are held to the same networks in float64. Times are of one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from benchmarks import harness, rows
from benchmarks.harness import Contestant, Evaluated, gate_of
from benchmarks.machine import Machine
from bird import BirdLoss, Taps, Teacher
from bird.lab.vision.augment import CropFlip
from bird.lab.vision.data import to_float
from bird.lab.vision.models import MODELS, build

BATCH, CLASSES, STUDENTS = 64, 5, 4
RESULTS = Path(__file__).with_name("results.csv")
# Of a gradient, relative to its norm. An activation that is 0 to rounding has a gradient in one arithmetic and none in
# another: 6e-3 for one compiled student of the four, 2e-6 for all else that is here.
TOLERANCE = 2e-2
OURS = "one after another"


def students(dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    """Of the same weights at every call."""
    torch.manual_seed(0)
    return [build("resnet-tiny", CLASSES).to(dtype, memory_format=torch.channels_last) for _ in range(STUDENTS)]


def batch() -> tuple[Tensor, Tensor]:
    """Images as bytes, and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (BATCH, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return images, torch.arange(BATCH) % CLASSES


def pixels() -> Tensor:
    return to_float(batch()[0]).contiguous(memory_format=torch.channels_last)


def gradients(networks: list[nn.Module], x: Tensor, call: Callable[[nn.Module, Tensor], Tensor]) -> Evaluated:
    """One network after another: the sum of their losses, and the gradient of each as a vector."""
    losses, found = [], []
    for network in networks:
        network.zero_grad()
        loss = F.cross_entropy(call(network, x), batch()[1])
        loss.backward()
        losses.append(loss.detach())
        found.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    return Evaluated(torch.stack(losses).sum(), found)


def vmapped() -> Callable[[], Evaluated]:
    """All four as one call of `torch.func.vmap`; the running statistics of batch normalisation move along."""
    networks, x, labels = students(), pixels(), batch()[1]
    weights, buffers = stack_module_state(networks)
    weights = {name: weight.detach() for name, weight in weights.items()}  # no graph around the inner one

    def loss(own: Any, statistics: Any) -> tuple[Tensor, Tensor]:
        value = F.cross_entropy(functional_call(networks[0], (own, statistics), (x,)), labels)
        return value, value

    def step() -> Evaluated:
        found, losses = vmap(grad(loss, has_aux=True))(weights, buffers)
        return Evaluated(losses.sum(), [torch.cat([g[i].flatten() for g in found.values()]) for i in range(STUDENTS)])

    return step


class Grouped(nn.Module):
    """Four students as one network of four times the channels, whose convolutions have a group for each."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.normalise = networks[0].normalise
        self.body = students()[0]
        self.body.normalise = nn.Identity()
        self.body.head = nn.Identity()
        self.head = nn.Parameter(torch.stack([network.head.weight for network in networks]).detach())
        self.bias = nn.Parameter(torch.stack([network.head.bias for network in networks]).detach())
        for name, module in list(self.body.named_modules()):
            four = [
                network.get_submodule(name) for network in networks if isinstance(module, nn.Conv2d | nn.BatchNorm2d)
            ]
            if isinstance(module, nn.Conv2d):
                wide = nn.Conv2d(
                    STUDENTS * module.in_channels, STUDENTS * module.out_channels, module.kernel_size, module.stride,
                    module.padding, groups=STUDENTS, bias=False,
                )  # fmt: skip
            elif isinstance(module, nn.BatchNorm2d):
                wide = nn.BatchNorm2d(STUDENTS * module.num_features)
                wide.bias.data = torch.cat([one.bias.detach() for one in four])
            else:
                continue
            wide.weight.data = torch.cat([one.weight.detach() for one in four])
            self.body.set_submodule(name, wide.to(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[STUDENTS, n, classes]``."""
        features = self.body(self.normalise(x).repeat(1, STUDENTS, 1, 1)).unflatten(1, (STUDENTS, -1))
        return torch.einsum("nsf,scf->snc", features, self.head) + self.bias[:, None]


def grouped() -> Callable[[], Evaluated]:
    """All four as one network."""
    network, x, labels = Grouped(students()), pixels(), batch()[1]

    def step() -> Evaluated:
        network.zero_grad()
        loss = sum(F.cross_entropy(logits, labels) for logits in network(x))
        loss.backward()
        *inner, head, bias = (*network.body.parameters(), network.head, network.bias)
        parts = [
            torch.cat([p.grad.chunk(STUDENTS)[i].flatten() for p in (*inner, head, bias)]) for i in range(STUDENTS)
        ]
        return Evaluated(loss.detach(), parts)

    return step


def arrangements(names: list[str] | None = None) -> dict[str, Contestant]:
    """By name; the first is the laboratory's."""
    plain = {"call": lambda network, x: network(x)}
    calls = {
        OURS: lambda: _one_by_one(students(), pixels(), **plain),
        "contiguous": lambda: _one_by_one([s.to(memory_format=torch.contiguous_format) for s in students()],
                                          pixels().contiguous(), **plain),
        "compiled": lambda: _compiled(),
        "vmap": vmapped,
        "grouped convolutions": grouped,
    }  # fmt: skip
    return {
        name: Contestant(name, make(), captured=False, compiles=name == "compiled")
        for name, make in calls.items()
        if names is None or name in names
    }


def _one_by_one(networks: list[nn.Module], x: Tensor, call: Any) -> Callable[[], Evaluated]:
    return lambda: gradients(networks, x, call)


def _compiled() -> Callable[[], Evaluated]:
    networks, x = students(), pixels()
    compiled = {network: torch.compile(network) for network in networks}
    return lambda: gradients(networks, x, lambda network, x: compiled[network](x))


def truth() -> Evaluated:
    """In float64, of what the laboratory calls."""
    return gradients(students(torch.float64), pixels().double(), lambda network, x: network(x))


def time_arrangements(names: list[str] | None = None, *, repeats: int) -> list[harness.Entry]:
    """Every arrangement past the gate, and timed in turns."""
    candidates = arrangements(names).values()
    gate = gate_of(truth, TOLERANCE, TOLERANCE)
    return list(harness.compete(Machine(torch.device("cpu")), candidates, gate, ["wall"], lambda *_: repeats))


def parts_of_a_step() -> dict[str, Callable[[], Any]]:
    """What a step of BIRD consists of, each from what the one before leaves."""
    student, (images, labels), x = students()[0], batch(), pixels()
    teacher = Teacher(
        build("mobilenetv2-tiny", CLASSES).to(memory_format=torch.channels_last), [MODELS["mobilenetv2-tiny"].guide]
    )
    taps, guided = Taps(student, ["layer3"]), teacher(x)
    criterion = BirdLoss(pairs=[(MODELS["mobilenetv2-tiny"].guide, "layer3")])
    augment, index = CropFlip(seed=0), torch.arange(BATCH)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
    logits = student(x)
    features = {name: rows.detach().requires_grad_() for name, rows in taps.pop().items()}

    def forward_backward() -> None:
        F.cross_entropy(student(x), labels).backward()
        taps.pop()

    def loss() -> None:
        task = torch.zeros((), requires_grad=True)
        criterion(task, guided, features).backward()

    forward_backward()
    return {
        "images as floats": lambda: to_float(images),
        "crop and flip": lambda: augment(x, index, 0),
        "forward": lambda: (student(x), taps.pop()),
        "forward and backward": forward_backward,
        "cross-entropy": lambda: F.cross_entropy(logits, labels),
        "teacher's forward": lambda: teacher(x),
        "BIRD's loss, forward and backward": loss,
        "optimizer": optimizer.step,
    }


def main() -> None:
    parser = rows.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="of each time (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine, about = Machine(torch.device("cpu")), rows.origin_of(torch.device("cpu"))
    takes = {name: machine.take("wall", call) for name, call in parts_of_a_step().items()}
    seconds = harness.in_turns(takes, dict.fromkeys(takes, 5 * options.repeats))
    figures = [("part of a step, ms", name, 1000 * median(values), "") for name, values in seconds.items()]
    entries = time_arrangements(repeats=options.repeats)
    ours = next(entry for entry in entries if entry.name == OURS)
    if ours.status != "ok":
        raise ValueError(f"{OURS}: {ours.why}")
    for entry in entries:
        speed = [a / b for a, b in zip(ours.seconds["wall"], entry.seconds.get("wall", ()), strict=False)]
        figures.append(
            (f"{STUDENTS} students, as a multiple of the speed", entry.name, median(speed) if speed else "", entry.why)
        )
    columns = "what", "name", "value", "why not"
    page = rows.table_text([columns, *([rows.cell(value) for value in figure] for figure in figures)])
    rows.conclude(RESULTS, [dict(zip(columns, figure, strict=True)) | about for figure in figures], page, options.save)


if __name__ == "__main__":
    main()
