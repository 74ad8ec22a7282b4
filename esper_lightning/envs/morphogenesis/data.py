"""Images to train hosts on, in three splits that never mix: training, validation, test.

Axes: ``I`` image. Rewards and observations come from the validation split; the test split is for
evaluations alone. Images are channels last, with mean 0 and deviation 1 over the training split.
"""

import io
import pickle
import tarfile
import zlib
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from esper_lightning.core.errors import require
from esper_lightning.core.shapes import Float, Int
from esper_lightning.envs.morphogenesis.streams import Place, Purpose, integers, normals

__all__ = ["CIFAR_HINT", "IMAGE", "Dataset", "Split", "Splits", "load"]

Dataset = Literal["digits", "cifar10", "synthetic"]
IMAGE: dict[str, tuple[int, int]] = {"digits": (1, 8), "cifar10": (3, 32)}
"""Channels and side of the images of a data set."""

_CIFAR_FOLDER = "cifar-10-batches-py"
_CIFAR_ARCHIVE = "cifar-10-python.tar.gz"
_CIFAR_BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
CIFAR_HINT = (
    f"Download https://www.cs.toronto.edu/~kriz/{_CIFAR_ARCHIVE} and name the folder that holds "
    f"{_CIFAR_ARCHIVE}, or the {_CIFAR_FOLDER} unpacked from it."
)
_SPLIT_SEED = 20  # of everything that is the same for every run: splits, templates, noise


class Split(NamedTuple):
    """Images and labels of one use."""

    image: Float[Tensor, "I H W C"]
    label: Int[Tensor, " I"]


class Splits(NamedTuple):
    """Images of all three uses."""

    training: Split
    validation: Split
    test: Split


@lru_cache(maxsize=1)  # training, evaluations and early checks share the tensors
def load(
    dataset: Dataset,
    *,
    folder: str | None,
    image: tuple[int, int],
    classes: int,
    noise: float,
    device: torch.device,
) -> Splits:
    """Read or generate a data set; a second call for the same data set shares its tensors.

    Args:
        dataset: Name of the data set.
        folder: Folder that holds ``cifar10``.
        image: Channels and side of the images of ``synthetic``.
        classes: Number of classes of ``synthetic``.
        noise: Deviation of the noise that is added to every image once, in units of the images'
            deviation.
        device: Device of the images.

    Raises:
        ValueError: If the data set, or the library that reads it, is missing or broken.
    """
    if dataset == "digits":
        splits = _digits()
    elif dataset == "cifar10":
        splits = _cifar10(folder)
    else:
        splits = _synthetic(image, classes)
    mean = splits.training.image.mean((0, 1, 2))
    deviation = splits.training.image.std((0, 1, 2))
    finished: list[Split] = []
    for number, (pixels, label) in enumerate(splits):
        scaled = (pixels - mean).div_(deviation)
        if noise > 0:
            scaled = (scaled + noise * _noise(number, scaled.shape)) / (1 + noise**2) ** 0.5
        finished.append(Split(scaled.to(device), label.to(device)))
    return Splits(*finished)


def _digits() -> Splits:
    """1,797 images of 8x8 pixels, in splits of 897, 400 and 500 images."""
    try:
        datasets: Any = import_module("sklearn.datasets")
    except ModuleNotFoundError:
        hint = "Install the extra: pip install 'esper_lightning[morphogenesis]'."
        rule = "be one that is there: 'digits' comes with scikit-learn, which is not installed"
        require(False, "Morphogenesis.dataset", rule, "digits", hint)
        raise
    found = datasets.load_digits()
    image = torch.from_numpy(found.images).float().unsqueeze(3)
    label = torch.from_numpy(found.target).long()
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    cuts = [897, 400, 500]
    return Splits(
        *(Split(image[rows], label[rows]) for rows in cast(tuple[Tensor, ...], order.split(cuts)))
    )


def _synthetic(image: tuple[int, int], classes: int) -> Splits:
    """A template for each class under noise of the same deviation: 2,048, 512 and 512 images."""
    channels, side = image
    template = _noise(16, torch.Size((classes, side, side, channels)))
    sizes = (2048, 512, 512)
    splits: list[Split] = []
    for number, size in enumerate(sizes):
        place = Place(*(torch.full((1,), value) for value in (number, 0, 1)))
        label = integers(_SPLIT_SEED, Purpose.DATA, place, count=size, high=classes)[0]
        pixels = template[label] + _noise(17 + number, torch.Size((size, side, side, channels)))
        splits.append(Split(pixels, label))
    return Splits(*splits)


