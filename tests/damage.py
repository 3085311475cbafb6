"""Every way in which a checkpoint file was found damaged, or may be."""

import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

Damage = Callable[[Path], None]


def _cut(share: float, bytes_: int = 0) -> Damage:
    def cut(path: Path) -> None:
        os.truncate(path, int(path.stat().st_size * share) + bytes_)

    return cut


def _overwrite(start: Callable[[Path], int], content: bytes) -> Damage:
    def overwrite(path: Path) -> None:
        with open(path, "r+b") as file:
            file.seek(start(path))
            file.write(content[: path.stat().st_size - file.tell()])

    return overwrite


def record(path: Path, part: str = "/data/") -> zipfile.ZipInfo:
    """The longest record in whose name this is: by default, one of weights."""
    with zipfile.ZipFile(path) as archive:
        return max((one for one in archive.infolist() if part in one.filename), key=lambda one: one.file_size)


def content_of(path: Path, one: zipfile.ZipInfo) -> int:
    """Where the content of a record begins."""
    with open(path, "rb") as file:
        file.seek(one.header_offset + 26)
        name, extra = file.read(2), file.read(2)
    return one.header_offset + 30 + int.from_bytes(name, "little") + int.from_bytes(extra, "little")


def directory_of(path: Path) -> int:
    """Where the table of contents begins."""
    with zipfile.ZipFile(path) as archive:
        return archive.start_dir


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def _flip_in(part: str, seed: int) -> Damage:
    def flip_one(path: Path) -> None:
        one = record(path, part)
        flip(path, 8 * content_of(path, one) + random.Random(seed).randrange(8 * one.file_size))

    return flip_one


def _replace(content: bytes) -> Damage:
    return lambda path: path.write_bytes(content) and None


def _save(value: object, zipped: bool = True) -> Damage:
    return lambda path: torch.save(value, path, _use_new_zipfile_serialization=zipped)


def _other_archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/readme.txt", "no weights")


DAMAGES: dict[str, Damage] = {
    "empty": _cut(0),
    "one byte": _cut(0, 1),
    "a hundred bytes": _cut(0, 100),
    "a quarter": _cut(0.25),
    "half": _cut(0.5),
    "nine tenths": _cut(0.9),
    "the end of the directory missing": _cut(1, -22),
    "the last byte missing": _cut(1, -1),
    "zeros only": lambda path: path.write_bytes(bytes(path.stat().st_size)) and None,
    "zeros at the beginning": _overwrite(lambda path: 0, bytes(512)),
    "zeros in weights": _overwrite(lambda path: content_of(path, record(path)) + 64, bytes(64)),
    "zeros in the middle": _overwrite(lambda path: path.stat().st_size // 2, bytes(4096)),
    "zeros at the end": _overwrite(lambda path: path.stat().st_size - 512, bytes(512)),
    "zeros in the directory": _overwrite(lambda path: directory_of(path) + 40, bytes(64)),
    "a flipped bit of the weights": _flip_in("/data/", 0),
    "another flipped bit of the weights": _flip_in("/data/", 1),
    "a flipped bit of the pickle": _flip_in("data.pkl", 2),
    "another flipped bit of the pickle": _flip_in("data.pkl", 3),
    "a flipped bit of the first byte": lambda path: flip(path, 3),
    "a flipped bit of a checksum": lambda path: flip(path, 8 * directory_of(path) + 8 * 17),
    "a text": _replace(b"quota exceeded\n"),
    "a pointer of Git LFS": _replace(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "an old pickle": _save({"cfg": None, "model": {}}, zipped=False),
    "a list": _save([1, 2, 3]),
    "another archive": _other_archive,
}
