"""Two deaths are the same where type and stack are the same, whatever their texts say."""

from dataclasses import replace
from pathlib import Path

import pytest

from esper_lightning.forensics.deaths import frames_of, other_text, signature_of
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.remains import Remains
from esper_lightning.forensics.report import CrashReport, ErrorReport, NonFiniteReport, PeerReport

STACK = (
    "Traceback (most recent call last):",
    '  File "/venv/lib/python3.12/site-packages/lightning/pytorch/call.py", line 7, in hook',
    '  File "/here/train.py", line 3, in on_train_batch_end',
    '  File "/here/checks.py", line 9, in fail',
)
ERROR = ErrorReport(type="ValueError", message="keys {'a', 'b'}", traceback=STACK)


def remains(*, error=ERROR, directory=Path(), **report):
    death = CrashReport(**{"cause": "exception", "iteration": 3, "error": error, **report})
    return Remains(
        rank=0,
        state="failed",
        world_size=1,
        started_s=1.0,
        report=death,
        unreadable={},
        rows=0,
        history=[],
        damaged_rows=0,
        remarks=[],
        phases=None,
        windows=[],
        directory=directory,
    )


def are_same(one, other):
    return signature_of(one).is_same(signature_of(other))


@pytest.mark.parametrize(
    "text",
    ["keys {'b', 'a'}", "no file /tmp/tmpa_b/scene.xml", "1.20 GiB is free, not 512 MiB", ""],
)
def test_the_text_of_an_error_decides_nothing_and_is_shown(text):
    again = remains(error=replace(ERROR, message=text))
    assert are_same(remains(), again)
    assert other_text(remains(), again) == "; in the run that died: ValueError: keys {'a', 'b'}"


def test_a_text_with_other_numbers_is_not_shown():
    one, other = (remains(error=replace(ERROR, message=f"at {n}")) for n in ("0x7fa", "12"))
    assert other_text(one, other) == ""


def test_a_line_that_raises_for_others_is_told_apart_by_its_callers():
    caller = '  File "/here/train.py", line 4, in on_train_batch_end'
    other = remains(error=replace(ERROR, traceback=(*STACK[:2], caller, STACK[3])))
    assert not are_same(remains(), other)


def test_frames_of_libraries_do_not_count_but_the_innermost_does():
    moved = tuple(line.replace("/here/", "/there/") for line in STACK)
    another = STACK[1].replace("line 7", "line 8")
    same = remains(error=replace(ERROR, traceback=(moved[0], another, *moved[2:])))
    assert are_same(remains(), same)
    inner = '  File "/venv/lib/python3.12/site-packages/numpy/linalg.py", line {}, in solve'
    one, other = (
        remains(error=replace(ERROR, traceback=(*STACK, inner.format(line)))) for line in (5, 6)
    )
    assert not are_same(one, other)


def test_the_place_of_an_error_of_this_package_is_that_of_the_caller():
    require = '  File "/venv/x/esper_lightning/core/errors.py", line 5, in require'
    assert str(frames_of([*STACK, require])[-1]) == 'File "/here/checks.py", line 9, in fail'


@pytest.mark.parametrize("wraps", [False, True])
def test_a_recursion_is_the_same_wherever_it_reaches_the_limit(wraps):
    frames = [f'  File "/here/deep.py", line {n % 2}, in f{n % 2}' for n in range(30)]
    kind, after = "RecursionError", ["RecursionError: maximum recursion depth exceeded"]
    if wraps:
        kind, after = "ValueError", [*after, "The above exception was the direct cause", *STACK]

    def dies(*stack):
        return remains(error=ErrorReport(type=kind, traceback=(STACK[0], *stack, *after)))

    one, helper = dies(*frames[:29]), '  File "/here/deep.py", line 9, in helper'
    assert are_same(one, dies(*frames[1:]))
    assert are_same(one, dies(*frames[1:29], helper))
    assert not are_same(one, dies(*(line.replace("deep.py", "other.py") for line in frames)))


def test_an_error_of_c_that_is_too_deep_has_the_place_of_its_call():
    error = ErrorReport(type="RecursionError", traceback=(*STACK, "RecursionError: in repr"))
    assert signature_of(remains(error=error)).place == "checks.py:9, in fail"


def test_errors_of_groups_and_of_worker_processes_have_places():
    lines = ['  |   File "/here/a.py", line 1, in f', '  File "/here/b.py", line 2, in g']
    assert [frame.name for frame in frames_of(lines)] == ["a.py:1, in f", "b.py:2, in g"]


def test_without_a_place_the_texts_decide():
    one, other, third = (
        remains(error=ErrorReport(type="ValueError", message=text)) for text in ("1", "2", "a")
    )
    assert are_same(one, other)
    assert not are_same(one, third)


def test_other_tensors_that_are_not_finite_are_another_death():
    one, other = (
        remains(error=replace(ERROR, non_finite=NonFiniteReport(phase="rollout", tensors=(name,))))
        for name in ("reward", "obs")
    )
    assert are_same(one, one)
    assert not are_same(one, other)


def test_a_hang_is_the_same_in_the_same_function_of_the_user(tmp_path):
    def hangs(name, function, line):
        files = RunLayout(tmp_path / name).rank(0)
        files.directory.mkdir(parents=True)
        files.stacks.write_text(
            "No iteration has ended\n\nCurrent thread 0x2 (most recent call first):\n"
            '  File "/x/esper_lightning/recorder/watchdog.py", line 3 in _poll\n\n'
            "Thread 0x1 (most recent call first):\n"
            f'  File "/here/wait.py", line {line} in sleep_{line}\n'
            f'  File "/here/train.py", line {line} in {function}\n'
            '  File "/x/lightning/pytorch/call.py", line 7 in hook\n'
            '  File "/here/main.py", line 7 in main\n'
        )
        return remains(cause="hang", error=None, phases=("rollout",), directory=tmp_path / name)

    one, again, other = hangs("a", "f", 1), hangs("b", "f", 2), hangs("c", "g", 1)
    assert are_same(one, again)
    assert not are_same(one, other)
    assert not are_same(one, replace_phases(again))


def replace_phases(hung):
    return replace(hung, report=replace(hung.report, phases=("update",)))


def test_a_rank_that_lost_its_peer_has_no_text_to_compare():
    lost = remains(cause="peer", peer=PeerReport(rank=1, reason="it failed"))
    assert "left no report here" in other_text(lost, remains())
