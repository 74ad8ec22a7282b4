"""``esper list`` names everything that a setting may name."""

from esper_lightning.cli import shipped
from esper_lightning.cli.main import main


def test_configs_environments_policies_and_extensions_are_described(capsys):
    main(["list"])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    described = {words[0]: words[1] for words in lines if len(words) == 2}
    assert {*shipped.names(), "CartPole", "Gymnasium", "Recurrent", "RND"} <= described.keys()
    assert described["walker2d"] == "Teaches two legs to walk: Gymnasium's Walker2d-v5."
    assert "EnvSpec" not in described
