"""A figure of an episode shows the course of its host, also where the host diverges."""

import re

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from esper_lightning.forensics.pictures import PICTURE_BEGINS
from esper_lightning.growth.figure import draw
from tests.growth.test_table import SPEC, poisoned


@pytest.fixture(scope="module")
def played():
    return poisoned()


def texts(figure):
    """All titles and labels of a figure."""
    axes = figure.axes
    named = [text for each in axes for text in (each.get_title(), each.get_ylabel())]
    return " ".join([*named, figure.get_suptitle()])


@pytest.mark.parametrize(("host", "end"), [(0, "at the end"), (1, "when it diverged")])
def test_the_title_says_how_the_host_ended(played, tmp_path, monkeypatch, host, end):
    drawn, save = [], Figure.savefig

    def note(figure, *args, **kwargs):
        drawn.append(texts(figure))
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", note)
    path = tmp_path / "x.png"
    draw(played, host, SPEC, path, title="Poisoned")
    assert end in drawn[0]
    assert "Poisoned" in drawn[0]
    assert imread(path).std() > 0.05
    assert re.match(PICTURE_BEGINS, path.read_bytes()[:512], re.DOTALL)


def test_a_figure_replaces_an_earlier_one_whole(played, tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(b"before")

    def full(*_, **__):
        raise OSError("no room")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="no room"):
        draw(played, 0, SPEC, path, title="x")
    assert path.read_bytes() == b"before"
    assert [*tmp_path.iterdir()] == [path]
