"""A rank without a checkpoint loads that of the first rank, and retains nothing of it."""

from types import SimpleNamespace

import pytest

from esper_lightning.training.checkpoint import sharing
from esper_lightning.training.checkpoint.sharing import SharedCheckpoint


class Together:
    """What ranks say to each other, as seen by one of them: the first rank's pieces are known."""

    def __init__(self, found, pieces=()):
        self.found, self.pieces = found, [*pieces, b""]
        self.sent = []

    def gather_objects(self, mine):
        return self.found

    def send_from_first(self, mine):
        if mine is not None:
            self.sent.append(mine)
            return mine
        return self.pieces.pop(0)


@pytest.fixture
def sharing_of():
    """The sharing of a rank, and the paths that Lightning reads from."""

    def make(rank):
        read = []

        def resume_start(path, weights_only=None):
            read.append((path, path and path.read_bytes(), weights_only))

        connector = SimpleNamespace(resume_start=resume_start)
        trainer = SimpleNamespace(global_rank=rank, _checkpoint_connector=connector)
        return SharedCheckpoint(trainer), connector, read

    return make


def test_a_rank_without_a_checkpoint_loads_what_it_has_received_once(sharing_of):
    shared, connector, read = sharing_of(1)
    path = shared.share(Together([True, False], [b"one", b"two"]), None)
    assert path.read_bytes() == b"onetwo"
    connector.resume_start(None, weights_only=True)
    assert read == [(path, b"onetwo", True)]
    assert not path.exists()
    connector.resume_start(None)  # of a later run
    assert read[1] == (None, None, None)


def test_the_first_rank_sends_its_file_in_pieces(sharing_of, tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "_PIECE_BYTES", 3)
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"abcdefgh")
    together = Together([True, False])
    assert sharing_of(0)[0].share(together, path) == path
    assert together.sent == [b"abc", b"def", b"gh", b""]


def test_a_file_that_cannot_be_read_leaves_no_rank_waiting(sharing_of, tmp_path):
    together = Together([True, False])
    with pytest.raises(FileNotFoundError):
        sharing_of(0)[0].share(together, tmp_path / "absent.ckpt")
    assert together.sent == [b""]


def test_a_rank_with_a_checkpoint_of_its_own_keeps_it(sharing_of, tmp_path):
    path = tmp_path / "last.ckpt"
    together = Together([True, True, False], [b"one"])
    assert sharing_of(1)[0].share(together, path) == path
    assert together.pieces == []  # it has taken part


@pytest.mark.parametrize("found", [[True, True], [False, False], [False, True]])
def test_nothing_is_sent_where_no_rank_lacks_the_first_ones(sharing_of, tmp_path, found):
    together = Together(found)
    path = tmp_path / "last.ckpt" if found[1] else None
    assert sharing_of(1)[0].share(together, path) == path
    assert together.sent == []
    assert together.pieces == [b""]
