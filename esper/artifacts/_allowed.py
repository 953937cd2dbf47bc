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
            "abs", "add", "and", "bitcast_convert", "broadcast_in_dim", "case", "clamp", "compare",
            "concatenate", "constant", "convert", "convolution", "cosine", "custom_call", "divide",
            "dot_general", "dynamic_broadcast_in_dim", "dynamic_gather", "dynamic_iota",
            "dynamic_reshape", "exponential", "exponential_minus_one", "gather",
            "get_dimension_size", "iota", "log", "log_plus_one", "logistic", "maximum", "minimum",
            "multiply", "negate", "not", "or", "pad", "power", "real_dynamic_slice", "reduce",
            "reduce_window", "remainder", "reshape", "return", "reverse", "rsqrt", "scatter",
            "select", "select_and_scatter", "shift_left", "shift_right_logical", "sign", "sine",
            "slice", "sqrt", "subtract", "tanh", "transpose",
        )
    ),
    *(f"chlo.{name}" for name in ("erf", "erfc", "broadcast_add", "erf_inv")),
}  # fmt: skip
"""Operations of StableHLO."""

ALLOWED_CALLS = {
    "abs", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "add", "addmm", "amax", "avg_pool1d",
    "avg_pool2d", "batch_norm", "bmm", "cat", "clamp", "conv1d", "conv2d", "cos", "detach", "div",
    "einsum", "elu", "eq", "erf", "exp", "expand", "expm1", "flip", "ge", "gelu", "glu",
    "group_norm", "gt", "hardsigmoid", "hardswish", "hardtanh", "layer_norm", "le", "leaky_relu",
    "linear", "log", "log1p", "log_sigmoid", "log_softmax", "logsumexp", "lt", "masked_fill",
    "matmul", "max_pool1d", "max_pool2d", "maximum", "mean", "minimum", "mish", "mm", "mul", "ne",
    "neg", "pad", "permute", "pixel_shuffle", "pow", "prelu", "reciprocal", "relu", "relu6",
    "reshape", "rms_norm", "rsqrt", "rsub", "scaled_dot_product_attention", "select", "selu",
    "sigmoid", "sign", "silu", "sin", "slice", "softmax", "softplus", "sqrt", "square", "stack",
    "sub", "sum", "t", "tanh", "tensor", "to", "transpose", "var", "where",
}  # fmt: skip
"""Functions of torch that a kernel may call."""
