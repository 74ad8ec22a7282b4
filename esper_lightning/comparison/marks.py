"""Returns of a run that is still training, at each tenth of its budget."""

import math
from pathlib import Path
from typing import Any, NamedTuple, cast

from esper_lightning.comparison.runs import SCORES, read_yaml
from esper_lightning.forensics.layout import RunLayout
from esper_lightning.forensics.reading import open_file, parse_json, whole_number

__all__ = ["Mark", "Marks"]


class Mark(NamedTuple):
    """A place in a run.

    Attributes:
        percent: Share of the budget: 10, 20, ... 90.
        episode_return: Mean of the returns in the rows since the mark before.
    """

    percent: int
    episode_return: float


class Marks:
    """The marks that a run passes, read from its history as it grows."""

    def __init__(self, run: Path) -> None:
        layout = RunLayout(run)
        self._config, self._history = layout.config, layout.rank(0).history
        self._budget: int | None = None
        self._offset = 0
        self._passed = 0
        self._returns: list[float] = []

    def passed(self) -> list[Mark]:
        """The marks that the run has passed since the last call.

        There are none while the run has no history, and none of a run without a budget in env
        steps. Marks between two rows are passed at once: the last of them counts.

        Raises:
            ValueError: If the config of the run cannot be read.
        """
        marks: list[Mark] = []
        for row in self._new_rows():
            value = row.get(SCORES["rollout"])
            if isinstance(value, int | float) and math.isfinite(value):
                self._returns.append(value)
            env_steps = whole_number(row.get("env_steps")) or 0
            budget = self._known_budget()
            percent = 10 * (10 * env_steps // budget) if budget else 0
            if self._passed < percent < 100 and self._returns:
                marks.append(Mark(percent, sum(self._returns) / len(self._returns)))
                self._passed, self._returns = percent, []
        return marks

    def _known_budget(self) -> int:
        """Env steps that the run is to take; 0 where the Trainer decides."""
        if self._budget is None:
            model: dict[str, Any] = read_yaml(self._config)["model"]
            self._budget = whole_number(model.get("total_env_steps")) or 0
        return self._budget

    def _new_rows(self) -> list[dict[str, Any]]:
        """Rows that were appended since the last call."""
        try:
            with open_file(self._history) as file:
                file.seek(self._offset)
                content = file.read()
        except (FileNotFoundError, ValueError):
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        rows: list[Any] = [parse_json(line) for line in whole.splitlines()]
        return [cast(dict[str, Any], row) for row in rows if isinstance(row, dict)]
