"""The page of a run is renewed while the run goes on, and never ends the run."""

import pytest

from esper_lightning.cli.pages import live_page
from esper_lightning.cli.pages.elements import page
from esper_lightning.cli.pages.live_page import LivePage


class FakeTrainer:
    is_global_zero = True


@pytest.fixture
def written(monkeypatch, tmp_path):
    pages: list[str] = []
    monkeypatch.setattr(live_page, "run_directory", lambda _: tmp_path)
    monkeypatch.setattr(live_page, "run_page", lambda _: pages.append("page") or page("a"))
    monkeypatch.setattr(live_page, "_open", lambda path: pages.append(path.name))
    return pages


def step(live: LivePage) -> None:
    live.on_train_batch_end(FakeTrainer(), None, None, None, 0)  # pyright: ignore[reportArgumentType]


def test_the_page_is_opened_once_and_written_every_ten_seconds(written, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(live_page.time, "monotonic", lambda: now[0])
    live = LivePage()
    for now[0] in (100.0, 105.0, 109.0, 111.0):
        step(live)
    assert written == ["page", "report.html", "page"]


def test_a_page_that_takes_long_is_written_less_often(written, monkeypatch):
    times = iter([0.0, 0.0, 1.0, 50.0, 101.5, 101.5, 101.5])
    monkeypatch.setattr(live_page.time, "monotonic", lambda: next(times))
    live = LivePage()
    for _ in range(3):
        step(live)
    assert written.count("page") == 2


def test_a_page_that_cannot_be_written_is_one_warning(written, tmp_path):
    (tmp_path / "report.html").write_text("of the user")
    live = LivePage()
    with pytest.warns(UserWarning, match="Something else is there"):
        live.write(FakeTrainer())  # pyright: ignore[reportArgumentType]
    live.write(FakeTrainer())  # pyright: ignore[reportArgumentType]
    assert (tmp_path / "report.html").read_text() == "of the user"
