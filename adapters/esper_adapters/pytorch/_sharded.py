"""Modules whose parameters FSDP spreads over the processes of a group."""

from torch import nn

from esper_functional import KasminaException


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP manages the module's own parameters; for the moment they may be whole."""
    # What torch itself goes by: there is no public way to ask.
    return getattr(module, "_is_fsdp_managed_module", False)


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Refuse what takes whole tensors.

    Raises:
        KasminaException: for a model of which any part is sharded.
    """
    if any(is_sharded(module) for module in model.modules()):
        raise KasminaException(
            f"{what}: {type(model).__name__} is sharded by FSDP, so this process holds parts of its"
            " tensors: wrap before fully_shard, and load a full state_dict into a model that is"
            " whole"
        )
