"""Numbers in the documents are those of the results files that they name.

A statement is a piece of text in which ``#`` stands for a measured number, and the places in a
results file that these numbers come from. A number as written is the file's number rounded to as
many decimals as are written. Numbers that are no measurement (sizes, counts, settings) are part of
the text: who changes one finds the statement missing.
"""

import json
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?![\w]*\d)")


class Cell(NamedTuple):
    """All numbers in a cell of a table: under a heading, in the row that begins so, by column.

    Of several such rows, ``choose`` takes the least or the greatest number.
    """

    row: str
    column: str
    heading: str = ""
    choose: str = ""

    def numbers(self, text: str) -> list[Decimal]:
        found: list[Decimal] = []
        columns: list[str] = []
        heading = ""
        for line in text.splitlines():
            if line.startswith("## "):
                heading, columns = line, []
            elif not line.startswith("|"):
                columns = []
            elif not columns:
                columns = [cell.strip() for cell in line.strip("|").split("|")]
            elif self.column in columns and self._is_meant(line, heading):
                found += numbers_in(line.strip("|").split("|")[columns.index(self.column)])
                if not self.choose:
                    return found
        return [{"min": min, "max": max}[self.choose](found)] if self.choose and found else found

    def _is_meant(self, line: str, heading: str) -> bool:
        row = f"| {self.row} |" if self.row else "|"
        return self.heading in heading and line.startswith(row)


class Line(NamedTuple):
    """The numbers that follow a pattern, on its line, below a heading."""

    before: str
    heading: str = ""
    count: int = 1

    def numbers(self, text: str) -> list[Decimal]:
        match = re.search(f"{self.before}(.*)", text[text.index(self.heading) :])
        return numbers_in(match[1])[: self.count] if match else []


class Statement(NamedTuple):
    """What a document says of a results file."""

    text: str
    file: str
    sources: Sequence[Cell | Line] = ()
    document: str = "docs/results.md"


def least(row: str, column: str, heading: str = "") -> Cell:
    return Cell(row, column, heading, "min")


def greatest(row: str, column: str, heading: str = "") -> Cell:
    return Cell(row, column, heading, "max")


LARGE, SMALL = "2048 environments x 32 steps", "4 environments x 128 steps"
FASTER, OVER = "esper: times as fast", " | recorder off, no profiler"
FRESH, RULES = "fresh hosts", "with each blueprint"
README = "README.md"
IN_README = ["esper", "PureJaxRL style (JAX)", "rsl_rl", "stable-baselines3, batched env"]
IMAGES, DIGITS = "3x32x32 images", "digits preset"


LEAD = "PPO's less that, host by host"
FRESH_MIXED = "Fresh hosts"


def in_both(text: str, file: str, sources: Sequence[Cell | Line] = ()) -> list[Statement]:
    """What the README and the page of results say of a results file."""
    said = Statement(text, file, sources)
    return [said, said._replace(document=README)]


def speeds(label: str, large: str, small: str | None = None) -> list[Statement]:
    """A row of the table of speeds, which the README has, too, for some of the contenders."""
    cells = Cell(large, "env-steps/s", LARGE), Cell(small or large, "env-steps/s", SMALL)
    row = Statement(label, "throughput.md", cells)
    return [row, row._replace(document=README)] if large in IN_README else [row]


def of_zoo(label: str, task: str, published: str, library: str = "esper_lightning") -> Statement:
    """A row of the table of simulators: scores of five seeds beside what others have published."""
    sources = (
        Line("deterministic episodes after"),
        Cell(library, "mean return of each seed"),
        Cell(library, "worst"),
        Cell(library, "mean"),
    )
    text = f"| {label} | # | #, #, #, #, # | # | # | {published} |"
    return Statement(text, f"zoo_{task}.md", sources)


