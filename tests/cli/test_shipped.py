"""Configs of the package are found by name, and every config has a name."""

import pytest

from esper_lightning.cli import shipped


def test_a_name_is_the_path_of_a_shipped_config_wherever_it_stands():
    words = ["fit", "--config", "cartpole", "--config=ddp", "--model.seed", "cartpole"]
    paths = [str(shipped.FOLDER / f"{name}.yaml") for name in ("cartpole", "ddp")]
    expected = ["fit", "--config", paths[0], f"--config={paths[1]}", "--model.seed", "cartpole"]
    assert shipped.with_paths(words) == expected


@pytest.mark.parametrize("word", ["own.yaml", "folder/own", "{model: {}}", "", "../cartpole"])
def test_paths_and_settings_stay_as_they_are(word):
    assert shipped.with_paths(["--config", word]) == ["--config", word]


def test_a_file_here_comes_before_a_shipped_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cartpole").touch()
    assert shipped.with_paths(["--config", "cartpole"]) == ["--config", "cartpole"]


@pytest.mark.parametrize(
    ("word", "said"), [("hoper", "The nearest is 'hopper'."), ("zzz", "Shipped are: acrobot, ")]
)
def test_an_unknown_name_is_one_line_that_helps(word, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        shipped.with_paths(["--config", word])
    assert said in capsys.readouterr().err


def test_every_shipped_config_can_be_named():
    names = shipped.names()
    assert {"cartpole", "hopper", "morphogenesis"} <= set(names)
    for name in names:
        assert shipped.with_paths(["--config", name]) != ["--config", name]
