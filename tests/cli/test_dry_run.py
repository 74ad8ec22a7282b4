"""``--dry_run`` says what a run would do, and leaves nothing."""

import pytest

from esper_lightning.cli.main import main

FIT = ("fit", "--config", "cartpole", "--trainer.accelerator=cpu", "--dry_run")


def said(capsys, *words) -> dict[str, str]:
    main([*FIT, *words])
    lines = capsys.readouterr().out.splitlines()
    return {name: text.strip() for name, _, text in (line.partition(":") for line in lines)}


@pytest.mark.parametrize("run_dir", [(), ("--run_dir=somewhere/run",)])
def test_the_plan_of_a_new_run(capsys, tmp_path, monkeypatch, run_dir):
    monkeypatch.chdir(tmp_path)
    plan = said(capsys, *run_dir, "--model.total_env_steps=10_000")
    assert plan["Iteration"] == "64 environments x 32 steps = 2,048 env steps on each rank"
    assert plan["Length"] == "5 iterations to 10,000 env steps"
    assert plan["Directory"].endswith("(new)")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [["--dry_run=true"], ["--dry_run", "--model.redeal"]])
def test_a_switch_needs_no_value(capsys, tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    main([*FIT[:-1], *more])
    assert "Task:" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit):
        main([*FIT[:-1], "--dry_run", "maybe"])
    assert "dry_run must be true or false, got 'maybe'" in capsys.readouterr().err


def test_nothing_is_trained_of_a_bare_run_either(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = said(capsys, "--trainer.barebones=true", "--model.total_env_steps=10_000")
    assert plan["Length"] == "5 iterations to 10,000 env steps"


def test_mistakes_are_found_without_a_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([*FIT, "--model.ppo.minibatches=7"])
    assert "minibatches" in capsys.readouterr().err