BOTH = Cell("esper_lightning", "CPU, s"), Cell("Stable-Baselines3", "CPU, s")
STATEMENTS = [
    Statement(
        "in mode `max`, the loop makes # million env-steps a second with 2,048 environments x 32 "
        "steps, # times those of the JAX program in the same precision",
        "gpu_check.md",
        (Line("2048 x 32, max: "), Line("2048 x 32, max: .*M/s\\); ")),
    ),
    Statement(
        "mean return # (std 0.0) over 100 deterministic evaluation episodes "
        "Trained for # env steps in # s: # env-steps/s",
        "demo.md",
        (
            Line("deterministic evaluation episodes after it"),
            Line("of it training,"),
            Line("env steps of CartPole"),
            Line(r"env steps of CartPole \| [\d.]+ s,"),
        ),
        README,
    ),
    *in_both(
        "# deaths, each in a process of its own, and # of one rank of two left what they should",
        "faults.md",
        (Line("- as expected:"), Line("- as expected:", "## Two ranks")),
    ),
    Statement(
        "The flight recorder adds # microseconds to an iteration without a profiler and # with the "
        "waiting one",
        "recorder_cost_small.md",
        (
            Cell(f"recorder on, no profiler{OVER}", "microseconds more"),
            Cell(f"recorder on, debug_profile.yaml waiting{OVER}", "microseconds more"),
        ),
    ),
    Statement(
        "with ten recorded iterations of 2048 environments it takes # s and # MB; an ordinary end "
        "under Lightning's own profiler takes # s and # MB",
        "recorder_cost.md",
        (
            Cell("fault, recorder, WindowProfiler", "s to the exit"),
            Cell("fault, recorder, WindowProfiler", "MB above the peak before"),
            Cell("no fault, no recorder, stock profiler", "s to the exit"),
            Cell("no fault, no recorder, stock profiler", "MB above the peak before"),
        ),
    ),
    Statement(
        "A write of a checkpoint takes # to # ms on two CPU cores, a read # to #",
        "checkpoints.md",
        (
            least("", "write, ms"),
            greatest("", "write, ms"),
            least("", "read, ms"),
            greatest("", "read, ms"),
        ),
    ),
    Statement(
        "both writes of an epoch are # % of 50 iterations of 2048 environments x 32 steps at their "
        "fastest, but # % of those of 4 x 128",
        "checkpoints.md",
        (Cell("2,048 x 32", "of an epoch"), Cell("4 x 128", "of an epoch")),
    ),
    Statement(
        "Over five training seeds and 200 fresh networks, PPO returns # (# to #) where the best "
        "baseline, which grows a convolution everywhere at the start, returns # (# to #); that one "
        "is as accurate on test images (# against # %), with # grown parameters against #. "
        "Networks that never grow return # and reach # %. The rule that grows at the start, told "
        "in hindsight which of seven parts is best, returns # (# to #)",
        "growth.md",
        (
            Cell("PPO", "return", FRESH),
            Cell("PPO", "95 % interval", FRESH),
            Cell("grow at the start", "return", FRESH),
            Cell("grow at the start", "95 % interval", FRESH),
            Cell("grow at the start", "test accuracy, %", FRESH),
            Cell("PPO", "test accuracy, %", FRESH),
            Cell("grow at the start", "grown parameters", FRESH),
            Cell("PPO", "grown parameters", FRESH),
            Cell("never grow", "return", FRESH),
            Cell("never grow", "test accuracy, %", FRESH),
            Cell("low_rank", "return", RULES),
            Cell("low_rank", "95 % interval", RULES),
        ),
    ),
    Statement("interquartile means with 95 % intervals", "growth.md"),
    Statement(
        "it is ahead of the best of 211 fixed schedules in hindsight, which returns #, by # "
        "(# to #). Its lead over a searched rule with one threshold is # (# to #)",
        "growth_mixed.md",
        [
            Cell("best fixed schedule", "return", FRESH_MIXED),
            Cell("best fixed schedule", LEAD, FRESH_MIXED),
            Cell("the rule that reacts", LEAD, FRESH_MIXED),
        ],
        README,
    ),
    Statement(
        "PPO returns # over five training seeds and 400 fresh networks, the best of 211 fixed "
        "schedules in hindsight #, and a policy that cannot see the training #. Network by network "
        "PPO is ahead of the schedule by # (# to #), and of the blind policy by # (# to #). "
        "Looking earned about the first number, or less; part of the second comes from training",
        "growth_mixed.md",
        [
            Cell("PPO", "return", FRESH_MIXED),
            Cell("best fixed schedule", "return", FRESH_MIXED),
            Cell("PPO, blind", "return", FRESH_MIXED),
            Cell("best fixed schedule", LEAD, FRESH_MIXED),
            Cell("PPO, blind", LEAD, FRESH_MIXED),
        ],
    ),
    Statement(
        "| never grow | # | | PPO, blind | # | | best fixed schedule, in hindsight | # | | PPO "
        "with memory | # | | **PPO** | **#** | | the rule that reacts | # | "
        "| best schedule of each kind, in hindsight | # |",
        "growth_mixed.md",
        [
            Cell(name, "return", FRESH_MIXED)
            for name in (
                *("never grow", "PPO, blind", "best fixed schedule", "PPO with memory", "PPO"),
                *("the rule that reacts", "best schedule of each kind"),
            )
        ],
        "docs/morphogenesis.md",
    ),
    *(
        Statement(text, "growth_mixed.md", [Cell(name, LEAD, heading)], "docs/morphogenesis.md")
        for text, name, heading in (
            ("Host by host PPO is ahead of them by # (# to #)", "PPO, blind", FRESH_MIXED),
            ("that of PPO with memory is # (# to #)", "PPO with memory", FRESH_MIXED),
            ("best of 211 in hindsight is # (# to #)", "best fixed schedule", FRESH_MIXED),
            ("less that of the rule is # (# to #)", "the rule that reacts", FRESH_MIXED),
            ("best for them in hindsight, # (# to #)", "best fixed schedule", "no training"),
            ("level with blind policies, # (# to #)", "PPO, blind", "no training"),
        )
    ),
    Statement(
        "looking earned about # here, or less.",
        "growth_mixed.md",
        [Line("that of best fixed schedule, ", f"## {FRESH_MIXED}")],
        "docs/morphogenesis.md",
    ),
    Statement(
        "PPO closes # % of the gap from the best schedule to the best schedule of each kind, which "
        "is too good by what chance adds to a maximum, and # % where",
        "growth_mixed.md",
        [
            Line("to best schedule of each kind .* PPO closes ", f"## {FRESH_MIXED}"),
            Line("to the same, chosen on other hosts .* PPO closes ", f"## {FRESH_MIXED}"),
        ],
        "docs/morphogenesis.md",
    ),
    Statement(
        "On one processor thread 64 of these networks are trained and grown # to # times as fast "
        "as by a loop over modules and optimizers, a single one # to # times.",
        "morphogenesis.md",
        (
            Cell("seeds kept alive | 64", "times as fast", DIGITS),
            Cell("random legal | 64", "times as fast", DIGITS),
            Cell("random legal | 1", "times as fast", DIGITS),
            Cell("seeds kept alive | 1", "times as fast", DIGITS),
        ),
    ),
    Statement(
        "Of networks of 6,418 parameters on 3x32x32 images it is # to # times, # to # env-steps/s "
        "with random legal actions, for 1 and for 8 of them: a goal of # is met",
        "morphogenesis.md",
        (
            least("random legal", "times as fast", IMAGES),
            greatest("random legal", "times as fast", IMAGES),
            least("random legal", "env-steps/s", IMAGES),
            greatest("random legal", "env-steps/s", IMAGES),
            Line("goals up to 16 hosts, env-steps/s:"),
        ),
    ),
    Statement(
        "it takes # s with an empty cache and # s with a filled one, where `off` takes #",
        "throughput_startup.md",
        (
            Cell("esper", "cache empty, s"),
            Cell("esper", "cache filled, s"),
            Cell("esper, off", "cache empty, s"),
        ),
    ),
    *in_both(
        "two hidden layers of 64, actor and critic, 4 epochs of 4 minibatches", "throughput.md"
    ),
    *in_both("| 2048 environments x 32 steps | 4 environments x 128 steps |", "throughput.md"),
    *speeds("| **esper_lightning** | **#** | **#** |", "esper"),
    *speeds("| esper_lightning, `off` | # | # |", "esper, off"),
    *speeds("| PureJaxRL style, one jitted JAX program | # | # |", "PureJaxRL style (JAX)"),
    *speeds("| library products and `tanh` alone | # | # |", "library arithmetic alone"),
    *speeds("| rsl_rl, its own compilation on | # | # |", "rsl_rl, its compile on"),
    *speeds("| skrl | # | # |", "skrl"),
    *speeds("| rsl_rl | # | # |", "rsl_rl"),
    *speeds(
        "| stable-baselines3 | # | # (with Gymnasium) |",
        "stable-baselines3, batched env",
        "stable-baselines3, Gymnasium",
    ),
    Statement(
        "# times JAX and # times the best of the others at 2048 x 32, # times JAX and # times "
        "stable-baselines3 at 4 x 128",
        "throughput.md",
        (
            Cell("PureJaxRL style (JAX)", FASTER, LARGE),
            Cell("rsl_rl, its compile on", FASTER, LARGE),
            Cell("PureJaxRL style (JAX)", FASTER, SMALL),
            Cell("stable-baselines3, Gymnasium", FASTER, SMALL),
        ),
    ),
    Statement(
        "a run of 1 environment holds # MB at its peak, one of 65,536 holds # MB",
        "throughput_scaling.md",
        (
            Cell("1", "peak memory of the process, MB"),
            Cell("65,536", "peak memory of the process, MB"),
        ),
    ),
    of_zoo("LunarLander-v3", "lunarlander", "242 (rl-zoo)"),
    of_zoo("HalfCheetah-v5", "halfcheetah", "1,443 (CleanRL), 5,819 (rl-zoo)"),
    of_zoo("Hopper-v5", "hopper", "2,383 (CleanRL), 2,410 (rl-zoo)"),
    of_zoo("LunarLander-v3, Stable-Baselines3", "lunarlander", "as above", "Stable-Baselines3"),
    of_zoo("HalfCheetah-v5, Stable-Baselines3", "halfcheetah", "as above", "Stable-Baselines3"),
    of_zoo("Hopper-v5, Stable-Baselines3", "hopper", "as above", "Stable-Baselines3"),
    of_zoo("Walker2d-v5", "walker2d", "2,288 (CleanRL), 3,479 (rl-zoo)"),
    of_zoo("Swimmer-v5", "swimmer", "282 (rl-zoo)"),
    of_zoo("MiniGrid-DoorKey-5x5", "doorkey", "none"),
    of_zoo("MinAtar Breakout, gymnax", "breakout", "none"),
    of_zoo("MinAtar Space Invaders, gymnax", "space_invaders", "none"),
    of_zoo("VMAS navigation", "navigation", "none"),
    of_zoo("mjlab, Cartpole-Balance", "mjlab_cartpole", "none"),
    Statement(
        "# CPU seconds on LunarLander where one of Stable-Baselines3 takes #",
        "zoo_lunarlander.md",
        BOTH,
    ),
    Statement("# on HalfCheetah where it takes #", "zoo_halfcheetah.md", BOTH),
    Statement("# on Hopper where it takes #", "zoo_hopper.md", BOTH),
    *in_both("Mean return of 100 deterministic evaluation episodes", "learning.md"),
    *in_both("at the end of training, 5 seeds", "learning.md"),
    Statement(
        "which Python steps, # x #, the update is # times as fast as `off`; all of the rollout but "
        "the environment's own step takes # % of an iteration",
        "adapters_training.md",
        tuple(
            Cell("1,024 x 32 | auto", column)
            for column in ("environments x steps", "ratio", "its share")
        ),
    ),
    Statement(
        "(a mean return of #), at # env-steps/s in all on a busy two-core machine, # and # times",
        "ranks.md",
        (
            Cell("2 ranks x 64", "last evaluation"),
            Cell("2 ranks x 64", "env-steps/s"),
            Line("environments on each:", count=2),
        ),
        "docs/ranks-and-resume.md",
    ),
    Statement(
        "the rule comes close to PPO (# against #; host by host PPO is ahead by # to #)",
        "growth.md",
        (
            Cell("low_rank", "return", RULES),
            Cell("PPO", "return", FRESH),
            Line(r"that of low_rank, .* \(", count=2),
        ),
        "docs/morphogenesis.md",
    ),
]
# Tables that are the file's own, row by row.
COPIED = {"| task | env steps | goal |": "learning.md"}
# Numbers that are no measurement, by document.
NOT_MEASURED = {
    README: [
        "`kill -9` leaves a process no time",
        "Apache-2.0",
    ],
    "docs/results.md": [
        "to float32 rounding",
        "references reach 492 on CartPole and -90 on Acrobot in 500,000 steps.",
        "with 64 environments it did",
        "(Gymnasium calls -110 solved)",
    ],
}


