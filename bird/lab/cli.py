"""The command line: ``bird demo``, ``bird run``, ``bird report``, ``bird select``, ``bird tune`` and ``bird info``."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import bird_kernels
from bird_kernels import tuner, tuning

from .experiment import Cell
from .language import recipe as language_recipes
from .recipe import at_home, names, parsed
from .stages import alone, complete, side_by_side
from .tables import version
from .tensors import read_json
from .vision import candidates
from .vision import recipe as vision_recipes
from .vision import report as vision_reports
from .vision.experiment import VisionExperiment
from .vision.methods import METHODS
from .vision.recipe import DEMO

QUICK = 40  # steps of a quick demo, and images of each class
# What users can do something about; the rest is a bug, with its traceback.
EXPECTED = OSError, ValueError, ImportError, FloatingPointError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except EXPECTED as error:
        return _complain(error)
    except KeyboardInterrupt:
        how = "what was measured is kept" if options.run is _tune else "the same command goes on from here"
        _say(f"\nbird: interrupted; {how}", sys.stderr)
        return 130


def _complain(error: Exception) -> int:
    _say(f"bird: {error}", sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bird", description="Move a teacher's robustness into a student.")
    parser.add_argument("--version", action="version", version=f"bird-kernels {version('bird-kernels')}")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser(
        "demo",
        help="watch robustness move from a teacher into a student, on real images",
        description="Train a teacher and a student on Fashion-MNIST, make the student robust with BIRD, and compare "
        "it with training on alone. The images come with the package.",
    )
    whole = {"arch": None, "variant": None, "data": None, "compile": False, "jobs": None}
    command.set_defaults(run=_run, command="demo", recipe=DEMO, method=None, **whole)
    command.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for the results (default: %(default)s)"
    )
    command.add_argument("--seeds", type=int, help="how many repetitions (default: 1)")
    command.add_argument("--steps", type=int, help=f"training steps of every stage (default: 4000; quick: {QUICK})")
    command.add_argument("--batch", type=int, help="images per step (default: 64)")
    command.add_argument("--chunk", type=int, help="images in memory at a time, if a batch is too large for it")
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: an accelerator if there is one)")
    command.add_argument(
        "--quick", action="store_true", help="a minute or two: shows that everything runs, not the effect"
    )

    for name, does in (
        ("run", "run a recipe: the experiments of the paper, and ours"),
        ("report", "tables, files and pictures of what a recipe has come to, beside the paper's numbers"),
        (
            "select",
            "what the teachers of a recipe promise its students, before any transfer (probe accuracy, complementary "
            "knowledge, usefulness under corruption, effective rank); and how far that held",
        ),
    ):
        command = commands.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
        command.set_defaults(run=_report if name == "report" else _run, command=name)
        command.add_argument("recipe", help=f"a TOML file, or one of {', '.join(names())}")
        command.add_argument("--arch", nargs="+", metavar="NAME", help="networks of the recipe (default: all)")
        command.add_argument("--variant", nargs="+", metavar="NAME", help="variants of the recipe (default: all)")
        if name != "select":
            command.add_argument(
                "--method", nargs="+", metavar="NAME", help=f"all, or of the recipe's: {', '.join(METHODS)}, ..."
            )
        command.add_argument("--seeds", type=int, help="how many repetitions (default: the recipe's)")
        command.add_argument(
            "--out", type=Path, default=Path("runs"), help="folder of all that is trained (default: %(default)s)"
        )
        command.add_argument("--data", type=Path, help="folder of the data sets (default: BIRD_DATA)")
        if name != "report":
            command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: an accelerator if there is one)")
            command.add_argument("--compile", action="store_true", help="train compiled models: worth it in long runs")
            command.add_argument("--jobs", type=int, help="stages at a time (default: cores on a CPU, else 1)")

    command = commands.add_parser(
        "tune",
        help="measure which kernels are fastest on this GPU",
        description="Measure on this GPU which backend is fastest, problem by problem, and keep it for the next "
        "program: `auto` follows it, `explain` shows it. Every candidate is compared with fp64 first.",
    )
    command.set_defaults(run=_tune)
    command.add_argument(
        "--shape", action="append", type=_sizes, metavar="N,P,Q", help="rows, student's and teacher's width; repeatable"
    )
    command.add_argument(
        "--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], help="default: float32 bfloat16"
    )
    command.add_argument("--from-run", type=Path, metavar="FOLDER", help="the sizes and dtypes that a training run had")
    command.add_argument("--minutes", type=_minutes, default=2.0, help="when to stop (default: %(default)g)")
    command.add_argument("--device", help="cuda, cuda:1, ... (default: an accelerator if there is one)")

    command = commands.add_parser("info", help="versions, devices, backends, and why a missing one is missing")
    command.set_defaults(run=_info)
    return parser


def _sized(recipe: vision_recipes.VisionRecipe, options: argparse.Namespace) -> vision_recipes.VisionRecipe:
    """The demo's recipe with as many steps, images a step and images in memory as asked for."""
    steps = QUICK if options.quick and options.steps is None else options.steps
    asked = {"steps": steps, "batch_size": options.batch, "chunk_size": options.chunk}
    changes = {name: value for name, value in asked.items() if value is not None}
    if options.quick:
        few = {side: replace(getattr(recipe, side), limit_per_class=QUICK) for side in ("teacher", "student")}
        recipe = replace(recipe, **few, seeds=1)
    budgets = {part: replace(getattr(recipe, part), **changes) for part in ("pretraining", "transfer")}
    return replace(recipe, **budgets)


