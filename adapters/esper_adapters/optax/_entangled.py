"""States that look like one entry per parameter and are not.

What these hold for one parameter means something only beside what they hold
for the others, or for the network that they were measured on. Fitted to other
parameters they would have the right shapes and the wrong contents.
"""

from typing import Any, NamedTuple

import jax
import optax
import optax.contrib

from esper_adapters.optax._errors import OptimizerSurgeryError


class _Refusal(NamedTuple):
    reason: str
    growth_alone: bool
    """Whether only new parameters are the trouble."""


_LINE_SEARCH = _Refusal(
    "it keeps the objective's value and gradient, which were those of the network as it was",
    growth_alone=False,
)
_REFUSALS: dict[type, _Refusal] = {
    optax.ScaleByLBFGSState: _Refusal(
        "its memory holds products over all parameters, and a new parameter would enter it with a"
        " difference from zero",
        growth_alone=False,
    ),
    optax.ScaleByZoomLinesearchState: _LINE_SEARCH,
    optax.ScaleByBacktrackingLinesearchState: _LINE_SEARCH,
    optax.contrib.GaLoreState: _Refusal(
        "it makes projections every `update_proj_gap` steps by one count for all, and a new"
        " parameter would stand still until then",
        growth_alone=True,
    ),
}


def refuse_entangled(state: Any, *, grows: bool) -> None:
    """Refuse a state that cannot be fitted to other parameters.

    Args:
        grows: whether there are parameters without a state of their own.

    Raises:
        OptimizerSurgeryError: naming the first such state in the tree.
    """
    classes = tuple(_REFUSALS)
    nodes = jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda node: isinstance(node, classes)
    )
    for path, node in nodes:
        refusal = _REFUSALS.get(type(node))
        if refusal is not None and (grows or not refusal.growth_alone):
            raise OptimizerSurgeryError(
                f"carry: {type(node).__name__} at {jax.tree_util.keystr(path) or '.'} cannot be"
                f" carried to other parameters: {refusal.reason}. Start it afresh with"
                " optimizer.init(new_params), or take an optimiser that keeps one state per"
                " parameter, such as optax.adam"
            )
