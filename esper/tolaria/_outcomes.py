"""What a run tells the library: which kernels it needs, and what each of them did."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from esper.contracts import KernelOutcome
from esper.errors import LibraryError
from esper.nissa import RunRecord
from esper.tolaria._run_folder import RunFolder
from esper.urza import Library

_LEAVES = {"unload", "cancel", "fail", "reset"}
_STAYS = {"fossilize", "fold"}


def refer(library: Library, folder: RunFolder) -> None:
    """Have the library keep the kernels that a run chooses from, and those that it is told to use.

    Raises:
        LibraryError: where one of them is not there, or the library cannot be written.
    """
    config = folder.config
    named = {graft.kernel for graft in config.initial_grafts}
    named |= {own.kernel for own in config.schedule_of_grafts if own.kernel is not None}
    needed = {each for ids in folder.kernels.values() for each in ids} | named
    library.refer(folder.genesis, needed)


def tell_outcomes(library: Library, folder: RunFolder, record: RunRecord) -> None:
    """Tell the library what the kernels of a run that has ended did.

    A library that can only be read is not told: the run is what it is without that.
    """
    try:
        library.record_outcomes(list(outcomes_of(folder, record)))
    except LibraryError:
        return


def outcomes_of(folder: RunFolder, record: RunRecord) -> Iterator[KernelOutcome]:
    """An outcome for each stay of a kernel in a seed: what was last measured of it there.

    Of a stay in which nothing finite was measured there is none, and none of what was taken back.
    """
    sites = dict(enumerate(folder.host.sites if folder.host is not None else ()))
    for kernel_id, worth, kept in _stays(
        entry for i, entry in enumerate(record.events) if i not in record.undone
    ):
        layer = worth["layer"]
        yield KernelOutcome(
            run_id=folder.genesis,
            kernel_id=kernel_id,
            layer=layer,
            seed=worth["seed"],
            site=sites.get(layer, ""),
            task=folder.config.task,
            backend=folder.config.backend,
            step=worth["step"],
            gain=worth["value"],
            low=worth["low"],
            high=worth["high"],
            kept=kept,
        )


def _stays(entries: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """The kernel of each stay, the last worth that was measured in it, and whether it was kept."""
    kernels: dict[tuple[int, int], str] = {}
    worths: dict[tuple[int, int], Mapping[str, Any]] = {}
    for entry in entries:
        if "layer" not in entry:
            continue
        place = (entry["layer"], entry["seed"])
        kind = entry["kind"]
        if kind == "load":
            kernels[place] = entry["kernel"]
        elif kind == "worth" and entry["value"] is not None and place in kernels:
            worths[place] = entry
        elif kind in _LEAVES or kind in _STAYS:
            kernel_id, worth = kernels.pop(place, None), worths.pop(place, None)
            if kernel_id is not None and worth is not None:
                yield kernel_id, worth, kind in _STAYS
    for place, worth in worths.items():
        yield kernels[place], worth, True