def _run(options: argparse.Namespace) -> int:
    """Several of these, by hand or by torchrun, share the work: each takes a stage that nobody is at."""
    device = _device(options.device)
    rank = os.environ.get("LOCAL_RANK")
    if rank is not None and not rank.isdecimal():
        raise ValueError(f"the environment's LOCAL_RANK is {rank!r}, which is no number: torchrun sets it, or unset it")
    if rank is not None and device.type != "cpu" and options.device is None:
        device = _device(f"{device.type}:{rank}")
    jobs = options.jobs if options.jobs is not None else cores() if device.type == "cpu" and rank is None else 1
    if jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {jobs}")
    if device.type == "cpu":
        # A step of small networks takes 12 ms on one core and 9 on two, but 40 to 400 on two that are also wanted
        # elsewhere, because the threads wait for each other. And the numbers no longer depend on the core count.
        torch.set_num_threads(1)
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out} is a file: name a folder, which is made if it is not there")
    experiment, choice = _experiment(options, device, jobs)
    experiment.check()
    asked = _asked(experiment, options.command, choice)
    what = "candidates" if options.command == "select" else "cells"
    _say(f"{experiment.recipe.title}: {len(asked)} {what}, {jobs} at a time on {device}; all is kept in {options.out}/")
    if jobs > 1:
        side_by_side(_share_aside, [(experiment, options.command, choice, number == 0) for number in range(jobs)])
    _share(experiment, options.command, choice)
    if rank in (None, "0"):
        _write(experiment, options.command, choice)
    if options.command == "demo" and options.quick:
        _say("A quick run shows that everything works; it is far too short for an effect.")
    return 0


def _asked(experiment: Any, command: str, choice: dict[str, Any]) -> list[Cell]:
    return experiment.candidates(**choice) if command == "select" else experiment.cells(**choice)


def _share(experiment: Any, command: str, choice: dict[str, Any], first: bool = True) -> None:
    """Make what nobody else is making; of several processes here the first one says when it waits."""
    stages = [stage for one in _asked(experiment, command, choice) for stage in one.wanted]
    complete(stages, experiment.root, tell=_say, idle=_say if first else _nothing)


def _share_aside(experiment: Any, command: str, choice: dict[str, Any], first: bool) -> None:
    """The same in a process of its own, whose parent does not see what was raised."""
    try:
        _share(experiment, command, choice, first)
    except EXPECTED as error:
        sys.exit(_complain(error))


def _report(options: argparse.Namespace) -> int:
    experiment, choice = _experiment(options, torch.device("cpu"), 1)
    _write(experiment, options.command, choice)
    return 0


