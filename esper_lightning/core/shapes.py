"""Shape annotations: jaxtyping where it is installed, plain types where it is not.

jaxtyping is only needed to *check* shapes, which the test run does; the package must import without
it. Axes: ``T`` rollout step, ``B`` environment, ``M`` minibatch sample, ``O`` observation feature,
``A`` action component, ``K`` choice. Strings of one axis have a leading space (``" B"``) so that
linters do not take the axis for a name.
"""

from typing import TYPE_CHECKING

__all__ = ["Bool", "Float", "Int", "Shaped", "UInt8"]

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped, UInt8
else:
    try:
        from jaxtyping import Bool, Float, Int, Shaped, UInt8
    except ModuleNotFoundError:

        class Bool:
            """``Bool[Tensor, "B"]`` is ``Tensor``."""

            def __class_getitem__(cls, item):
                """Drop the axes."""
                return item[0]

        Float = Int = Shaped = UInt8 = Bool
