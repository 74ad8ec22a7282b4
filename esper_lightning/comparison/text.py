"""A comparison as text: plain text for a terminal, Markdown for a file."""

from esper_lightning.comparison.runs import SCORES, Run
from esper_lightning.comparison.scores import Comparison, Place, Row
from esper_lightning.comparison.section import Section, number
from esper_lightning.comparison.statistics import Estimate
from esper_lightning.forensics.reading import printable

__all__ = ["TEXT_BEGINS", "describe", "sections"]

_MARK = "<!-- written by esper compare -->"
TEXT_BEGINS = rb"# [^\n]*\n" + _MARK.encode()
"""Regular expression for the first bytes of a comparison in Markdown."""
_FEW_SEEDS = 5
_KINDS = {"evaluation": "deterministic evaluation", "rollout": "rollout, actions drawn"}


def describe(comparison: Comparison, *, markdown: bool = False) -> str:
    """All of a comparison but its curves, as text to print or to write."""
    settings = next(iter(comparison.variants[0].runs.values())).settings
    environment = printable(str(settings.get("env.class_path", "Runs")).rpartition(".")[2])
    title = f"{environment}: return by {SCORES[comparison.score]} ({_KINDS[comparison.score]})"
    parts = sections(comparison)
    if markdown:
        lines = [f"# {title}", _MARK, "", *(line for part in parts for line in part.markdown())]
        return "\n".join(lines).rstrip() + "\n"
    return "\n\n".join([title, *("\n".join(part.plain()) for part in parts)])


def sections(comparison: Comparison) -> list[Section]:
    """The tables of a comparison: scores at each place, the runs, and the notes."""
    parts = [_place(comparison, place) for place in comparison.places]
    parts.append(_runs(comparison))
    if comparison.notes:
        parts.append(Section("Notes", remarks=comparison.notes))
    return parts


def _place(comparison: Comparison, place: Place) -> Section:
    which = "the end" if place.is_end else "the last place that every run reached"
    seeds = f"seeds {' '.join(map(str, place.seeds))}" if place.seeds else "no seed in common"
    head = ["variant", "seeds", "mean", "IQM", "95 % interval"]
    several = len(comparison.variants) > 1
    head += ["P(better than baseline)", "95 % interval"] if several else []
    rows = [_row(row, comparison)[: len(head)] for row in place.rows]
    remarks = [f"Left out, {text}." for text in place.left_out]
    if place.is_end and place.left_out:
        text = "Of runs that ended early this says nothing, and they may have been the worse ones."
        remarks.append(text)
    if len(place.seeds) == 1:
        remarks.append("One seed: there is no interval.")
    elif 0 < len(place.seeds) < _FEW_SEEDS:
        remarks.append(f"Bootstrap intervals of {len(place.seeds)} seeds are too narrow.")
    return Section(f"At {place.env_steps:,} env steps ({which}), {seeds}", head, rows, remarks)


def _row(row: Row, comparison: Comparison) -> list[str]:
    mean = sum(row.score) / len(row.score)
    cells = [row.name, str(len(row.score)), number(mean)]
    cells += [number(row.interquartile_mean.value), _interval(row.interquartile_mean)]
    if row.improvement is None:
        is_baseline = row.name == comparison.baseline
        return [*cells, "baseline" if is_baseline else "-", "-"]
    return [*cells, f"{row.improvement.value:.2f}", _interval(row.improvement)]


def _interval(estimate: Estimate) -> str:
    return "-" if estimate.low is None else f"{number(estimate.low)} to {number(estimate.high)}"


def _runs(comparison: Comparison) -> Section:
    places = [place.env_steps for place in comparison.places]
    head = ["variant", "seed", "env steps", *(f"return at {p:,}" for p in places)]
    head += ["latest return", "run", "how it ended"]
    rows: list[list[str]] = []
    runs = [(v, seed, run) for v in comparison.variants for seed, run in v.runs.items()]
    for variant, seed, run in runs:
        mark = "" if run.ended == "finished" else " †"
        scores = [number(run.at(place, comparison.score)) for place in places]
        latest = _latest(run, comparison)
        rows.append(
            [
                *(variant.name, str(seed), f"{run.env_steps:,}{mark}", *scores, latest),
                *(str(run.directory), run.how),
            ]
        )
    marked = any(run.ended != "finished" for _, _, run in runs)
    text = "† Ended before its budget, or goes on: its latest return is not one at the end."
    return Section("Runs", head, rows, [text] if marked else [])


def _latest(run: Run, comparison: Comparison) -> str:
    points = run.points[comparison.score]
    return f"{number(points[-1].value)} at {points[-1].env_steps:,}" if points else "-"
