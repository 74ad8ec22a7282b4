"""The page of a run shows every metric, how the run ended, and what it was run with."""

import math

import pytest

from esper_lightning.cli.main import main
from esper_lightning.cli.pages.run_page import run_page
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.phases import PhaseRing
from tests.cli.pages.browser import Elements, needs_browser, rendered
from tests.comparison.conftest import KILLED, make_run  # noqa: F401 - a fixture


def test_a_finished_run(make_run):  # noqa: F811
    run = make_run("a", seed=3, returns=[None, 7, math.nan, 5], evaluations=[9, 8], budget=4000)
    found = Elements(run_page(run))
    assert "CartPole, seed 3" in found.texts
    assert "finished" in found.texts
    captions = [a["aria-label"] for a in found.all("svg")]
    assert captions == ["Mean return of episodes"]
    assert {"deterministic evaluations", "rollouts", "9", "model.ppo.learning_rate"} <= {
        *found.texts
    }
    assert "How the run died" not in found.texts


def test_a_run_that_died_begins_with_its_death(make_run):  # noqa: F811
    died = KILLED | {"error": {"type": "RuntimeError", "message": "<script>alert(1)</script>"}}
    page = run_page(make_run("a", crash=died))
    found = Elements(page)
    headings = [found.texts.index(text) for text in ("How the run died", "Learning")]
    assert headings == sorted(headings)
    assert "Rank 0 failed first" in page
    assert len(found.all("script")) == 1


def test_a_running_run_is_loaded_again(make_run):  # noqa: F811
    found = Elements(run_page(make_run("a", state="running")))
    assert [a for a in found.all("meta") if a.get("http-equiv") == "refresh"]


def test_videos_are_within_the_page_while_there_is_room(make_run, monkeypatch):  # noqa: F811
    run = make_run("a")
    (run / "videos").mkdir()
    (run / "videos" / "1.mp4").write_bytes(b"x" * 200)
    (run / "videos" / "2.mp4").write_bytes(b"y" * 100)
    monkeypatch.setattr("esper_lightning.cli.pages.run_page._MOST_VIDEO_BYTES", 250)
    found = Elements(run_page(run))
    (video,) = found.all("video")
    assert (video["src"] or "").startswith("data:video/mp4;base64,eXl5")
    assert "Not shown here: videos/1.mp4" in found.texts


def test_the_command_writes_beside_the_run_and_replaces_only_its_own_page(make_run, capsys):  # noqa: F811
    run = make_run("a")
    main(["report", str(run), "--html"])
    main(["report", str(run), "--html"])
    page = run / "report.html"
    assert capsys.readouterr().out == f"Page: {page}\n" * 2
    page.write_text("mine")
    with pytest.raises(SystemExit):
        main(["report", str(run), "--html"])
    assert page.read_text() == "mine"


WATCH = r"""<script>
onerror = (message) => document.title = "failed: " + message;
addEventListener("load", () => {
    const wide = document.documentElement.scrollWidth;
    const [paper, ink] = ["backgroundColor", "color"].map(
        (name) => getComputedStyle(document.body)[name].match(/\d+/g).slice(0, 3).map(Number));
    const bright = (color) => color.reduce((a, b) => a + b) / 765;
    const fetched = performance.getEntriesByType("resource")
        .filter((entry) => !entry.name.startsWith("data:"));
    const facts = [wide <= innerWidth, fetched.length, bright(paper) > 0.5, bright(ink) > 0.5,
                   document.querySelectorAll("svg polyline, svg path").length > 0];
    document.title = facts.join(" ");
});
</script>"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_the_page_of_a_comparison_is_whole_in_a_browser(make_run, tmp_path, scheme):  # noqa: F811
    """Curves are drawn, nothing is fetched, nothing is cut off, and colours follow the screen."""
    runs = [
        make_run(f"{name}/seed{seed}", seed=seed, returns=range(1, 12), settings=settings)
        for name, settings in (("base", {}), ("fast", {"learning_rate": 0.003}))
        for seed in (0, 1)
    ]
    page = tmp_path / "page.html"
    main(["report", *map(str, runs), "--html", str(page)])
    page.write_text(page.read_text().replace("<script>", f"{WATCH}<script>", 1))
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    shown = rendered(page, "--window-size=390,844", *dark)
    bright = "false true" if scheme == "dark" else "true false"
    assert f"<title>true 0 {bright} true</title>" in shown


@needs_browser
def test_a_browser_shows_the_page_and_its_script_answers_the_pointer(make_run, tmp_path):  # noqa: F811
    page = tmp_path / "page.html"
    moves = (
        "<script>onerror = (m) => document.title = 'failed: ' + m;"
        "addEventListener('load', () => { const chart = document.querySelector('svg');"
        "const box = chart.getBoundingClientRect();"
        "chart.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + 0.45 * box.width,"
        "clientY: box.top + 50})); const wide = document.documentElement.scrollWidth;"
        "document.title = wide <= innerWidth ? 'fits' : 'too wide: ' + wide; })</script>"
    )
    run = make_run("a", returns=range(1, 12), crash=KILLED)
    ring = PhaseRing(RunLayout(run).rank(0).phases)
    for name in ("update", "[Callback]AVeryLongNameOfACallbackOfTheUser.on_train_batch_start"):
        ring.enter(name)
        ring.leave(name)
    ring.close()
    text = run_page(run)
    assert "Where time went" in text
    page.write_text(text.replace("<script>", moves + "<script>", 1))
    shown = rendered(page, "--window-size=390,844")
    assert "<title>fits</title>" in shown
    assert "5,000 : rollouts 5" in shown
