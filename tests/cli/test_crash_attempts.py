"""The table of attempts says what is known of each, and what the deaths have in common."""

from pathlib import Path

from esper_lightning.cli.crash_attempts import describe_attempts, mention_attempts
from esper_lightning.forensics.attempts import Attempt

RUN = Path("run")
DIED = {"state": "failed", "cause": "exception", "iteration": 25, "what": "E: x", "place": "p.py"}


def attempt(number, **known):
    times = {"started_s": 1000.0 * number, "ended_s": 1000.0 * number + 12.34}
    return Attempt(**{**times, **DIED, "rank": 1, "exit_status": 1, **known})


def test_each_attempt_has_a_line():
    text = describe_attempts(RUN, [attempt(1), attempt(2, what="y" * 99), Attempt()])
    assert text[0] == "Run directory: run"
    one, two, unknown = text[3:6]
    assert one.split()[0] == "1"
    assert one.endswith("12.3 s     1  failed   exception         25       1  E: x")
    assert two.endswith("...")
    assert unknown.split() == ["3", "unknown", "-", "-", "-", "-", "-", "-"]


def test_the_same_death_is_named_with_its_place():
    text = "\n".join(describe_attempts(RUN, [attempt(1), attempt(2)]))
    assert "2 attempts died in iteration 25 of the same error.\n    p.py\n" in text
    assert "status 65" in text
    assert "same error" not in "\n".join(describe_attempts(RUN, [attempt(1)]))


def test_attempts_are_mentioned_where_there_are_several():
    assert mention_attempts(RUN, [attempt(1)]) == []
    (_, line) = mention_attempts(RUN, [attempt(1), attempt(2, what="Other: it")])
    assert line == "2 attempts: esper crash --attempts run"
    (_, line) = mention_attempts(RUN, [attempt(1), attempt(2)])
    assert line.startswith("2 attempts, of which 2 died of the same error in the same iteration: ")
