"""Fashion-MNIST over photographs, made as MNIST-M is (Ganin et al. 2016): ``|background - garment|`` in every channel.

On black, whatever lifts black (fog, snow, brightness) is nearly all that hurts a network; over photographs every
corruption has something to hurt. The photographs are wallpapers of Debian packages: one file of each picture, so that
no other resolution or night version of it is in another set; flat and transparent ones are left out.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..corruptions.random import Noise, hash32, keys
from ..data import Images, Splits
from .folders import decoded
from .layout import Counts, Dataset, FileLayout

SIDE = 160  # pixels of a photograph's largest square, in which a background of 32 x 32 lies anywhere
_GNOME = "backgrounds/gnome/{}.webp", "adwaita-l grid-l licorice-l pixels-l truchet-l wood-l"
_MATE = (
    "backgrounds/mate/{}",
    "abstract/Elephants.jpg desktop/Float-into-MATE.png desktop/Stripes.png desktop/Ubuntu-Mate-Warm-no-logo.png "
    "nature/Aqua.jpg nature/Blinds.jpg nature/Dune.jpg nature/FreshFlower.jpg nature/Garden.jpg nature/GreenMeadow.jpg "
    "nature/LadyBird.jpg nature/RainDrops.jpg nature/Storm.jpg nature/TwoWings.jpg nature/Wood.jpg "
    "nature/YellowFlower.jpg",
)
_LOMIRI = (
    "backgrounds/{}.jpg",
    "aitzgorri_by_Aitzol_Berasategi analogpattern_by_Peter_Nerlich Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly "
    "Fossa_by_Jasper_Roks free_by_Peter_Nerlich friends_by_Aitzol_Berasategi greentock_by_Peter_Nerlich "
    "Infinite-Sea_by_Aury88 Kleiber_by_Lukas_Baubkus life_by_Aitzol_Berasategi Painting-Colors_by__herobrine7gamer "
    "picosdeeuropa_by_Aitzol_Berasategi Picture_0B_by_freespace Picture_1A_by_freespace seeding_by_Clements_Engelhardt "
    "sunset_by_Aitzol_Berasategi umang_by_Abhishek_Mudgal Wine_by_Jakkub_Mede",
)
_PLASMA = (
    "wallpapers/{}",
    (
        "Altai/5120x2880.png Autumn/2560x1600.jpg BytheWater/2560x1600.jpg Canopee/3840x2160.png Cascade/3840x2160.png "
        "Cluster/3840x2160.png ColdRipple/2560x1600.jpg ColorfulCups/2560x1600.jpg DarkestHour/2560x1600.jpg "
        "Elarun/2560x1600.png EveningGlow/2560x1600.jpg FallenLeaf/2560x1600.jpg Flow/5120x2880.jpg "
        "FlyingKonqui/2560x1600.png Grey/2560x1600.jpg Honeywave/5120x2880.jpg IceCold/5120x2880.png Kay/5120x2880.png "
        "Kite/2560x1600.jpg Kokkini/3840x2160.png MilkyWay/5120x2880.png OneStandsOut/2560x1600.jpg Opal/3840x2160.png "
        "PastelHills/3200x2000.jpg Patak/5120x2880.png Path/2560x1600.jpg SafeLanding/5120x2880.jpg "
        "Shell/5120x2880.jpg Volna/5120x2880.jpg summer_1am/2560x1600.jpg"
    ).replace("/", "/contents/images/"),
)
FILES = tuple(
    "usr/share/" + place.format(name) for place, names in (_GNOME, _MATE, _LOMIRI, _PLASMA) for name in names.split()
)
# Of every five photographs in this order three are for training images, one for validation, one for the test set.
_SETS = tuple([k for k in range(len(FILES)) if k % 5 in parts] for parts in ((0, 1, 2), (3,), (4,)))


def read_photographs(paths: list[Path], counts: Counts) -> tuple[Images, ...]:
    """The photographs of training, validation and test set, ``[n, 3, SIDE, SIDE]``, with 0 for a label."""
    folder = paths[0].parents[len(Path(FILES[0]).parts) - 1]
    pixels = torch.from_numpy(decoded(folder, paths, SIDE))
    return tuple(Images(pixels[mine], torch.zeros(len(mine), dtype=torch.int64)) for mine in _SETS)


PHOTOGRAPHS = Dataset(
    title="Photographs for backgrounds",
    classes=1,
    channels=3,
    counts=tuple(len(mine) for mine in _SETS),
    layouts=(FileLayout("photographs", FILES, read_photographs),),
    source="In the folder with the data sets, on Debian 12 and without being root: apt-get download gnome-backgrounds "
    "mate-backgrounds plasma-workspace-wallpapers lomiri-wallpapers-16.04 lomiri-wallpapers-20.04; "
    "for file in *.deb; do dpkg -x $file photographs; done "
    "(CC BY-SA 3.0, GPL-2+ and CC BY-SA 4.0, GPL-2+, CC BY or BY-SA by picture: usr/share/doc/*/copyright).",
)


def over(backgrounds: Tensor, garments: Tensor) -> Tensor:
    """``|background - garment|``, uint8; the shapes broadcast."""
    return torch.maximum(backgrounds, garments) - torch.minimum(backgrounds, garments)


def patches(photographs: Tensor, noise: Noise) -> Tensor:
    """A part of any photograph for each sample, in half of the cases mirrored.

    Args:
        photographs: uint8 ``[k, 3, height, width]``.
        noise: of n samples.

    Returns:
        uint8 ``[n, 3, 32, 32]``.
    """
    parts = photographs.unfold(2, 32, 1).unfold(3, 32, 1).permute(0, 2, 3, 1, 4, 5)
    chosen = parts[noise.integers(parts.shape[0]), noise.integers(parts.shape[1]), noise.integers(parts.shape[2])]
    return torch.where(noise.integers(2, 1, 1, 1) == 1, chosen.flip(3), chosen)


def pixel_keys(images: Tensor) -> Tensor:
    """A key for each picture from its own pixels, int64 ``[n]``: whatever else is read with it, in whatever order."""
    weights = hash32(torch.arange(images[0].numel()))
    sums = [(part.flatten(1).long() * weights).sum(1) for part in images.split(1000)]
    return keys(torch.cat(sums) if sums else torch.empty(0, dtype=torch.int64), 0xFA51)


def over_photographs(splits: Splits, root: Path) -> Splits:
    """Each garment over a part of a photograph of its own set, the same one whenever it is read."""
    three = _photographs(root)
    sets = (splits.train, splits.validation, splits.test)
    return Splits(*(_placed(images, own.images) for images, own in zip(sets, three, strict=True)))


def over_levels(splits: Splits, root: Path) -> Splits:
    """Each garment over one level of grey of its own, 0 to 255, the same one whenever it is read."""
    return Splits(*(_placed(images, None) for images in (splits.train, splits.validation, splits.test)))


def _placed(data: Images, photographs: Tensor | None) -> Images:
    noise = Noise(pixel_keys(data.images))
    if photographs is None:
        backgrounds = noise.integers(256, 1, 1, 1).to(torch.uint8).expand(-1, 3, -1, -1)
    else:
        backgrounds = patches(photographs, noise)
    return Images(over(backgrounds, data.images), data.labels)


@lru_cache(maxsize=1)
def _photographs(root: Path) -> tuple[Images, ...]:
    return PHOTOGRAPHS.read(root)
