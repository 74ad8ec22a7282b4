"""The collectives that torch has recorded are written as ``forensics.collectives`` reads them."""

import json

import pytest
import torch
from torch import distributed as dist

from esper_lightning.forensics.collectives import read_collectives
from esper_lightning.recorder.collectives import latest_collectives


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_latest_collective_is_on_record(group, tmp_path):
    before = latest_collectives()
    if before is None:
        pytest.skip("this version of torch has no record of gloo's collectives")
    for _ in range(70):
        dist.all_reduce(torch.ones(3))
    content = latest_collectives()
    assert len(json.loads(content)["entries"]) == 64
    path = tmp_path / "collectives.json"
    path.write_bytes(content)
    found = read_collectives(path)
    assert found is not None
    assert "all_reduce of 3 Float" in (found.finished or found.waits_in)
