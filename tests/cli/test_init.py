"""``esper init`` writes a project whose own tests pass, and never over files of the user."""

import subprocess
import sys

import pytest

from esper_lightning.cli.main import main


def test_the_environment_keeps_the_contract_and_the_config_is_valid(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["init", "project"])
    assert {path.name for path in (tmp_path / "project").iterdir()} == {
        *("README.md", "config.yaml", "environment.py", "test_environment.py"),
    }
    monkeypatch.chdir(tmp_path / "project")
    command = [sys.executable, "-m", "esper_lightning", "fit", "--config", "config.yaml"]
    done = subprocess.run(
        [*command, "--dry_run", "true"], capture_output=True, text=True, check=True
    )
    assert "64 environments x 50 steps" in done.stdout


@pytest.mark.slow  # 20 seconds
def test_the_tests_of_the_project_pass(tmp_path, monkeypatch):
    main(["init", str(tmp_path / "project")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=tmp_path / "project", capture_output=True, text=True, check=True
    )
    assert "2 passed" in done.stdout


def test_a_folder_with_files_is_refused(tmp_path, capsys):
    (tmp_path / "environment.py").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        main(["init", str(tmp_path)])
    assert caught.value.code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["environment.py"]
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_behind_a_missing_one_is_looked_at(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    with pytest.raises(SystemExit) as caught:
        main(["init", "new/../.."])
    assert (caught.value.code, (tmp_path / "README.md").read_text()) == (2, "mine")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main(["init", str(tmp_path / "file" / "project")])
    assert "must be a folder that can be made" in capsys.readouterr().err
