"""Noise in the format of CIFAR-10, which a test run cannot download."""

import io
import tarfile
from pathlib import Path

import numpy as np

ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
BATCHES = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
_MEMBERS = [3, None, 5, 2, None, 1, 4, 0]  # the order of the true archive; None is another file


def images(batch: str) -> np.ndarray:
    """Images of a batch, ``[10000, channel, row, column]``, each channel as bright as no other."""
    generator = np.random.default_rng(BATCHES.index(batch))
    drawn = generator.integers(0, 256, (10_000, 3, 32, 32), dtype=np.uint8)
    return drawn % np.array([[[128]], [[192]], [[255]]], dtype=np.uint8)


def labels(batch: str) -> list[int]:
    return np.random.default_rng(100 + BATCHES.index(batch)).integers(0, 10, 10_000).tolist()


def content(batch: str) -> bytes:
    return pickled(images(batch).reshape(10_000, 3072), labels(batch))


def pickled(data: np.ndarray, numbers: list[int]) -> bytes:
    """A batch as Python 2 pickles it: strings are bytes, and a numpy module has its old name."""
    shape = [b"M" + size.to_bytes(2, "little") for size in data.shape]
    parts = [
        *(b"\x80\x02}(", _string(b"batch_label"), _string(b"training batch 1 of 5")),
        *(_string(b"labels"), b"](", *(b"K" + bytes([number]) for number in numbers), b"e"),
        *(_string(b"data"), b"cnumpy.core.multiarray\n_reconstruct\n"),
        *(b"cnumpy\nndarray\n", b"K\x00\x85", _string(b"b"), b"\x87R"),
        *(b"(K\x01", *shape, b"\x86"),
        *(b"cnumpy\ndtype\n", _string(data.dtype.str[1:].encode()), b"K\x00K\x01\x87R"),
        *(b"(K\x03", _string(data.dtype.str[:1].encode()), b"NNN"),
        *(b"J\xff\xff\xff\xff" * 2, b"K\x00tb"),
        *(b"\x89T", data.nbytes.to_bytes(4, "little"), data.tobytes(), b"tb"),
        *(_string(b"filenames"), b"](", _string(b"a.png") * len(numbers), b"e", b"u."),
    ]
    return b"".join(parts)


def _string(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text


def unpacked(root: Path) -> Path:
    """Write the batches below ``root``."""
    (root / FOLDER).mkdir(parents=True)
    for batch in BATCHES:
        (root / FOLDER / batch).write_bytes(content(batch))
    return root


def pack(folder: Path, archive: Path) -> None:
    """Write the batches of a folder into an archive, not compressed: noise cannot be."""
    with tarfile.open(archive, "w:gz", compresslevel=0) as packed:
        for number in _MEMBERS:
            name = "readme.html" if number is None else BATCHES[number]
            if number is None:
                packed.addfile(tarfile.TarInfo(f"{FOLDER}/{name}"), io.BytesIO())
            elif (folder / name).exists():
                packed.add((folder / name).resolve(), f"{FOLDER}/{name}")