OTHERS = [path for path in sorted(ROOT.glob("docs/**/*.md")) if path.parent.name != "decisions"]
OTHERS.remove(ROOT / "docs/results.md")
SPEED = re.compile(rf"{NUMBER.pattern} (?:env-steps/s|times as (?:fast|many)|times faster)")


OF_ONE_RUN = re.compile(
    r"^\$ esper (?:crash|replay) .*\n(?:(?!\$).*\n)*", re.MULTILINE
)  # an example


def numbers_in(text: str) -> list[Decimal]:
    return [Decimal(found.replace(",", "")) for found in NUMBER.findall(text)]


def prose(text: str) -> str:
    """The text of a document in one line, without programs and the targets of links."""
    fences = re.split(r"^```(\w*)$", text, flags=re.MULTILINE)
    parts: list[str] = []
    for k in range(0, len(fences), 2):  # text, language, ...
        language = fences[k - 1] if k % 4 == 2 else ""
        if k % 4 == 0:
            parts.append(fences[k])
        elif language == "console":  # what commands print
            lines = OF_ONE_RUN.sub("", fences[k]).splitlines()
            parts += [line for line in lines if not line.startswith(("$", "    "))]
    return " ".join(re.sub(r"\]\([^)]*\)", "]", " ".join(parts)).split())


