"""Ranks that ``torchrun`` starts again do not look for each other at addresses of the dead."""

import pytest
from torch import distributed as dist

from esper_lightning.core.ranks import RanksDisagreeError
from esper_lightning.training.checkpoint.elastic import refuse_stale_store, store_of_attempt


@pytest.fixture
def torchrun(monkeypatch):
    """The variables that ``torchrun`` sets for a rank."""

    def start(*, shares=True, attempt=0, restarts=3, hosts=1, rank=0):
        variables = {
            "TORCHELASTIC_USE_AGENT_STORE": str(shares),
            "TORCHELASTIC_RESTART_COUNT": attempt,
            "TORCHELASTIC_MAX_RESTARTS": restarts,
            "GROUP_WORLD_SIZE": hosts,
            "RANK": rank,
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return start


@pytest.mark.parametrize(
    "launch",
    [
        {"hosts": 1, "attempt": 1},  # has names of its own
        {"hosts": 2, "attempt": 1, "shares": False},
        {"hosts": 2, "restarts": 0},
        {"hosts": 2, "rank": 1},  # the first rank warns
    ],
)
def test_a_launch_that_works_is_silent(torchrun, caplog, launch):
    torchrun(**launch)
    refuse_stale_store()
    assert caplog.messages == []


def test_restarts_of_several_hosts_are_refused_before_they_hang(torchrun, caplog):
    torchrun(hosts=2)
    refuse_stale_store()
    (warning,) = caplog.messages
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in warning
    torchrun(hosts=2, attempt=1, rank=1)
    with pytest.raises(RanksDisagreeError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        refuse_stale_store()


@pytest.fixture
def agent(monkeypatch):
    """The store of an agent of ``torchrun``, in which the first attempt has left an address."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    store.set("address", "of the dead")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def test_a_later_attempt_has_names_of_its_own(torchrun, agent, monkeypatch):
    given = {}

    def connect(backend, store=None, **settings):
        given.update(settings, backend=backend, store=store)

    monkeypatch.setattr(dist, "init_process_group", connect)
    torchrun(attempt=2)
    with store_of_attempt():
        dist.init_process_group("gloo", rank=0)
    assert dist.init_process_group is connect
    assert (given["backend"], given["rank"]) == ("gloo", 0)
    assert not given["store"].check(["address"])
    given["store"].set("mine", "1")
    assert agent.get("attempt_2/mine") == b"1"


@pytest.mark.parametrize("launch", [{"attempt": 0}, {"attempt": 1, "shares": False}])
def test_where_no_name_is_taken_torch_connects_by_itself(torchrun, launch):
    torchrun(**launch)
    before = dist.init_process_group
    with store_of_attempt():
        assert dist.init_process_group is before
