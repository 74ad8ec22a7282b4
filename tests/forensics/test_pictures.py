"""A picture of this package is told from the picture of somebody else."""

import re

import pytest
from matplotlib.figure import Figure

from esper_lightning.forensics.pictures import PICTURE_BEGINS, PICTURE_METADATA


@pytest.mark.parametrize(("metadata", "is_ours"), [(PICTURE_METADATA, True), (None, False)])
def test_a_picture_is_known_by_its_first_bytes(tmp_path, metadata, is_ours):
    path = tmp_path / "picture.png"
    Figure(figsize=(1, 1)).savefig(path, metadata=metadata)
    found = re.match(PICTURE_BEGINS, path.read_bytes()[:512], re.DOTALL)
    assert (found is not None) == is_ours
