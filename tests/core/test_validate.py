"""The one form of an error about what a user wrote."""

import re

import pytest

from esper_lightning.core.validate import require


def test_what_obeys_the_rule_passes() -> None:
    require(True, "Owner.field", "rule", 0)


@pytest.mark.parametrize(
    ("got", "hint", "message"),
    [
        (2.0, "", "PPOConfig.clip must lie in (0, 1), got 2.0."),
        ("a", "Try 0.2.", "PPOConfig.clip must lie in (0, 1), got 'a'. Try 0.2."),
        (None, "", "PPOConfig.clip must lie in (0, 1), got None."),
    ],
)
def test_the_error_names_field_rule_value_and_hint(got: object, hint: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        require(False, "PPOConfig.clip", "lie in (0, 1)", got, hint)
