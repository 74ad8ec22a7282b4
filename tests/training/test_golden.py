"""Each config trains as it did: an upgrade that changes results is seen.

Under the conditions of the file (version of torch and processor), all numbers of twenty iterations
are the same, bit for bit. Under others the last bits of sums differ, and training multiplies such
differences: only the first iterations are compared, to a stated rounding. The files are written by
``tests/training/golden.py``.
"""

import json
import math
import re

import pytest
import torch

from tests.training.golden import (
    CONFIGS,
    GOLDEN,
    METRICS,
    conditions,
    path_of,
    train,
    versions,
    write,
)

SLOW = ("morphogenesis",)  # 5 s, the others 1 s each
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Iterations that are compared under other conditions. With torch's and MKL's code for processors
# without AVX in place of AVX-512, these and more stay within the rounding. The contacts of a
# half-cheetah multiply the last bits a millionfold within two iterations.
COMPARED = {config: 1 if config == "halfcheetah" else 8 for config in CONFIGS}
RELATIVE, ABSOLUTE = 1e-3, 1e-4  # the latter for losses near zero: advantages are of size 1


def golden_of(device: str) -> dict:
    """The file of the installed torch, or of the newest; skips where the device has none."""
    path = path_of(device)
    if not path.exists():
        of_device = GOLDEN.glob(f"{device}-torch-*.json")
        path = max(
            of_device, key=lambda file: [*map(int, re.findall(r"\d+", file.name))], default=None
        )
    if path is None:
        pytest.skip(
            f"no golden histories of {device}: python -m tests.training.golden --device cuda"
        )
    return json.loads(path.read_text())


def differences(found, expected, *, compared: int | None) -> list[str]:
    """What differs in the first iterations, a line for each number; ``None`` compares every bit."""
    return [
        f"iteration {k + 1}, {name}: {is_} where {was} was"
        for k, (row, old) in enumerate(zip(found, expected, strict=True))
        if compared is None or k < compared
        for name, is_, was in zip(METRICS, row, old, strict=True)
        if is_ != was and (compared is None or None in (is_, was) or not alike(is_, was))
    ]


def alike(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=RELATIVE, abs_tol=ABSOLUTE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "config", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CONFIGS]
)
def test_a_config_trains_as_it_did(config, device, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    golden = golden_of(device)
    history = golden["histories"][config]
    if history["versions"] != versions(config):
        pytest.skip(f"simulated by {history['versions']}, not by {versions(config)}")
    same = golden["conditions"] == conditions(device)
    compared = None if same else COMPARED[config]
    assert differences(train(config, device, tmp_path), history["rows"], compared=compared) == []


def test_a_change_of_the_last_bit_is_found_where_the_conditions_are_the_same():
    rows = next(iter(golden_of("cpu")["histories"].values()))["rows"]
    changed = [*rows[:-1], [math.nextafter(x, math.inf) if x else x for x in rows[-1]]]
    assert differences(rows, rows, compared=None) == []
    assert len(differences(changed, rows, compared=None)) >= len(METRICS) - 1
    assert differences(changed, rows, compared=len(rows)) == []


def test_a_change_of_a_setting_is_found_on_any_processor():
    rows = golden_of("cpu")["histories"]["cartpole"]["rows"]
    changed = [[x if x is None else 1.01 * x for x in row] for row in rows]
    assert differences(changed, rows, compared=1)


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "golden.json"
    write(path, "cpu", {"first": 1})
    before = path.read_text()
    (tmp_path / "golden.json.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write(path, "cpu", {"second": 2})
    assert path.read_text() == before
