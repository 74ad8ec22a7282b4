"""Images to train hosts on, in three splits that never mix: training, validation, test.

Axes: ``I`` image. Rewards and observations come from the validation split; the test split is for
reports alone. Images are channels last, with mean 0 and deviation 1 over the training split.
"""

import io
import pickle
import tarfile
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from esper_lightning.core.shapes import Float, Int
from esper_lightning.core.validate import require
from esper_lightning.envs.morphogenesis.streams import Place, Purpose, integers, normals

__all__ = ["IMAGE", "Dataset", "Split", "Splits", "load"]

Dataset = Literal["digits", "cifar10", "synthetic"]
IMAGE: dict[str, tuple[int, int]] = {"digits": (1, 8), "cifar10": (3, 32)}
"""Channels and side."""

_CIFAR_FOLDER = "cifar-10-batches-py"
_CIFAR_ARCHIVE = "cifar-10-python.tar.gz"
_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
_SPLIT_SEED = 20  # of what is fixed for every run: splits, templates, noise


class Split(NamedTuple):
    """Images of one use."""

    image: Float[Tensor, "I H W C"]
    label: Int[Tensor, " I"]


class Splits(NamedTuple):
    """All images."""

    training: Split
    validation: Split
    test: Split


def load(
    dataset: Dataset,
    *,
    folder: str | None,
    image: tuple[int, int],
    classes: int,
    noise: float,
    device: torch.device,
) -> Splits:
    """Read or make a data set.

    Args:
        dataset: Which.
        folder: Where ``cifar10`` is.
        image: Channels and side, of ``synthetic``.
        classes: Number of classes, of ``synthetic``.
        noise: Deviation of what is added to every image once, in units of the images' deviation.
        device: Where it will live.

    Raises:
        ValueError: If the data set, or what reads it, is not there.
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
        scaled = (pixels - mean) / deviation
        if noise > 0:
            scaled = (scaled + noise * _noise(number, scaled.shape)) / (1 + noise**2) ** 0.5
        finished.append(Split(scaled.to(device), label.to(device)))
    return Splits(*finished)


def _digits() -> Splits:
    """1,797 images of 8x8 pixels: 897, 400 and 500 of them."""
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
    """A template for each class under as much noise: 2,048, 512 and 512 images."""
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
    place = Place(*(torch.full((1,), value) for value in (number, 0, 0)))
    drawn = normals(_SPLIT_SEED, Purpose.DATA, place, count=shape.numel())
    return drawn.float().view(shape)


def _cifar10(folder: str | None) -> Splits:
    """60,000 images of 32x32 pixels: 45,000, 5,000 and, as published, 10,000 of them."""
    training = [_cifar_batch(folder, f"data_batch_{number}") for number in range(1, 6)]
    image = torch.cat([batch.image for batch in training])
    label = torch.cat([batch.label for batch in training])
    first, last = slice(0, 45_000), slice(45_000, None)
    return Splits(
        Split(image[first], label[first]),
        Split(image[last], label[last]),
        _cifar_batch(folder, "test_batch"),
    )


def _cifar_batch(folder: str | None, name: str) -> Split:
    hint = (
        f"Download {_CIFAR_URL} and name the folder that holds {_CIFAR_ARCHIVE}, or the "
        f"{_CIFAR_FOLDER} unpacked from it."
    )
    require(folder is not None, "Morphogenesis.folder", "be given for 'cifar10'", folder, hint)
    assert folder is not None
    root = Path(folder).expanduser()
    for place in (root / _CIFAR_FOLDER / name, root / name):
        if place.is_file():
            return _cifar_split(place.read_bytes())
    archive = root / _CIFAR_ARCHIVE
    require(archive.is_file(), "Morphogenesis.folder", "hold CIFAR-10", folder, hint)
    with tarfile.open(archive) as packed:
        member = packed.extractfile(f"{_CIFAR_FOLDER}/{name}")
        assert member is not None
        return _cifar_split(member.read())


def _cifar_split(content: bytes) -> Split:
    batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    image = torch.from_numpy(batch[b"data"]).view(-1, 3, 32, 32).permute(0, 2, 3, 1)
    return Split(image.float().contiguous(), torch.tensor(batch[b"labels"]))


class _ArrayUnpickler(pickle.Unpickler):
    """Arrays and nothing else: a pickle from the net may run anything."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Refuse what the archive has no need of."""
        allowed = {"_reconstruct": "numpy._core.multiarray", "ndarray": "numpy", "dtype": "numpy"}
        if not module_name.startswith("numpy") or global_name not in allowed:
            raise pickle.UnpicklingError(f"CIFAR-10 does not hold {module_name}.{global_name}")
        return getattr(import_module(allowed[global_name]), global_name)
