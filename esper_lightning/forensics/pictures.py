"""What all pictures of this package share: the mark by which they are known, and colours."""

__all__ = ["PALETTE", "PICTURE_BEGINS", "PICTURE_METADATA"]

PICTURE_METADATA = {"Software": "esper_lightning"}
"""Metadata with which ``matplotlib`` writes a picture: a text in the first bytes of a PNG file."""
PICTURE_BEGINS = rb"\x89PNG.*tEXtSoftware\0esper_lightning"
"""Regular expression for the first bytes of a PNG file with ``PICTURE_METADATA``."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The colours of Okabe and Ito for lines and marks, which colour-blind readers can distinguish.

Pages have tones of the same colours that are readable on a light and on a dark background
(``cli/pages/page.css``).
"""
