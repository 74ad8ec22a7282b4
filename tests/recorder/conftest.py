"""What the tests of the recorder share."""

import pytest

from esper_lightning.forensics.layout import RunLayout


@pytest.fixture
def files(tmp_path):
    """Folder of the first rank in a run directory, which is the test's own folder."""
    files = RunLayout(tmp_path).rank(0)
    files.directory.mkdir()
    return files
