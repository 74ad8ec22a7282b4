"""Two ranks, one of which dies: both save their own, and the one that failed first is named."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper_lightning.cli.crash import examine, first_failure

pytestmark = [pytest.mark.crash, pytest.mark.ddp]
PROGRAM = Path(__file__).with_name("ranks.py")


@pytest.mark.parametrize(
    ("fault", "strategy", "rank"),
    [
        ("raises", "ddp", 1),
        ("killed", "ddp", 1),
        ("raises", "torchrun", 1),
        pytest.param("raises", "ddp", 0, marks=pytest.mark.slow),
        pytest.param("hangs", "ddp", 1, marks=pytest.mark.slow),
        pytest.param("terminated", "ddp", 1, marks=pytest.mark.slow),
        pytest.param("killed", "torchrun", 0, marks=pytest.mark.slow),
        pytest.param("terminated", "torchrun", 1, marks=pytest.mark.slow),
        pytest.param("raises", "ddp_spawn", 1, marks=pytest.mark.slow),
        pytest.param("killed", "ddp_fork", 1, marks=pytest.mark.slow),
    ],
)
def test_every_rank_saves_its_own(tmp_path, fault, strategy, rank):
    launcher, lightning = [], strategy
    if strategy == "torchrun":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        lightning = "ddp"
    program = [str(PROGRAM), fault, lightning, str(tmp_path), str(rank)]
    command = [sys.executable, *launcher, *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=90, check=False
    )
    assert result.returncode != 0
    ranks = examine(tmp_path)
    assert [remains.rank for remains in ranks] == [0, 1]
    assert first_failure(ranks).rank == rank, [remains.report for remains in ranks]
    for remains in ranks:
        assert remains.report["complete"], remains.report
        assert remains.rows == 6
        vanished = fault == "killed" and remains.rank == rank
        assert (remains.report["evidence"]["trace"]["state"] == "saved") == (not vanished)
        if remains.trace_path is not None:
            content = gzip.decompress(remains.trace_path.read_bytes())
            assert (b"aten::special_erfcx" in content) == (remains.rank == rank)
    peer = ranks[1 - rank].report
    assert peer["time_s"] - ranks[rank].report["time_s"] < 10
