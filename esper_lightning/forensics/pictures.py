"""The mark of this package's pictures, by which they are known among others."""

__all__ = ["PICTURE_BEGINS", "PICTURE_METADATA"]

PICTURE_METADATA = {"Software": "esper_lightning"}
"""Metadata with which ``matplotlib`` writes a picture: a text in the first bytes of a PNG file."""
PICTURE_BEGINS = rb"\x89PNG.*tEXtSoftware\0esper_lightning"
"""Regular expression for the first bytes of a PNG file with ``PICTURE_METADATA``."""