def find(statement: Statement) -> re.Match[str] | None:
    pattern = re.escape(statement.text).replace(r"\#", f"({NUMBER.pattern})")
    return re.search(pattern, prose((ROOT / statement.document).read_text()))


def agrees(written: str, measured: Decimal) -> bool:
    """Whether ``measured`` rounds to what is written."""
    value = Decimal(written.replace(",", ""))
    step = Decimal(1).scaleb(int(value.as_tuple().exponent))
    return abs(value - measured) <= step / 2


def wrong_numbers(statement: Statement) -> list[str]:
    """Numbers of a document that differ from the results file."""
    match = find(statement)
    if match is None:
        return [f"{statement.document} does not say: {statement.text}"]
    text = (RESULTS / statement.file).read_text()
    measured = [number for source in statement.sources for number in source.numbers(text)]
    written = match.groups()
    if len(measured) != len(written):
        return [f"{len(written)} numbers are written, {statement.file} has {measured}"]
    return [
        f"{statement.document} says {said}, {statement.file} says {is_}"
        for said, is_ in zip(written, measured, strict=True)
        if not agrees(said, is_)
    ]


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda s: f"{s.file}: {s.text[:30]}")
def test_what_a_document_says_is_what_the_results_file_says(statement):
    assert not wrong_numbers(statement)