def _write(experiment: Any, command: str, choice: dict[str, Any]) -> None:
    """The report: its files are of one process, however many write it."""
    if not experiment.root.is_dir():
        raise ValueError(f"there is no folder {experiment.root}: bird run it, or say which --out")
    with alone(experiment.root / ".report.lock", lambda: _say("waiting for another process, which writes the report")):
        text, folder = _written(experiment, command, choice)
    _say(f"\n{text}\nIn {folder}/ with files and pictures.")


def _written(experiment: Any, command: str, choice: dict[str, Any]) -> tuple[str, Path]:
    if command == "select":
        folder = experiment.root / "teachers" / _named(experiment.recipe.name, choice)
        text = candidates.write_teachers(experiment, experiment.candidates(**choice), folder)
    else:
        report = experiment.root / "reports" / _named(experiment.recipe.name, choice)
        folder = experiment.root if command == "demo" else report
        if isinstance(experiment, VisionExperiment):
            text = vision_reports.write_vision_report(experiment, experiment.cells(**choice), folder)
        else:
            from .language import report

            text = report.write_language_report(experiment, experiment.cells(**choice), folder)
    return text, folder


def _named(recipe: str, choice: dict[str, Any]) -> str:
    """A part of a recipe is reported beside the whole, not over it."""
    parts = [name for names in choice.values() if isinstance(names, list) for name in names]
    seeds = [] if choice["seeds"] is None else [f"seeds {choice['seeds']}"]
    name = "-".join([recipe, *parts, *seeds]).replace(" ", "-").replace(",", "")
    many = hashlib.sha256(name.encode()).hexdigest()[:16]  # of more parts than the name of a file can hold
    return name if len(name.encode()) <= 200 else f"{recipe.replace('/', '-')}-{many}"


def _parse(name: str, table: Mapping[str, Any]) -> vision_recipes.VisionRecipe | language_recipes.LanguageRecipe:
    return language_recipes.parse(name, table) if "kind" in table else vision_recipes.parse_vision(name, table)


def _language(
    recipe: language_recipes.LanguageRecipe, options: argparse.Namespace, device: torch.device, jobs: int
) -> Any:
    """An experiment with language models, whose libraries load here."""
    if options.command == "select" or getattr(options, "compile", False):
        what = "select" if options.command == "select" else "--compile"
        raise ValueError(f"{what} is for the recipes of images")
    if os.environ.get("LOCAL_RANK") is not None:
        raise ValueError(
            "transformers' trainers would take torchrun's processes for one run: start the command once for each GPU "
            "(CUDA_VISIBLE_DEVICES), on one --out folder, and they share the work"
        )
    if recipe.kind == "preference":
        from .language.preference import Preferences as Kind
    else:
        from .language.weak_to_strong import WeakToStrong as Kind  # type: ignore[assignment]
    return Kind(recipe, options.out, device, options.data, progress=jobs == 1 and sys.stderr.isatty())


def _experiment(options: argparse.Namespace, device: torch.device, jobs: int) -> tuple[Any, dict[str, Any]]:
    """The recipe, and which of its cells were asked for."""
    recipe = parsed(options.recipe, _parse)
    choice = {"networks": options.arch, "variants": options.variant}
    if options.command != "select":
        choice["methods"] = None if options.method is None or "all" in options.method else options.method
    has = dict.fromkeys([*recipe.methods, *(m for v in recipe.variants.values() for m in v.methods or ())])
    known = {"networks": recipe.networks, "variants": recipe.variants, "methods": has}
    for what, chosen in choice.items():
        for name in chosen or ():
            if name not in known[what]:
                raise ValueError(f"{recipe.name} has no {name!r} among its {what}: {', '.join(map(repr, known[what]))}")
    if options.seeds is not None and options.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, not {options.seeds}")
    if options.data is not None and not at_home(options.data).is_dir():  # the system's own copy would hide the slip
        raise ValueError(f"--data {options.data}: there is no folder of this name")
    choice |= {"seeds": options.seeds}
    if isinstance(recipe, language_recipes.LanguageRecipe):
        return _language(recipe, options, device, jobs), choice
    experiment = VisionExperiment(
        _sized(recipe, options) if options.command == "demo" else recipe,
        options.out,
        device,
        options.data,
        progress=None if jobs == 1 else False,
        compile=getattr(options, "compile", False),
    )
    return experiment, choice


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(name: str | None) -> torch.device:
    """The device asked for, or an accelerator if this machine has one, tried out."""
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        trial = torch.ones(1, device=name)
        trial.item()  # of a device that holds numbers, as "meta" does not
        return trial.device
    except (RuntimeError, AssertionError) as error:  # what torch raises for a device that it lacks
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from error


