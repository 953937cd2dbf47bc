"""What a run has grown, so that a control can have it from the beginning."""

from pathlib import Path
from typing import NamedTuple

from esper.contracts import KernelSignature
from esper.errors import RunFolderError
from esper.tezzeret import compile_blueprint, kernel_recipe, read_blueprint
from esper.tolaria._fold import Fold
from esper.tolaria._ledger import read_ledger
from esper.tolaria._replay import site_count
from esper.tolaria._run_folder import open_run
from esper.urza import Library
from esper_functional import EventKind, running_seeds

FRESH = 1_000_000
"""From here on are the initialisation seeds of kernels that no controller chooses from."""


class KeptKernel(NamedTuple):
    """A kernel that runs at the end of a run."""

    site: str
    seed: int
    kernel: str


def kept_kernels(run: Path) -> list[KeptKernel]:
    """The kernels that run at the end of a run, by place.

    Raises:
        RunFolderError: where there is no run, or one that does not name its layers.
        LedgerError: where its ledger is damaged.
    """
    folder = open_run(run)
    if folder.host is None:
        raise RunFolderError(
            f"the run {run} was begun by an older Esper and does not name its host's layers: begin"
            " another run"
        )
    fold = Fold(site_count(folder), folder.config.seeds_per_layer)
    for entry in read_ledger(folder.ledger, folder.genesis):
        fold.take(entry, folder.ledger)
    newest = {
        (int(e.data["layer"]), int(e.data["seed"])): str(e.data["kernel"])
        for e in fold.history
        if e.data["kind"] == EventKind.ACTIVATE
    }
    return [
        KeptKernel(folder.host.sites[layer], seed, newest[layer, seed])
        for layer, seed in running_seeds(fold.state)
    ]


def fresh_kernels(kept: list[KeptKernel], library: Library, random_seed: int) -> list[KeptKernel]:
    """Kernels of the same blueprints and sizes with first parameters that nobody chose.

    Args:
        random_seed: of the run that they are for.
    """
    return [
        own._replace(kernel=_fresh(own.kernel, library, FRESH + 1_000 * random_seed + place))
        for place, own in enumerate(kept)
    ]


def _fresh(kernel_id: str, library: Library, init_seed: int) -> str:
    artifact = library.get(kernel_id)
    if artifact.blueprint is None:
        # A user's own kernel has the parameters that it came with.
        return kernel_id
    blueprint = read_blueprint(artifact.blueprint, f"the blueprint of kernel {kernel_id[:12]}")
    signature: KernelSignature = artifact.manifest.signature
    sizes = dict(artifact.manifest.sizes)
    recipe = kernel_recipe(blueprint, signature, sizes=sizes, init_seed=init_seed)
    known = library.find(recipe=recipe)
    if known:
        return known[0].kernel_id
    made = compile_blueprint(blueprint, signature, sizes=sizes, init_seed=init_seed)
    return library.put(made)
