"""The command line: ``bird demo`` and ``bird info``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch

import bird_kernels

from . import demo


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (FileExistsError, ValueError, ChildProcessError) as error:
        print(f"bird: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbird: interrupted; the same command with --resume goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bird", description="Move a teacher's robustness into a student.")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser(
        "demo",
        help="watch robustness move from a teacher into a student, on real images",
        description="Train a teacher and a student on Fashion-MNIST, make the student robust with BIRD and "
        "with other methods, and compare them. The images come with the package.",
    )
    command.set_defaults(run=_demo)
    command.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for the results (default: %(default)s)"
    )
    command.add_argument("--seeds", type=int, help="how many repetitions (default: 3; quick: 1)")
    steps = f"{demo.Plan().steps}; quick: {demo.QUICK.steps}"
    command.add_argument("--steps", type=int, help=f"training steps of every stage (default: {steps})")
    command.add_argument("--batch", type=int, help=f"images per step (default: {demo.Plan().batch_size})")
    command.add_argument("--chunk", type=int, help="images in memory at a time, if a batch is too large for it")
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: an accelerator if there is one)")
    command.add_argument("--resume", action="store_true", help="go on with what the folder holds")
    command.add_argument(
        "--quick", action="store_true", help="half a minute: shows that everything runs, not the effect"
    )

    command = commands.add_parser("info", help="versions, devices, backends, and why a missing one is missing")
    command.set_defaults(run=_info)
    return parser


def _demo(options: argparse.Namespace) -> int:
    plan = demo.QUICK if options.quick else demo.Plan()
    chosen = {"steps": options.steps, "batch_size": options.batch, "chunk_size": options.chunk}
    plan = replace(plan, **{name: value for name, value in chosen.items() if value is not None})
    seeds = options.seeds if options.seeds is not None else 1 if options.quick else 3
    device = _device(options.device)
    jobs = 1
    if device.type == "cpu":
        # A step of these networks takes 12 ms on one core and 9 on two, but 40 to 400 on two that are also wanted
        # elsewhere, because the threads wait for each other. And the numbers no longer depend on the core count.
        torch.set_num_threads(1)
        jobs = min(seeds, cores())
    _say(f"Seeds: {seeds}. Steps of each stage: {plan.steps}. Device: {device}. Results: {options.out}/")
    demo.run(options.out, plan, seeds, device=device, resume=options.resume, jobs=jobs, echo=_say)
    if options.quick:
        _say("A quick run shows that everything works; it is far too short for an effect.")
    return 0


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(name: str | None) -> torch.device:
    """The device asked for, or an accelerator if this machine has one, tried out."""
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that it lacks
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from error


def _say(line: str) -> None:
    print(line, flush=True)


def _info(options: argparse.Namespace) -> int:
    print(f"bird-kernels {_version('bird-kernels')}, torch {torch.__version__}, triton {_version('triton')}")
    print(f"Python {platform.python_version()}, {platform.platform()}")
    print(f"cpu: {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        print(f"cuda:{index}: {card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB")
    if torch.cuda.device_count() == 0:
        print("cuda: no device found" if torch.version.cuda else "cuda: this torch is built without it")
    for name, reason in bird_kernels.backend_status().items():
        print(f"backend {name}: {'available' if reason is None else f'not available: {reason}'}")
    return 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
