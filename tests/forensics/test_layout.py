"""The files of a run are where other programs look for them."""

from fnmatch import fnmatch
from pathlib import Path

from esper_lightning.forensics.layout import OF_A_RUN, RankLayout, RunLayout

RUN = RunLayout(Path("run"))


def test_the_files_of_a_run_have_the_names_that_are_documented():
    ours = {RUN.config, RUN.best_checkpoint, RUN.last_checkpoint, RUN.owner}
    names = ("config.yaml", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "owner.lock")
    assert ours == {Path("run", name) for name in names}
    rank = RUN.rank(3)
    documented = ("history.jsonl", "crash.json", "trace", "profile.txt", "stacks.txt")
    ours = {rank.history, rank.crash, rank.trace, rank.profile, rank.stacks, rank.memory}
    assert ours == {Path("run", "rank3", name) for name in (*documented, "memory.pickle")}


def test_no_two_files_of_a_rank_have_the_same_name():
    rank = RUN.rank(0)
    names = [name for name, value in vars(RankLayout).items() if isinstance(value, property)]
    names.remove("directory")
    values = [getattr(rank, name) for name in names]
    paths = [path for value in values for path in ([value] if isinstance(value, Path) else value)]
    assert len(set(paths)) == len(paths) >= 12
    assert {path.parent for path in paths} == {rank.directory}


def test_every_file_of_a_run_is_in_the_list_of_names_that_are_refused_as_those_of_others():
    names = [name for name, value in vars(RunLayout).items() if isinstance(value, property)]
    paths = [getattr(RUN, name) for name in names if name not in ("directory", "owner")]
    paths += [RUN.rank(12).directory]
    relative = [path.relative_to(RUN.directory).as_posix() for path in paths]
    assert len(relative) >= 11
    assert [
        name for name in relative if not any(fnmatch(name, pattern) for pattern in OF_A_RUN)
    ] == []
