"""Batches of images from pickles: what a hostile or damaged file may do, which is nothing but be refused."""

from __future__ import annotations

import io
import os
import pickle
import resource
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bird.lab.vision.datasets.batches import read_dicts
from bird.lab.vision.datasets.unpickling import load_batch
from tests.bird import official_files as official
from tests.bird.damage import mutated

MEMORY, SECONDS = 1 << 30, 100  # of a child with NumPy and PyTorch imported; the attacks took 6 GB, or for ever

# Reads each file of a folder and prints how many were read, and how many refused by a ValueError that names the file.
CHILD = """
import sys
from pathlib import Path
from bird.lab.vision.datasets.batches import read_dicts
from bird.lab.vision.datasets.unpickling import load_batch
read = refused = 0
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        content = load_batch(path)
        if "data" in content:
            bytes(memoryview(content["data"])) if hasattr(content["data"], "dtype") else None
        if "labels" in content:
            read_dicts([path], (1, 1))
        read += 1
    except ValueError as error:
        assert str(path) in str(error)
        refused += 1
print(read, refused)
"""


def read_in_child(folder: Path) -> tuple[int, int]:
    """Files of a folder that are read and that are refused, by a process that a fault would end."""

    def limit() -> None:
        used = 3 << 30  # address space, not memory: libraries map more than they use
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))

    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)],
        capture_output=True, text=True, timeout=SECONDS, preexec_fn=limit, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]  # a signal is a negative one
    read, refused = done.stdout.split()
    return int(read), int(refused)


def array_pickle(code: bytes, state: bytes, shape: bytes, raw: bytes) -> bytes:
    """{"data": an array} in protocol 0, with what is to be said of its type, shape and bytes."""
    return (
        b"(dS'data'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n" + shape
        + b"cnumpy\ndtype\n(S'" + code + b"'\nI0\nI1\ntR" + state + b"bI00\nS'" + raw + b"'\ntbs."
    )  # fmt: skip


