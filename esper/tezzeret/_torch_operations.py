"""The operations of torch that a user's module may use, and how each is known to torch2jax.

`torch.export` gives operations of ATen; torch2jax knows the public functions of torch. An entry
is a public function's name below `torch`, and which of the operation's arguments it is called
with, in order. What is not here is refused by name.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Public:
    """The public function that an operation is."""

    function: str
    """Below `torch`, such as `nn.functional.gelu`."""
    arguments: tuple[str, ...]
    """Of the operation, in the order of the function's."""
    keywords: tuple[str, ...] = ()
    """Of the operation, passed by keyword; left out where they are not given."""


def _each(names: str, arguments: str, prefix: str = "") -> dict[str, Public]:
    return {name: Public(prefix + name, tuple(arguments.split())) for name in names.split()}


_F = "nn.functional."
_NORM = "weight bias eps"
_CONVOLUTION = "input weight bias stride padding dilation groups"
_POOL = "self kernel_size stride padding"

OPERATIONS: dict[str, Public] = {
    **_each(
        "tanh sigmoid exp log log1p expm1 sqrt rsqrt abs neg square reciprocal erf sin cos"
        " sign",
        "self",
    ),
    **_each("relu silu mish hardswish hardsigmoid relu6", "self", _F),
    **_each("leaky_relu", "self negative_slope", _F),
    **_each("elu", "self alpha", _F),
    **_each("softplus", "self beta threshold", _F),
    **_each("hardtanh", "self min_val max_val", _F),
    **_each("prelu", "self weight"),
    **_each("glu", "self dim", _F),
    "gelu": Public(_F + "gelu", ("self",), ("approximate",)),
    **_each("selu", "self", _F),
    "log_sigmoid": Public(_F + "logsigmoid", ("self",)),
    "add": Public("add", ("self", "other"), ("alpha",)),
    "sub": Public("sub", ("self", "other"), ("alpha",)),
    "rsub": Public("rsub", ("self", "other"), ("alpha",)),
    **_each("mul div maximum minimum gt lt ge le eq ne", "self other"),
    **_each("pow", "self exponent"),
    "clamp": Public("clamp", ("self",), ("min", "max")),
    **_each("where", "condition self other"),
    **_each("masked_fill", "self mask value"),
    **_each("matmul", "self other"),
    **_each("mm bmm", "self mat2"),
    "addmm": Public("addmm", ("self", "mat1", "mat2"), ("beta", "alpha")),
    **_each("einsum", "equation tensors"),
    **_each("linear", "input weight bias", _F),
    **_each("conv1d conv2d", _CONVOLUTION, _F),
    **_each("softmax log_softmax", "self dim"),
    **_each("layer_norm", f"input normalized_shape {_NORM}", _F),
    **_each("rms_norm", "input normalized_shape weight eps", _F),
    **_each("group_norm", f"input num_groups {_NORM}", _F),
    "batch_norm": Public(
        _F + "batch_norm",
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    ),
    "var": Public("var", ("self", "dim"), ("correction", "unbiased", "keepdim")),
    **_each("mean sum amax logsumexp", "self dim keepdim"),
    **_each("avg_pool1d avg_pool2d", f"{_POOL} ceil_mode count_include_pad", _F),
    **_each("max_pool1d max_pool2d", f"{_POOL} dilation ceil_mode", _F),
    **_each("adaptive_avg_pool1d adaptive_avg_pool2d", "self output_size", _F),
    "scaled_dot_product_attention": Public(
        _F + "scaled_dot_product_attention",
        ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
        ("scale",),
    ),
    **_each("reshape", "self shape"),
    **_each("transpose", "self dim0 dim1"),
    **_each("permute", "self dims"),
    "expand": Public("broadcast_to", ("self", "size")),
    **_each("cat stack", "tensors dim"),
    **_each("select", "self dim index"),
    "slice": Public("slice", ("self", "dim", "start", "end", "step")),
    **_each("pad", "self pad mode value", _F),
    **_each("pixel_shuffle", "self upscale_factor", _F),
    **_each("flip", "self dims"),
    "detach": Public("detach", ("self",)),
    "to": Public("to", ("self", "dtype")),
}  # fmt: skip
"""By their names in ATen."""
