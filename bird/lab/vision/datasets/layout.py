"""Descriptions of data sets on disk: their files, how they are found and read, and errors if they are missing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from ..data import Images, Splits

Counts: TypeAlias = tuple[int, ...]
Reader: TypeAlias = Callable[[list[Path], Counts], tuple[Images, ...]]


def files_fingerprint(files: Iterable[tuple[str, Path]]) -> str:
    """A hash of files' names, sizes and modification times, sixteen hexadecimal digits."""
    digest = hashlib.sha256()
    for name, path in files:
        status = path.stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def require_file(path: Path) -> Path:
    """The same path, or a ValueError unless it is a regular file: opening a pipe would block."""
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    return path


@dataclass(frozen=True)
class FileLayout:
    """One way in which a data set may be stored on disk.

    Args:
        folder: relative to the root, or absolute.
        files: names of files and folders in it, all of them required.
        read: from their paths and the official numbers of images to the sets of images.
        suffixes: alternatives that may be appended to a file's name.
    """

    folder: str
    files: tuple[str, ...]
    read: Reader
    suffixes: tuple[str, ...] = ("",)

    def find(self, root: Path) -> list[Path | None]:
        """The path of each file, None for those that are missing."""
        choices = [[root / self.folder / (file + suffix) for suffix in self.suffixes] for file in self.files]
        return [next((path for path in paths if path.exists()), None) for paths in choices]

    def describe(self, root: Path) -> str:
        """A text: which files are expected where, and which of them are missing."""
        missing = [file for file, path in zip(self.files, self.find(root), strict=True) if path is None]
        names = ", ".join(self.files)
        if len(self.files) > 6:
            names = f"{self.files[0]}, {self.files[1]}, ..., {self.files[-1]} ({len(self.files)} in all)"
        names += "".join(f", each with or without {suffix}" for suffix in self.suffixes if suffix)
        which = "all of them" if len(missing) == len(self.files) else ", ".join(missing) or "nothing"
        return f"{root / self.folder}: {names} (missing: {which})"


@dataclass(frozen=True)
class Dataset:
    """Description of a data set.

    Args:
        title: its display name.
        classes: their number; None if it follows from the folders.
        channels: 3 or 1.
        counts: official numbers of training and of test images, which are checked; 0 accepts any number.
        layouts: the first one that is complete is read.
        source: a text: where to get it, and its licence.
        needs: another data set whose files must be there too.
        finish: makes the pictures from what was read, once it is split; gets the root, too. None: they are what was
            read.
    """

    title: str
    classes: int | None
    channels: int
    counts: Counts
    layouts: tuple[FileLayout, ...]
    source: str
    needs: Dataset | None = None
    finish: Callable[[Splits, Path], Splits] | None = field(default=None, repr=False)

    def describe(self, root: Path) -> str:
        """A text: which files are expected where, which of them are missing, and where to get them."""
        places = [f"\n  {layout.describe(root)}" for layout in self.layouts]
        return f"{self.title} is read from{' one of' if len(places) > 1 else ''}:{''.join(places)}\n{self.source}"

    def read(self, root: Path) -> tuple[Images, ...]:
        """Read the training and the test images.

        Raises:
            FileNotFoundError: no layout is complete; says what is missing, and where to get it.
            ValueError: a file is damaged or of another format, or images are missing.
        """
        layout, paths = self.locate(root)
        try:
            sets = layout.read(paths, self.counts)
            self._check(sets)
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.title} is broken: {error}\n{self.describe(root)}") from error
        return sets

    def locate(self, root: Path) -> tuple[FileLayout, list[Path]]:
        """The first layout that is complete, and the paths of its files.

        Raises:
            FileNotFoundError: none is complete, or none of ``needs``; says what is missing, and where to get it.
        """
        if self.needs is not None:
            self.needs.locate(root)
        for layout in self.layouts:
            found = layout.find(root)
            paths = [path for path in found if path is not None]
            if len(paths) == len(found):
                return layout, paths
        raise FileNotFoundError(
            f"{self.title} is not complete below {root} (--data or root=, or the environment variable BIRD_DATA)\n"
            + self.describe(root)
        )

    def fingerprint(self, root: Path) -> str | None:
        """To tell different images of this name apart; raises as `locate`.

        None, whether they are there or not, if the official numbers of images are checked; also without files.
        """
        if any(self.counts):
            return None
        _, paths = self.locate(root)
        files = [(folder, path) for folder in paths for path in sorted(folder.rglob("*")) if path.is_file()]
        named = ((f"{folder.name}/{path.relative_to(folder)}", path) for folder, path in files)
        return files_fingerprint(named) if paths else None

    def _check(self, sets: tuple[Images, ...]) -> None:
        found = [len(images) for images in sets]
        if 0 in found or any(count not in (0, n) for n, count in zip(found, self.counts, strict=True)):
            official = " + ".join(str(count) for count in self.counts)
            raise ValueError(f"{' + '.join(map(str, found))} images instead of {official}")
        for images in sets:
            low, high = int(images.labels.min()), int(images.labels.max())
            if low < 0 or (self.classes is not None and high >= self.classes):
                raise ValueError(f"labels from {low} to {high}, of {self.classes} classes")
