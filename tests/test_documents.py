"""The Python of documents runs as it is printed."""

import re
from pathlib import Path

import pytest

from tests import forked

DOCUMENTS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(
    "name", ["simulators.md", pytest.param("images.md", marks=pytest.mark.slow)]
)
def test_the_python_of_a_document_runs(name: str, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCUMENTS / name).read_text(), re.M | re.S)
    assert blocks
    done = forked.run(["-c", "\n".join(blocks)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
