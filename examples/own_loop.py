"""A training loop of your own with BIRD: a student learns its labels, and the geometry of a frozen teacher's layer.

    python examples/own_loop.py                                # made-up images: seconds on a CPU
    python examples/own_loop.py --images FOLDER --steps 5000 --checkpoint mine.safetensors   # a folder for each class

Started again with more steps, it goes on from its checkpoint; other images need another one.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

import bird

BATCH = 32

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--images", help="default: random ones, of which nothing can be learnt")
parser.add_argument("--steps", type=int, default=20, help="in all (default: %(default)s)")
parser.add_argument("--checkpoint", type=Path, default="own_loop.safetensors", help="(default: %(default)s)")
options = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

prepare = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(64), transforms.ToTensor()])
data = datasets.ImageFolder(options.images, prepare) if options.images else datasets.FakeData(512, transform=prepare)
torch.manual_seed(0)
student = models.mobilenet_v3_small(num_classes=len(data.classes) if options.images else 10).to(device)
teacher = bird.Teacher(models.resnet18(), ["layer3"]).to(device)  # yours is trained: weights="DEFAULT" downloads one
criterion = bird.BirdLoss(alpha=0.1, beta=0.9, pairs=[("layer3", "features.8")])  # alpha * task + beta * (1 - CKA)
optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)

done = 0
if options.checkpoint.exists():  # plain tensors; loading them runs no code
    saved = load_file(options.checkpoint, device)
    done = int(saved.pop("step"))
    for i, parameter in enumerate(student.parameters()):
        optimizer.state[parameter]["momentum_buffer"] = saved.pop(f"momentum.{i}")
    student.load_state_dict(saved)
    print(f"{done} of {options.steps} steps are done: {options.checkpoint}")

order = torch.randint(len(data), (options.steps * BATCH,), generator=torch.Generator().manual_seed(0))
loader = DataLoader(data, BATCH, sampler=order[done * BATCH :].tolist())
with bird.Taps(student, ["features.8"]) as taps:  # records the layer's features while the student runs
    for step, (images, labels) in enumerate(loader, start=done + 1):
        torch.manual_seed(step)  # a run that was resumed drops out what one without a break would
        images, labels = images.to(device), labels.to(device)
        loss = criterion(cross_entropy(student(images), labels), teacher(images), taps.pop())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss:.4f}, CKA {criterion.last['cka/layer3/features.8']:.4f}")
        if step % 1000 == 0 or step == options.steps:
            tensors = student.state_dict() | {"step": torch.tensor(step)}
            for i, parameter in enumerate(student.parameters()):
                tensors[f"momentum.{i}"] = optimizer.state[parameter]["momentum_buffer"]
            save_file(tensors, options.checkpoint)
