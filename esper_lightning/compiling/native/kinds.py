"""Kinds of operations, by how their results depend on samples: what ``rules`` tells apart."""

__all__ = [
    "ADDS",
    "ELEMENTS",
    "MOVES",
    "POOLS",
    "REDUCTIONS",
    "SAME",
    "TURNS",
    "VALUES",
    "sizes_at",
]

SAME = {"_to_copy", "alias", "clone", "detach", "lift_fresh_copy", "neg"}
ADDS = {"add", "sub", "rsub"}
ELEMENTS = {  # operations on elements, but for those that are linear
    *("__lshift__", "__rshift__", "bitwise_left_shift", "bitwise_right_shift"),
    *("abs", "acos", "addcdiv", "addcmul", "asin", "atan", "atan2", "bitwise_and", "bitwise_not"),
    *("bitwise_or", "bitwise_xor", "ceil", "clamp", "clamp_max", "clamp_min", "cos", "cosh"),
    *("copysign", "deg2rad", "elu", "elu_backward", "eq", "erf", "exp", "exp2", "expm1", "floor"),
    *("floor_divide", "fmax", "fmin", "fmod", "frac", "ge", "gelu", "heaviside", "hypot", "log2"),
    *("log10", "logaddexp", "rad2deg", "signbit", "xlogy"),
    *("gelu_backward", "gt", "isinf", "isnan", "le", "lerp", "log", "log1p", "logical_and"),
    *("logical_not", "logical_or", "logical_xor", "lt", "maximum", "minimum", "nan_to_num", "ne"),
    *("pow", "reciprocal", "relu", "remainder", "round", "rsqrt", "sgn", "sigmoid"),
    *("sigmoid_backward", "sign", "silu", "silu_backward", "sin", "sinh", "softplus"),
    *("softplus_backward", "sqrt", "tan", "tanh", "tanh_backward", "threshold_backward", "trunc"),
}
MOVES = {  # elements, unchanged: torch moves the codes
    *("cat", "diagonal", "flip", "permute", "roll", "select", "select_backward", "select_scatter"),
    *("slice", "slice_backward", "slice_scatter", "split", "split_with_sizes", "squeeze", "stack"),
    *("t", "transpose", "unbind", "unfold", "unsafe_split", "unsqueeze"),
}
TURNS = {"permute", "squeeze", "t", "transpose", "unsqueeze"}  # moves that leave no element out
REDUCTIONS = {  # and the position of their axes
    **dict.fromkeys(
        ("all", "amax", "amin", "any", "argmax", "argmin", "max", "mean", "min", "sum", "var"), 1
    ),
    **dict.fromkeys(("logsumexp", "prod", "std"), 1),
    "linalg_vector_norm": 2,
}
POOLS = {
    *("_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward", "avg_pool2d"),
    *("avg_pool2d_backward", "max_pool2d_with_indices", "max_pool2d_with_indices_backward"),
}
VALUES = {"fill": 1, "full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}  # positions


_SIZES = {  # positions of shapes, which may depend on the number of samples
    **dict.fromkeys(("full", "ones", "zeros"), 0),
    **dict.fromkeys(("_unsafe_view", "expand", "new_full", "new_ones", "new_zeros", "view"), 1),
    **dict.fromkeys(("select_backward", "slice_backward"), 1),
}


def sizes_at(name: str) -> int | None:
    """Position of the argument of an operation that is a shape."""
    return _SIZES.get(name)
