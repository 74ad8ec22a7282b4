"""Hosts are trained in float32, whatever precision the process allows."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from esper_lightning.envs.morphogenesis.precision import own_precision

CUDNN, MATMUL = torch.backends.cudnn, torch.backends.cuda.matmul


def settings() -> tuple[object, ...]:
    exact = MATMUL.fp32_precision, CUDNN.conv.fp32_precision
    return (*exact, CUDNN.benchmark, CUDNN.deterministic)


FAST = ("tf32", "tf32", True, False)


def set_all(values: tuple[object, ...]) -> None:
    MATMUL.fp32_precision, CUDNN.conv.fp32_precision = values[:2]
    CUDNN.benchmark, CUDNN.deterministic = values[2:]


@pytest.fixture
def fast() -> Iterator[None]:
    """A process that prefers speed."""
    before = settings()
    set_all(FAST)
    yield
    set_all(before)


@pytest.mark.usefixtures("fast")
def test_on_cuda_hosts_use_no_tf32_and_the_same_algorithms_each_time() -> None:
    with contextlib.suppress(ZeroDivisionError), own_precision(torch.device("cuda")):
        assert settings() == ("ieee", "ieee", False, True)
        raise ZeroDivisionError
    assert settings() == FAST


def test_the_precision_of_matrix_products_that_lightning_advises_is_restored() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with own_precision(torch.device("cuda")):
            assert MATMUL.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("fast")
def test_on_a_cpu_nothing_of_cuda_changes() -> None:
    with own_precision(torch.device("cpu")):
        assert settings() == FAST