@pytest.mark.parametrize("document", NOT_MEASURED)
@pytest.mark.parametrize(("head", "file"), COPIED.items())
def test_a_table_of_a_results_file_is_copied_as_it_is(head, file, document):
    lines = (ROOT / document).read_text().splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith(head))
    table = lines[start : lines.index("", start)]
    assert len(table) > 2
    assert set(table) <= set((RESULTS / file).read_text().splitlines())


def without_statements(document: str) -> str:
    """The text of a document without tables of results files and without statements."""
    text = (ROOT / document).read_text()
    for head in COPIED:
        if head in text:
            text = text.replace(text[text.index(head) :].partition("\n\n")[0], "")
    said = prose(text)
    for statement in STATEMENTS:
        if statement.document == document and (match := find(statement)):
            said = said.replace(match[0], "")
    return said


@pytest.mark.parametrize("document", NOT_MEASURED)
def test_no_number_of_readme_or_results_is_without_a_source(document):
    """Every number belongs to a statement, to a copied table or to what is no measurement."""
    said = without_statements(document)
    for phrase in NOT_MEASURED[document]:
        assert phrase in said, f"nobody says any more: {phrase}"
        said = said.replace(phrase, "")
    said = re.sub(r"`[^`]*`", "", said)
    around = [said[max(0, m.start() - 40) : m.end() + 20] for m in NUMBER.finditer(said)]
    assert around == []


