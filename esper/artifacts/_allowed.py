"""What the programs of an artifact may use: everything else is refused.

Lists of what is allowed, never of what is not: torch alone has 4,000 operations, and gets more.
"""

ALLOWED_CUSTOM_CALLS = {"shape_assertion"}
"""Targets of custom calls in StableHLO."""

ALLOWED_OPS = {
    "builtin.module", "func.func", "func.call", "func.return",
    *(
        f"stablehlo.{name}"
        for name in (
            "abs", "add", "and", "broadcast_in_dim", "case", "clamp", "compare", "concatenate",
            "constant", "convert", "convolution", "custom_call", "divide", "dot_general",
            "dynamic_broadcast_in_dim", "dynamic_iota", "dynamic_reshape", "exponential",
            "exponential_minus_one",
            "get_dimension_size", "iota", "log", "log_plus_one", "logistic", "maximum", "minimum",
            "multiply", "negate", "not", "or", "pad", "power", "real_dynamic_slice", "reduce",
            "reduce_window", "remainder", "reshape", "return", "reverse", "rsqrt",
            "select", "sign", "slice", "sqrt", "subtract", "tanh", "transpose",
        )
    ),
    *(f"chlo.{name}" for name in ("erf", "erfc", "broadcast_add", "erf_inv")),
}  # fmt: skip
"""Operations of StableHLO."""

ALLOWED_CALLS = {
    "add", "avg_pool1d", "avg_pool2d", "batch_norm", "cat", "conv1d", "conv2d", "elu", "gelu",
    "group_norm", "layer_norm", "linear", "matmul", "max_pool1d", "max_pool2d", "mean", "mul",
    "relu", "reshape", "rms_norm", "scaled_dot_product_attention", "sigmoid", "silu", "softmax",
    "softplus", "t", "tanh", "transpose",
}  # fmt: skip
"""Functions of torch that a kernel may call."""
