"""Runs are the same variant if they differ in nothing but their seed."""

import pytest

from esper_lightning.comparison.runs import read_run
from esper_lightning.comparison.variants import group


def names(*directories) -> dict[str, list[int]]:
    return {v.name: list(v.runs) for v in group([read_run(d) for d in directories])}


def test_variants_are_named_by_the_settings_that_differ(make_run):
    runs = [
        make_run("x/1", seed=1, settings={"learning_rate": 3e-3}),
        make_run("x/2", seed=1),
        make_run("x/3", seed=0, settings={"learning_rate": 3e-3}),
        make_run("x/4", seed=0),
    ]
    expected = {"ppo.learning_rate=0.003": [0, 1], "ppo.learning_rate=0.001": [0, 1]}
    assert names(*runs) == expected


def test_a_setting_that_another_version_lacks_differs(make_run):
    runs = [make_run("a"), make_run("b", settings={"new": 1})]
    assert list(names(*runs)) == ["ppo.new=(absent)", "ppo.new=1"]


def test_variants_with_many_settings_are_named_by_their_folders(make_run):
    settings = {"learning_rate": 1, "clip": 0.1, "epochs": 3, "minibatches": 1}
    runs = [make_run("base/seed0"), make_run("other/seed0", settings=settings)]
    assert list(names(*runs)) == ["base", "other"]


def test_variants_with_equal_settings_are_distinguished_by_their_folders(make_run):
    runs = [make_run(f"{code}/seed{k}", seed=k) for code in ("old", "new") for k in (0, 1)]
    assert names(*runs) == {"old": [0, 1], "new": [0, 1]}
    with_rate = [
        make_run(f"{code}/fast{k}", seed=k, settings={"learning_rate": 3e-3})
        for code in ("old", "new")
        for k in (0, 1)
    ]
    found = [name.rpartition("/")[2] for name in names(*runs, *with_rate)]
    rates = ("0.001", "0.003")
    assert found == [f"{code}: ppo.learning_rate={r}" for r in rates for code in ("old", "new")]


def test_the_same_seed_twice_is_refused(make_run):
    with pytest.raises(ValueError, match=r"one run of seed 0, got '.*version_0 and .*version_1'"):
        names(make_run("a/version_0"), make_run("a/version_1"))


def test_one_class_under_two_paths_is_one_environment(make_run):
    here, there = make_run("a"), make_run("b", settings={"clip": 0.1})
    config = there / "config.yaml"
    config.write_text(config.read_text().replace("envs.CartPole", "envs.cartpole.CartPole"))
    assert list(names(here, there)) == ["ppo.clip=0.2", "ppo.clip=0.1"]


def test_other_environments_are_refused(make_run):
    first, other = make_run("a"), make_run("b", env={"num_envs": 20})
    match = r"model\.env\.num_envs must be the same in all runs, got '10 in .*a and 20 in .*b'"
    with pytest.raises(ValueError, match=match):
        names(first, other)
    pendulum = make_run("c")
    config = pendulum / "config.yaml"
    config.write_text(config.read_text().replace("CartPole", "Pendulum"))
    with pytest.raises(ValueError, match=r"model\.env\.class_path must be the same"):
        names(first, pendulum)


def test_variants_without_a_common_seed_are_refused(make_run):
    with pytest.raises(ValueError, match=r"a seed in common.*clip=0.2: 0; ppo.clip=0.1: 1"):
        names(make_run("a"), make_run("b", seed=1, settings={"clip": 0.1}))


def test_a_setting_that_only_the_later_environment_has_makes_it_another(make_run):
    first, later = make_run("a"), make_run("b", env={"time_limit": 7}, settings={"clip": 0.1})
    for runs in ((first, later), (later, first)):
        with pytest.raises(ValueError, match=r"model\.env\.time_limit must be the same"):
            names(*runs)


@pytest.mark.parametrize("own", ["version_0", "seed0", "seed-12", "3"])
def test_a_folder_that_has_the_number_of_a_run_names_no_variant(make_run, own):
    settings = {"learning_rate": 1, "clip": 0.1, "epochs": 3, "minibatches": 1}
    runs = [make_run(f"base/{own}"), make_run(f"other/{own}", settings=settings)]
    assert list(names(*runs)) == ["base", "other"]
    alone = [make_run("x/fast"), make_run("x/slow", settings=settings)]
    assert list(names(*alone)) == ["fast", "slow"]
