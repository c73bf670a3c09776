"""Every corruption at every severity, on two pictures: a contact sheet.

    python -m tools.corruption_sheet    # writes docs/lab/corruptions.png

The colour picture is drawn by code; the grey one is a test image of the shipped Fashion-MNIST subset.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from bird.lab.vision.corruptions import CORRUPTIONS, HELD_OUT_CORRUPTIONS, SEVERITIES, corrupt
from bird.lab.vision.data import to_float
from bird.lab.vision.datasets import load_splits

PATH = Path(__file__).resolve().parents[1] / "docs/lab/corruptions.png"
SIDE, SCALE, GAP, LABEL, HEAD = 32, 2, 3, 132, 20
CELL = SIDE * SCALE + GAP


def colour_picture() -> Tensor:
    """A bird on a branch before a hazy sky, float32 ``[1, 3, 32, 32]``: drawn eight times as large, then averaged."""
    size = 8 * SIDE
    down = np.linspace(0, 1, size)[:, None, None]
    sky = (1 - down) * np.array([90, 150, 215]) + down * np.array([225, 215, 190])
    picture = Image.fromarray(np.broadcast_to(sky, (size, size, 3)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    draw.polygon([(0, 215), (70, 190), (140, 212), (200, 180), (256, 205), (256, 256), (0, 256)], fill=(70, 120, 60))
    draw.line([(0, 200), (256, 176)], fill=(95, 62, 38), width=12)
    draw.polygon([(64, 150), (10, 190), (24, 200), (90, 170)], fill=(50, 60, 120))  # tail
    draw.ellipse([56, 84, 176, 184], fill=(205, 70, 50))  # body
    draw.polygon([(70, 120), (140, 104), (120, 168), (84, 164)], fill=(60, 75, 150))  # wing
    draw.ellipse([138, 48, 206, 114], fill=(60, 75, 150))  # head
    draw.polygon([(202, 74), (240, 84), (202, 94)], fill=(240, 180, 40))  # beak
    draw.ellipse([174, 66, 190, 82], fill=(250, 250, 245))
    draw.ellipse([179, 70, 188, 79], fill=(15, 15, 15))
    small = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
    return to_float(torch.from_numpy(np.array(small)).permute(2, 0, 1).unsqueeze(0)).contiguous()


def grey_picture() -> Tensor:
    """A sneaker, float32 ``[1, 1, 32, 32]``: 28 x 28 with a black frame."""
    return to_float(load_splits("fashion-mnist-subset", classes=[7], limit_per_class=3).test.images[:1])


def sheet() -> Image.Image:
    """Rows are corruptions, columns the severities 0 to 5 of the colour picture, then of the grey one."""
    columns = 2 * (len(SEVERITIES) + 1)
    page = Image.new("RGB", (LABEL + columns * CELL + GAP, HEAD + len(CORRUPTIONS) * CELL + GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for column in range(columns):
        severity = column % 6
        draw.text((_left(column), 4), f"{severity}" if severity else "clean", fill="black", font=font)
    for row, name in enumerate(CORRUPTIONS):
        top = HEAD + row * CELL
        mark = " *" if name in HELD_OUT_CORRUPTIONS else ""
        draw.text((6, top + SIDE * SCALE // 2 - 7), name + mark, fill="black", font=font)
        for column in range(columns):
            x = (colour_picture, grey_picture)[column // 6]()
            y = corrupt(x, name, column % 6, index=torch.tensor([column // 6]))
            page.paste(_enlarged(y[0]), (_left(column), top))
    return page


def _left(column: int) -> int:
    return LABEL + column * CELL + (GAP if column > 5 else 0)


def _enlarged(x: Tensor) -> Image.Image:
    pixels = (x * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((SIDE * SCALE, SIDE * SCALE), Image.Resampling.NEAREST)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    part = PATH.with_name(PATH.name + ".part")
    sheet().save(part, format="PNG", optimize=True)
    os.replace(part, PATH)
    print(PATH)


if __name__ == "__main__":
    main()
