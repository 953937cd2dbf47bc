"""Signatures that each blueprint of the library claims, small enough to compile many of them."""

from esper.contracts import KernelSignature
from esper.tezzeret import blueprint_names, load_blueprint
from tests.depth import depth

SHAPES = {
    "vector": ("6->6", "3->5"),
    "sequence": ("4x8->4x8", "5x6->5x4"),
    "signal": ("4x9->4x9", "3x8->5x4"),
    "image": ("4x6x6->4x6x6", "3x8x6->6x4x3"),
}
"""The same features, and others, with a stride where there is space."""


def claimed(name: str, dtype: str = "float32") -> list[KernelSignature]:
    blueprint = load_blueprint(name)
    texts = [text for kind in blueprint.takes for text in SHAPES[kind]]
    signatures = [KernelSignature.parse(f"{text} {dtype}") for text in texts]
    return [s for s in signatures if blueprint.fits == "any" or s.input_shape == s.output_shape]


# Compiling takes seconds: a few signatures in float32, of all kinds that a blueprint takes, and one
# in bfloat16.
CLAIMS = [
    (name, signature)
    for name in blueprint_names()
    for signature in (
        *depth(claimed(name)[::2][:2], claimed(name)[:3]),
        claimed(name, "bfloat16")[-1],
    )
]