def _noise(number: int, shape: torch.Size) -> Tensor:
    drawn: list[Tensor] = []
    for start in range(0, shape[0], 4096):  # sampling takes many times the memory of the samples
        some = torch.Size((min(4096, shape[0] - start), *shape[1:]))
        place = Place(*(torch.full((1,), value) for value in (number, start, 0)))
        values = normals(_SPLIT_SEED, Purpose.DATA, place, count=some.numel())
        drawn.append(values.float().view(some))
    return torch.cat(drawn)


def _cifar10(folder: str | None) -> Splits:
    """60,000 images of 32x32 pixels: 45,000, 5,000 and, as published, 10,000 images."""
    assert folder is not None  # the settings check that
    place, files = _cifar_files(Path(folder).expanduser())
    complete = all(name in files for name in _CIFAR_BATCHES)
    require(complete, str(place), f"hold all of {_CIFAR_BATCHES}", sorted(files), CIFAR_HINT)
    batches = [_cifar_batch(files[name], place / name) for name in _CIFAR_BATCHES]
    pixels, label = (torch.cat(column) for column in zip(*batches, strict=True))
    uses = (slice(0, 45_000), slice(45_000, 50_000), slice(50_000, None))
    return Splits(*(Split(pixels[rows].float(), label[rows]) for rows in uses))


def _cifar_files(root: Path) -> tuple[Path, dict[str, bytes]]:
    """The folder or archive that holds the batches, and the bytes of each batch by name."""
    for place in (root / _CIFAR_FOLDER, root):
        paths = [place / name for name in _CIFAR_BATCHES if (place / name).is_file()]
        if paths:
            return place, {path.name: path.read_bytes() for path in paths}
    archive, files = root / _CIFAR_ARCHIVE, dict[str, bytes]()
    require(archive.is_file(), "Morphogenesis.folder", "hold CIFAR-10", str(root), CIFAR_HINT)
    try:
        with tarfile.open(archive) as packed:
            for member in packed:  # in its own order: going back would unpack from the start
                folder, _, name = member.name.rpartition("/")
                file = packed.extractfile(member) if member.isfile() else None
                if file is not None and folder == _CIFAR_FOLDER and name in _CIFAR_BATCHES:
                    files[name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        require(False, str(archive), "be an unbroken archive", error, CIFAR_HINT)
    return archive, files


def _cifar_batch(content: bytes, path: Path) -> tuple[Tensor, Tensor]:
    """Pixels as bytes, channels last, and labels."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        pixels, label = torch.from_numpy(batch[b"data"]), torch.tensor(batch[b"labels"])
    except Exception as error:  # a file that is no such pickle may raise anything
        rule = "be a pickled dict with an array b'data' and a list b'labels'"
        require(False, str(path), rule, error, CIFAR_HINT)
        raise
    ok = pixels.dtype == torch.uint8 and pixels.shape == (10_000, 3072)
    got = (pixels.dtype, tuple(pixels.shape))
    require(ok, str(path), "have data of 10,000 rows of 3,072 bytes", got, CIFAR_HINT)
    ok = label.dtype == torch.int64 and label.shape == (10_000,)
    got = (label.dtype, tuple(label.shape))
    require(ok, str(path), "have 10,000 integers as labels", got, CIFAR_HINT)
    low, high = label.min().item(), label.max().item()
    require(low >= 0 and high <= 9, str(path), "have labels in [0, 9]", (low, high), CIFAR_HINT)
    return pixels.view(-1, 3, 32, 32).permute(0, 2, 3, 1).contiguous(), label


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays and nothing else, because a pickle from the net may run any code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Refuse every global that the archive does not need."""
        reconstruct = np.empty(0).__reduce__()[0]  # in a module whose name depends on the version
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module_name, global_name) not in allowed:
            raise pickle.UnpicklingError(f"CIFAR-10 does not hold {module_name}.{global_name}")
        return allowed[module_name, global_name]