def test_the_operations_of_a_step_of_hosts_are_those_that_are_counted():
    """What docs/gpu.md computes begins with a number that tests/gpu_proof counts."""
    counted = json.loads((ROOT / "tests" / "gpu_proof" / "kernels.json").read_text())
    operations, update = counted["step of hosts"], counted["update of hosts"]
    said = prose((ROOT / "docs" / "gpu.md").read_text())
    assert f"{operations:,} operations with the settings of" in said
    assert f"{operations:,} x 2 us = {round(operations * 2e-3)} ms" in said
    assert f"{update} of them in each of its 8 updates" in said
    left = operations - 8 * (update - 282)
    assert f"{operations:,} - 8 x ({update} - 282) = {left:,} remain in a step" in said


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.name)
def test_no_speed_of_another_document_is_without_a_source(path):
    said = without_statements(str(path.relative_to(ROOT)))
    around = [said[max(0, m.start() - 40) : m.end() + 20] for m in SPEED.finditer(said)]
    assert around == []


@pytest.mark.parametrize(
    ("written", "measured", "fits"),
    [
        ("6.04", "6.0401", True),
        ("6.05", "6.04", False),
        ("12", "11.6", True),
        ("13", "11.6", False),
        ("294,623", "294623", True),
        ("294,624", "294623", False),
        ("-82", "-81.8", True),
    ],
)
def test_a_number_is_rounded_to_as_many_decimals_as_are_written(written, measured, fits):
    assert agrees(written, Decimal(measured)) == fits


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda s: f"{s.file}: {s.text[:30]}")
def test_a_number_that_is_changed_by_hand_is_found(statement, tmp_path, monkeypatch):
    match = find(statement)
    assert match is not None
    words = statement.text.split("#")
    for changed in range(len(match.groups())):
        numbers = list(match.groups())
        number = numbers[changed].rstrip(",")
        numbers[changed] = f"{number[:-1]}{(int(number[-1]) + 5) % 10}"
        text = "".join(a + b for a, b in zip(words, [*numbers, ""], strict=True))
        document = tmp_path / "README.md"
        document.write_text(text)
        monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
        assert wrong_numbers(statement._replace(document="README.md")), text
        monkeypatch.undo()
