"""Distillation with a global batch of tens of thousands: DDP, chunks, bf16, channels-last, torch.compile, a checkpoint.

    python examples/large_batch.py                         # made-up images and a batch of 64: a minute on a CPU
    torchrun --nproc-per-node 8 examples/large_batch.py --images FOLDER --size 224 --student resnet50 --layer layer4 \\
        --teacher convnext_base --teacher-weights FILE --teacher-layer features.7 --batch 32768 --chunk 512 \\
        --steps 2000 --lr 3 --workers 12 --compile --checkpoint mine.safetensors

CKA compares all images of the batch; the graph of one chunk at a time is in memory. FOLDER has a folder for each class.
Started again with more steps, the run goes on from its checkpoint, on any number of processes that see the file.
"""

import argparse
import gc
import os
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile, record_function
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, models
from torchvision.transforms import v2

import bird
from bird.files import atomic

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for flag, default, words in (
    ("images", "", "none: random ones, of which nothing can be learnt"),
    ("size", 32, "of an image, in pixels a side"),
    ("student", "resnet18", "a network of torchvision"),
    ("layer", "layer3", "of the student, guided"),
    ("teacher", "mobilenet_v3_large", "a network of torchvision"),
    ("teacher-layer", "features.12", "of the teacher"),
    ("teacher-weights", "", "safetensors; none: random ones"),
    ("batch", 64, "images of all processes"),
    ("chunk", 16, "images whose graph is in memory"),
    ("steps", 3, "in all"),
    ("lr", 0.05, "after five steps of warm-up"),
    ("workers", 0, "of each process, which read images"),
    ("checkpoint", Path("large_batch.safetensors"), "file"),
):
    parser.add_argument(f"--{flag}", default=default, type=type(default), help=f"{words} (default: %(default)s)")
parser.add_argument("--compile", action="store_true", help="both networks")


class Augmented(Dataset[tuple[Tensor, int]]):
    """Images by (index, seed): whichever process or worker reads one, it is cropped and flipped alike."""

    def __init__(self, images: str, size: int) -> None:
        look = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
        fake = datasets.FakeData(4096, (3, size, size), transform=look)
        self.data = datasets.ImageFolder(images, look) if images else fake
        self.classes = len(self.data.classes) if images else 10

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        torch.manual_seed(key[1])
        return self.data[key[0]]  # bytes and a class


def train(options: argparse.Namespace, device: torch.device, rank: int, world: int) -> None:
    """Train the student; the first of ``world`` processes prints, and saves the checkpoint."""
    images = Augmented(options.images, options.size)
    torch.manual_seed(0)  # the same networks everywhere
    network, guide = models.get_model(options.student, num_classes=images.classes), models.get_model(options.teacher)
    if options.teacher_weights:
        guide.load_state_dict(load_file(options.teacher_weights))
    network.to(device, memory_format=torch.channels_last), guide.to(device, memory_format=torch.channels_last)
    teacher, taps = bird.Teacher(guide, [options.teacher_layer]), bird.Taps(network, [options.layer])
    pair, group = (options.teacher_layer, options.layer), dist.group.WORLD if world > 1 else None
    criterion = bird.BirdLoss(alpha=0.1, beta=0.9, pairs=[pair], group=group)
    optimizer = torch.optim.SGD(network.parameters(), options.lr, momentum=0.9, nesterov=True)
    done = resume(network, optimizer, options.checkpoint) if options.checkpoint.exists() else 0
    if options.compile:
        network.compile(), guide.compile()
    student = DistributedDataParallel(network) if world > 1 else network

    def there(images: Tensor) -> Tensor:
        return images.to(device, memory_format=torch.channels_last, non_blocking=True).float() / 127.5 - 1

    def forward(chunk: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        task = cross_entropy(student(there(chunk[0])), chunk[1].to(device), reduction="sum")
        return task * world / options.batch, taps.pop()  # DDP averages over processes, hence their number

    torch.manual_seed(0)  # and the same batches
    order, chunk = torch.randint(len(images.data), (options.steps * options.batch,), dtype=torch.int32), options.chunk
    starts = range(done * options.batch + rank * chunk, len(order), world * chunk)
    own = (list(zip(order[i : i + chunk].tolist(), range(i, i + chunk), strict=True)) for i in starts)
    loader = iter(DataLoader(images, batch_sampler=own, num_workers=options.workers, pin_memory=device.type == "cuda"))
    for step in range(done + 1, options.steps + 1):
        batch = [next(loader) for _ in range(options.batch // options.chunk // world)]
        torch.manual_seed(step * world + rank)  # a run that was resumed drops out what one without a break would
        optimizer.param_groups[0]["lr"] = options.lr * min(1.0, step / 5)
        begin, last = perf_counter(), step == options.steps
        with profile() if last else nullcontext() as seen, record_function("step"):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                bird.chunked_backward(forward, lambda c: teacher(there(c[0])), batch, criterion, model=student)
            optimizer.step()
            cka = float(criterion.last["cka/{}/{}".format(*pair)])  # waits for the device
        if rank == 0:
            speed = f"{options.batch / (perf_counter() - begin):.0f} images/s"
            speed += f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at most" if device.type == "cuda" else ""
            print(f"step {step}: CKA {cka:.6f} of {options.batch} images on {world} processes; {speed}")
            if last or step % 100 == 0:
                save(network, optimizer, step, options.checkpoint)
        if seen is not None and rank == 0:
            clock = f"{'device' if device.type == 'cuda' else 'cpu'}_time_total"
            spent = {e.key: getattr(e, clock) for e in seen.key_averages() if e.device_type.name.lower() == device.type}
            print(f"{100 * spent['bird: CKA'] / spent['step']:.1f} % of the last step is CKA and its gradient")


def save(network: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, path: Path) -> None:
    """Write what `resume` reads; a run that is killed meanwhile leaves the file that was there."""
    momenta = {f"momentum.{name}": optimizer.state[p]["momentum_buffer"] for name, p in network.named_parameters()}
    tensors = network.state_dict() | momenta | {"step": torch.tensor(step)}
    with atomic(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)


def resume(network: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> int:
    """Read a checkpoint; return how many steps are done. It has plain tensors, so loading it runs no code."""
    saved = load_file(path)
    for name, parameter in network.named_parameters():
        optimizer.state[parameter]["momentum_buffer"] = saved.pop(f"momentum.{name}").to(parameter)
    done = int(saved.pop("step"))
    network.load_state_dict(saved)
    print(f"{done} steps are done: {path}")
    return done


if __name__ == "__main__":
    options, device, rank, world = parser.parse_args(), torch.device("cpu"), 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(device := torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun's
        dist.init_process_group()  # gloo for the CPU, and NCCL beside it where there are GPUs
        rank, world = dist.get_rank(), dist.get_world_size()
    if options.batch % (options.chunk * world):
        parser.error(f"--batch must be a multiple of --chunk times the {world} processes")
    train(options, device, rank, world)
    if world > 1:
        gc.collect()  # DDP keeps the group in a cycle, and one that outlives the interpreter may abort the process
        dist.destroy_process_group()
