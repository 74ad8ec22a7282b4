"""CIFAR-10 is read from a folder or an archive, and broken files are refused."""

import gzip
import os
import pickle
import re

import numpy as np
import pytest
import torch

from esper_lightning.envs.morphogenesis import Morphogenesis
from esper_lightning.envs.morphogenesis.data import Splits, load
from tests.envs.morphogenesis import cifar10
from tests.envs.morphogenesis.cifar10 import ARCHIVE, BATCHES, FOLDER

CPU = torch.device("cpu")
WHAT_TO_DO = (
    r"Download https://www\.cs\.toronto\.edu/~kriz/cifar-10-python\.tar\.gz and name the folder "
    r"that holds cifar-10-python\.tar\.gz, or the cifar-10-batches-py unpacked from it\.$"
)


def read(folder) -> Splits:
    settings = {"image": (3, 32), "classes": 10, "noise": 0.0, "device": CPU}
    return load("cifar10", folder=str(folder), **settings)


@pytest.fixture(scope="module")
def packed(cifar10_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    cifar10.pack(cifar10_folder / FOLDER, folder / ARCHIVE)
    return folder


@pytest.fixture(scope="module")
def written():
    return np.concatenate([cifar10.images(batch) for batch in BATCHES])


@pytest.fixture
def mine(cifar10_folder, tmp_path):
    """A copy of the batches, in which a test may replace some."""
    (tmp_path / FOLDER).mkdir()
    for batch in BATCHES:
        (tmp_path / FOLDER / batch).symlink_to(cifar10_folder / FOLDER / batch)
    return tmp_path


def replace(root, batch, content) -> None:
    path = root / FOLDER / batch
    path.unlink()
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("place", ["packed", "the batches' own folder", "unpacked"])
def test_images_and_labels_equal_those_that_were_written(cifar10_folder, packed, written, place):
    places = {"packed": packed, "unpacked": cifar10_folder}
    splits = read(places.get(place, cifar10_folder / FOLDER))
    label = [number for batch in BATCHES for number in cifar10.labels(batch)]
    assert torch.cat([split.label for split in splits]).tolist() == label
    assert [len(split.image) for split in splits] == [45_000, 5_000, 10_000]
    assert all(split.image.is_contiguous() for split in splits)
    found = torch.cat([split.image[::50] for split in splits]).double().numpy()
    for channel in range(3):
        pixels, value = written[:, channel], np.arange(256)
        count = np.bincount(pixels[:45_000].ravel(), minlength=256)
        mean = (count * value).sum() / count.sum()
        variance = (count * (value - mean) ** 2).sum() / (count.sum() - 1)
        expected = (pixels[::50] - mean) / variance**0.5
        np.testing.assert_allclose(found[..., channel], expected, rtol=1e-5, atol=1e-5)


def test_a_second_read_shares_the_tensors(cifar10_folder):
    first, again = read(cifar10_folder), read(cifar10_folder)
    assert first.training.image.data_ptr() == again.training.image.data_ptr()


def test_hosts_learn_from_cifar10(cifar10_folder):
    spec = Morphogenesis.cifar10(str(cifar10_folder), num_envs=2, train_batches=2, batch_size=8)
    env = spec.build(CPU, 0)
    assert env.host_parameters == 6418
    before = env.hosts.weights.host.clone()
    result = env.step(torch.tensor([[0, 0, 0, 0], [1, 2, 3, 0]]))
    assert result.obs.isfinite().all()
    assert (env.hosts.weights.host != before).any(1).all()


# --- what is refused ---


def refuses(folder, message) -> None:
    with pytest.raises(ValueError, match=f"{message}.*{WHAT_TO_DO}"):
        Morphogenesis(dataset="cifar10", folder=folder, num_envs=1).build(CPU, 0)


def test_a_folder_must_be_given():
    refuses(None, r"^Morphogenesis\.folder must be given for 'cifar10', got None\.")


@pytest.mark.parametrize("name", ["nowhere", "empty", "a_file"])
def test_a_folder_without_the_data_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").write_text("")
    place = str(tmp_path / name)
    refuses(place, rf"^Morphogenesis\.folder must hold CIFAR-10, got '{re.escape(place)}'\.")


class _Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def _batch(rows=10_000, columns=3072, dtype=np.uint8, labels=(0,) * 10_000) -> bytes:
    return cifar10.pickled(np.zeros((rows, columns), dtype), list(labels))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a pickled dict .*got EOFError"),
        (b"<html>Not found</html>", "must be a pickled dict .*got UnpicklingError"),
        (_batch()[:1_000_000], "must be a pickled dict .*got UnpicklingError"),
        (pickle.dumps([1, 2], 2), "must be a pickled dict .*got TypeError"),
        (pickle.dumps({"data": 1}, 2), "must be a pickled dict .*got KeyError"),
        (_batch(rows=9_999), r"must have data of 10,000 rows .*got \(torch.uint8, \(9999, 3072\)"),
        (_batch(columns=1024), r"must have data of .* bytes, got \(torch.uint8, \(10000, 1024\)"),
        (_batch(dtype=np.int16), r"must have data of .* bytes, got \(torch.int16"),
        (_batch(labels=[0] * 9), r"must have 10,000 integers as labels, got \(torch.int64, \(9,\)"),
        (_batch(labels=[0] * 9_999 + [10]), r"must have labels in \[0, 9\], got \(0, 10\)"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_broken_batch_is_named(mine, content, message):
    replace(mine, "data_batch_3", content)
    refuses(str(mine), f"^{re.escape(str(mine / FOLDER / 'data_batch_3'))} {message}")


def test_a_pickle_that_would_run_code_is_refused(mine, tmp_path):
    harm = tmp_path / "harm"
    replace(mine, "test_batch", pickle.dumps({1: _Malicious(harm)}, 2))
    refuses(str(mine), r"test_batch must be a pickled dict .*does not hold posix\.system")
    assert not harm.exists()


def test_a_missing_batch_is_named(mine):
    replace(mine, "data_batch_2", None)
    batches = [batch for batch in BATCHES if batch != "data_batch_2"]
    message = rf"{FOLDER} must hold all of .*'data_batch_2'.*, got {re.escape(str(batches))}\."
    refuses(str(mine), message)
    (mine / FOLDER).rename(mine / "elsewhere")
    cifar10.pack(mine / "elsewhere", mine / ARCHIVE)
    refuses(str(mine), message.replace(FOLDER, re.escape(ARCHIVE)))


@pytest.mark.parametrize("broken", ["cut", "cut at its start", "of other bytes", "not packed"])
def test_a_broken_archive_is_named(packed, tmp_path, broken):
    path = tmp_path / ARCHIVE
    if broken == "of other bytes":
        whole = gzip.compress(b"abc" * 1_000_000)
        path.write_bytes(whole[: len(whole) // 2] + b"\xff" * 1000)
    else:
        whole = (packed / ARCHIVE).read_bytes()
        cut = {"cut": len(whole) // 2, "cut at its start": 100, "not packed": 0}[broken]
        path.write_bytes(whole[:cut])
    refuses(str(tmp_path), f"^{re.escape(str(path))} must be an unbroken archive, got .*Error")