def _nothing(line: str) -> None:
    """Where another process says it."""


def _say(line: str, file: Any = None) -> None:
    """Print a line as far as the terminal can, or not at all: what is trained does not hang on who reads along."""
    file = file or sys.stdout
    try:
        text = line.replace("±", "+-") if _lacks("±", file) else line
        print(text.encode(file.encoding or "utf-8", "replace").decode(file.encoding or "utf-8"), file=file, flush=True)
    except OSError:  # `| head` has gone, or the disk of a log is full
        with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), file.fileno())  # or Python fails once more at its end


def _lacks(character: str, file: Any) -> bool:
    try:
        character.encode(file.encoding or "utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _info(options: argparse.Namespace) -> int:
    _say(f"bird-kernels {version('bird-kernels')}, torch {torch.__version__}, triton {version('triton')}")
    _say(f"Python {platform.python_version()}, {platform.platform()}")
    _say(f"cpu: threads {torch.get_num_threads()}")
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        _say(f"cuda:{index}: {card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB")
        _say(f"cuda:{index}: {_tuned(index)}")
    if torch.cuda.device_count() == 0:
        _say("cuda: no device found" if torch.version.cuda else "cuda: this torch is built without it")
        _say("tuning: nothing to tune on a CPU")
    for name, reason in bird_kernels.backend_status().items():
        _say(f"backend {name}: {'available' if reason is None else f'not available: {reason}'}")
    return 0


def _sizes(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    sizes = tuple(int(number) for number in numbers if number.strip().isdigit())
    if len(sizes) != 3 or len(numbers) != 3 or min(sizes) < 1 or sizes[0] < 4:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 4 rows and two widths, as in 128,512,1280")
    return sizes


def _minutes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.0 < float(text) < 1440.0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a number of minutes above 0")


def _tune(options: argparse.Namespace) -> int:
    device = _device(options.device)
    noted = [] if options.from_run is None else _noted_shapes(options.from_run)
    if device.type != "cuda":
        _say(f"On {device} there is nothing to tune: only the library backend runs there, with PyTorch's own products.")
        return 0
    asked = [(shape, dtype) for shape in options.shape or () for dtype in options.dtype or tuner.DTYPES]
    asked += [(shape, dtype) for *shape, dtype in noted]
    if not asked:
        asked = [(shape, dtype) for shape in tuner.SHAPES for dtype in options.dtype or tuner.DTYPES]
    table = tuner.tune(device, asked, options.minutes, _say)
    _say(f"{len(table.rows)} measurements are kept in {tuning.user_file(table.key)}")
    return 0


def _noted_shapes(folder: Path) -> list[list[Any]]:
    """What the runs below a folder have noted: [rows, student's width, teacher's width, dtype] each."""
    files = sorted(folder.rglob("shapes.json"))
    if not files:
        raise ValueError(f"{folder} has no shapes.json: a recipe's run with BIRD writes one with its checkpoints")
    noted = {shape for file in files for shape in _shapes(file)}
    return [[*shape] for shape in sorted(noted) if shape[3] in ("float32", "bfloat16", "float16")]


def _shapes(file: Path) -> list[tuple[int, int, int, str]]:
    advice = "delete it, and the run's next checkpoint writes it anew"
    shapes = read_json(file, advice)
    for shape in shapes if isinstance(shapes, list) else [None]:
        *sizes, dtype = shape if isinstance(shape, list) and len(shape) == 4 else [None]
        if not isinstance(dtype, str) or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"{file} is damaged ({shape} is not [rows, width, width, dtype]): {advice}")
    return [tuple(shape) for shape in shapes]


def _tuned(index: int) -> str:
    key = tuning.key_of(torch.device("cuda", index))
    table = tuning.table_of(key)
    if table is None:
        return "not tuned: `auto` follows a cost model; `bird tune` measures"
    return f"tuned {table.when}, {len(table.rows)} measurements"