SIMPLE = b"(I3\nS'|'\nNNNI-1\nI-1\nI0\nt"
TWICE = b"".join(b"q%ch%c\x86" % (level, level) for level in range(60))
LISTS = b"(" * 60 + b"]" + b"".join(b"q%ch%cl" % (level, level) for level in range(60))
TEXT = b"X" + (2 << 20).to_bytes(4, "little") + b"x" * (2 << 20) + b"q\x00U\x06latin1q\x02"
RAW = (
    b"cnumpy.core.multiarray\n_reconstruct\n)R(I1\n(I2097152\ntcnumpy\ndtype\nU\x02u1\x85R" + SIMPLE + b"bI00\nh\x00tb"
)
ATTACKS = {
    # A type of objects turns bytes into addresses; a type's state may give it any size; a shape may not fit its bytes.
    "objects": (array_pickle(b"O8", SIMPLE, b"(I1\nt", b"AAAAAAAA"), "'O8'"),
    "size in the state": (array_pickle(b"u1", b"(I3\nS'|'\nNNNI1000000\nI8\nI0\nt", b"(I2\nt", b"AA"), None),
    "fields in the state": (array_pickle(b"V8", SIMPLE, b"(I1\nt", b"AAAAAAAA"), "'V8'"),
    "shape": (array_pickle(b"u1", SIMPLE, b"(I1000\nt", b"AA"), r"\[1000\] of u1 has 2 bytes"),
    "negative shape": (array_pickle(b"u1", SIMPLE, b"(I-2\nt", b"AA"), "of the shape"),
    "vast shape": (array_pickle(b"u1", SIMPLE, b"(I65536\nI65536\nI65536\nI65536\nt", b""), "is damaged"),
    "no bytes": (array_pickle(b"u1", SIMPLE, b"(I1\nt", b"A").replace(b"S'A'", b"I5"), "a int where a bytes"),
    # 13 bytes that reserve 6 GB in Python's own unpickler.
    "memo": (b"\x80\x02}r\xff\xff\xff\x2fNNNNs.", "damaged|key|more|pop"),
    # Tuples of the same tuple twice, 60 levels: 2^60 steps to hash.
    "hash": (b"}(I1\nI1\n\x86" + b"2\x86" * 60 + b"I1\nu.", "DUP"),
    "hash by memo": (b"}(I1\nI1\n\x86" + TWICE + b"I1\nu.", "a tuple, and must be text"),
    "deep": (b"(d" + b"S'a'\n" + b"(l" * 200_000 + b"a" * 199_999 + b"s.", None),
    "calls the array type": (b"cnumpy\nndarray\n(I9\ntR.", "calls numpy.ndarray"),
    # Lists of the same list twice: 2^60 values, or without end.
    "labels of themselves": (b"\x80\x02}(U\x04dataU\x00U\x06labels]q\x00(h\x00h\x00eu.", "a list of integers"),
    "labels of lists": (b"}(U\x04dataNU\x06labels" + LISTS + b"u.", '"labels" must be a list of integers'),
    "data of themselves": (b"}(U\x06labels](K\x00eU\x04data]q\x00(h\x00h\x00eu.", "found list"),
    "data of lists": (b"}(U\x06labels](K\x00eU\x04data" + LISTS + b"u.", "found list"),
    "shape of lists": (array_pickle(b"u1", SIMPLE, LISTS + b"\x85", b"A"), "a list where a int"),
    "order of lists": (array_pickle(b"u1", b"(I3\n" + LISTS + b"t", b"(I1\nt", b"A"), "a list where a str"),
    "encoding of lists": (b"c_codecs\nencode\nU\x01a" + LISTS + b"\x86R.", "a list where a str"),
    # One text of 2 MB, 2,500 times: 5 GB.
    "bytes": (b"}(U\x04data](" + TEXT + b"c_codecs\nencode\nq\x01h\x00h\x02\x86R" * 2500 + b"eu.", "more bytes than"),
    "raw bytes": (b"}(U\x04data](" + TEXT + RAW * 2500 + b"eu.", "more bytes than"),
    "huge text": (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.", "but only 1 remain"),
}  # fmt: skip


def test_attacks_are_refused(tmp_path: Path) -> None:
    for name, (content, _) in ATTACKS.items():
        (tmp_path / name).write_bytes(content)
    harmless = [name for name, (_, words) in ATTACKS.items() if words is None]
    assert read_in_child(tmp_path) == (len(harmless), len(ATTACKS) - len(harmless))  # before any is read here
    for name, (_, words) in ATTACKS.items():
        if words is not None:
            with pytest.raises(ValueError, match=words):
                read_dicts([tmp_path / name], (1, 1))


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "data_batch_1"
    calls = [(os.system, f"touch {mark}"), (eval, f"open({str(mark)!r}, 'w').close()"), (os.mkdir, str(mark))]
    for protocol in (0, 2, 4, 5):
        for function, argument in calls:
            path.write_bytes(pickle.dumps({"data": Call(function, argument)}, protocol=protocol))
            asked = rf"{function.__module__}|__builtin__"  # the builtins' name in the older protocols
            with pytest.raises(ValueError, match=rf"data_batch_1: it asks for ({asked})\.{function.__name__}"):
                load_batch(path)
            assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists(), "the pickle would not have done anything"


def test_only_what_rebuilds_an_array_is_admitted(tmp_path: Path) -> None:
    path = tmp_path / "test_batch"
    for text, refusal in (
        (b"cnumpy\nload\n.", "numpy.load"),
        (b"cnumpy.core.multiarray\nscalar\n.", r"multiarray\.scalar"),
        (b"cnumpy\nndarray.tofile\n.", r"ndarray\.tofile"),
        (b"c_codecs\ndecode\n.", r"_codecs\.decode"),
        (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", "rot13"),
        (b"", "test_batch: "),
        (b"(lp0\n.", "a pickled list, not a dict"),
    ):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=refusal):
            load_batch(path)


def test_too_many_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte is an instruction, and makes an object of 56: a file of 2 GB would take 100."""
    monkeypatch.setattr("bird.lab.vision.datasets.unpickling.MOST_INSTRUCTIONS", 1000)
    path = tmp_path / "data_batch_1"
    path.write_bytes(b"]" * 2000 + b".")
    with pytest.raises(ValueError, match="more than 1000 instructions"):
        load_batch(path)


def test_a_vast_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1"
    with path.open("wb") as file:
        file.truncate(3 << 30)  # takes no room on the disk
    with pytest.raises(ValueError, match="at most 2147483648"):
        load_batch(path)


def test_an_archive_is_no_larger_than_a_batch_and_holds_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 MB of zeros takes 1 kB of a compressed archive; a header of 128 bytes may say 4 GiB."""
    path = tmp_path / "train_data_batch_1.npz"
    np.savez_compressed(path, data=np.zeros((340, 3072), np.uint8), labels=np.zeros(340, int))
    read_dicts([path], (340, 340))
    with monkeypatch.context() as patch:
        patch.setattr("bird.lab.vision.datasets.batches.LARGEST_FILE", 1_000_000)
        with pytest.raises(ValueError, match=r"batch_1\.npz: 10474\d\d bytes are in it; .* at most 1000000"):
            read_dicts([path], (340, 340))
    header = io.BytesIO()
    told = {"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 1 << 12)}
    np.lib.format.write_array_header_1_0(header, told)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.npy", header.getvalue())
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"data\.npy: the header says uint8 \[1048576, 4096\], and 128 bytes"):
        read_dicts([path], (1, 1))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_damaged_files_end_in_one_kind_of_error(tmp_path: Path) -> None:
    """1,200 changes of whole files: bytes overwritten, taken out, doubled, the end cut off."""
    rows = np.arange(4 * 12, dtype=np.uint8).reshape(4, 12)
    whole = [official.python2_pickle({"data": rows, "labels": [0, 1, 2, 3]})]
    whole += [
        pickle.dumps({"data": rows, "labels": [0, 1, 2, 3], "names": ["a", "b"]}, protocol) for protocol in (0, 2, 4)
    ]
    for number in range(1200):
        content = mutated(whole[number % len(whole)], number // len(whole))
        (tmp_path / f"{number:04}").write_bytes(content)
    read, refused = read_in_child(tmp_path)
    assert read + refused == 1200
    assert refused > 400  # the changes do reach what is checked; others hit the pixels
