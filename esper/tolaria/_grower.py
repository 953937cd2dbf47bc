"""What becomes of decisions: how a kernel comes into a network, and how it leaves."""

from collections.abc import Callable

import numpy as np

from esper.artifacts import Artifact
from esper.cache import KernelCache
from esper.errors import EsperError
from esper.tamiyo import Action, Decision, Probe
from esper.tolaria._config import GrowConfig
from esper.tolaria._course import Course, Graft
from esper.tolaria._journal import Journal
from esper.tolaria._trainee import Params, Trainee
from esper.tolaria.initialisations import initialise
from esper.urza import Library
from esper_functional import Event, EventKind, KernelMismatchError, SeedLifecycleState

_KINDS = {
    Action.FOSSILIZE: EventKind.FOSSILIZE,
    Action.UNLOAD: EventKind.UNLOAD,
    Action.RESET: EventKind.RESET,
}


def per_position(probe: Probe, rank: int) -> Probe:
    """A probe whose examples are what a kernel sees: positions, where its examples are shorter.

    Args:
        rank: of a kernel's example.
    """
    if probe.inputs.ndim <= rank + 1:
        return probe

    def flat(array: np.ndarray) -> np.ndarray:
        return array.reshape(-1, *array.shape[array.ndim - rank :])

    inputs, outputs, gradients = map(flat, (probe.inputs, probe.outputs, probe.gradients))
    return Probe(inputs, outputs, gradients, probe.loss)


def _first_line(error: Exception) -> str:
    """What an error says first, for a record of one line."""
    return str(error).partition("\n")[0][:500]


class Grower:
    """Changes a trainee's seeds, and records every change.

    A graft is LOADING for a set number of steps, in which its program is compiled; then it is
    there at alpha 0, incubates where the run says so, and is ramped up.

    Args:
        kernels: keeps those that were read; others are read from the library.
        course: what is remembered of the grafts; may be exchanged.
        probe: measures what a layer row sees.
    """

    def __init__(
        self,
        *,
        trainee: Trainee,
        journal: Journal,
        library: Library,
        kernels: KernelCache,
        config: GrowConfig,
        course: Course,
        probe: Callable[[int, int], Probe],
    ) -> None:
        self._trainee = trainee
        self._journal = journal
        self._library = library
        self._kernels = kernels
        self._config = config
        self._probe = probe
        self.course = course

    def artifact(self, kernel_id: str) -> Artifact:
        """A kernel, from memory where it is there.

        Raises:
            LibraryError: where there is none of that id, or it cannot be read.
            ArtifactError: where it is damaged.
        """
        found = self._kernels.load_kernel_sync(kernel_id)
        if found is None:
            found = self._library.get(kernel_id)
            self._kernels.put(found)
        return found

    def loading(self) -> list[Artifact]:
        """The kernels that are on their way."""
        stages = np.asarray(self._trainee.seeds.stage)
        return [
            self.artifact(graft.kernel_id)
            for slot, graft in sorted(self.course.grafts.items())
            if stages[self._place(slot)] == SeedLifecycleState.LOADING
        ]

    def next_due(self) -> int | None:
        """The step at which a graft goes on."""
        due = [graft.due for graft in self.course.grafts.values() if graft.due is not None]
        return min(due, default=None)

    def _place(self, slot: int) -> tuple[int, int]:
        return divmod(slot, self._config.seeds_per_layer)

    def _stage(self, slot: int) -> SeedLifecycleState:
        return SeedLifecycleState(int(self._trainee.seeds.stage[self._place(slot)]))

    def _change(
        self,
        event: Event,
        reason: str = "",
        artifact: Artifact | None = None,
        params: Params | None = None,
    ) -> None:
        self._trainee.apply(event, artifact, params)
        self._journal.events([(event, reason)])

    # Coming in.

    def _load(self, step: int, slot: int, graft: Graft, reason: str) -> None:
        layer, seed = self._place(slot)
        load = Event(step, layer, seed, EventKind.LOAD, graft.kernel_id, float(slot))
        self._change(load, reason)
        self.course.grafts[slot] = graft
        self.course.grafted += 1

    def _failed(self, step: int, slot: int, error: Exception) -> None:
        layer, seed = self._place(slot)
        graft = self.course.grafts.pop(slot)
        fail = Event(step, layer, seed, EventKind.FAIL, graft.kernel_id)
        self._change(fail, _first_line(error))

    def unusable(self, layer: int, kernel_id: str) -> str | None:
        """Why a kernel cannot be grafted in a layer row; None where it can."""
        try:
            own = self.artifact(kernel_id).manifest.signature
            fits = self._trainee.signature(layer)
        except EsperError as error:
            return _first_line(error)
        if own == fits:
            return None
        return (
            f"kernel {kernel_id[:12]} is for {own}, and {self._trainee.sites[layer]} takes {fits}"
        )

    def graft(self, step: int, decision: Decision) -> None:
        """Ask for a kernel; its program begins to compile."""
        slot = decision.layer * self._config.seeds_per_layer + decision.seed
        graft = Graft(
            decision.kernel_id,
            asked=step,
            target=decision.alpha,
            initialisation=decision.initialisation or self._config.initialisation,
            due=step + self._config.loading_steps,
        )
        self._load(step, slot, graft, decision.reason)
        coming = Event(
            graft.due or step, decision.layer, decision.seed, EventKind.ACTIVATE, graft.kernel_id
        )
        try:
            artifact = self.artifact(graft.kernel_id)
            incubates = self._config.incubation_steps > 0
            self._trainee.prepare(coming, artifact, incubate=incubates)
        except (EsperError, KernelMismatchError) as error:
            self._failed(step, slot, error)

    def graft_at_once(self, layer: int, seed: int, kernel_id: str) -> None:
        """A kernel that is there from step 0, at alpha 1."""
        slot = layer * self._config.seeds_per_layer + seed
        self._load(0, slot, Graft(kernel_id, asked=0, born=0), "there from the start")
        event = Event(0, layer, seed, EventKind.ACTIVATE, kernel_id, 1.0)
        self._change(event, artifact=self.artifact(kernel_id))

    def go_on(self, step: int) -> None:
        """Graft what has been LOADING for its time, and blend what has incubated for its."""
        for slot, graft in sorted(self.course.grafts.items()):
            if graft.due != step:
                continue
            if graft.born is None:
                self._activate(step, slot, graft)
            elif self._stage(slot) is SeedLifecycleState.ACTIVE:
                self._ramp(step, slot, graft)
            else:
                graft.due = None

    def _activate(self, step: int, slot: int, graft: Graft) -> None:
        layer, seed = self._place(slot)
        event = Event(step, layer, seed, EventKind.ACTIVATE, graft.kernel_id, 0.0)
        try:
            artifact = self.artifact(graft.kernel_id)
            params, told = self._first_params(step, layer, graft, artifact)
            self._change(event, told, artifact, params)
        except (EsperError, KernelMismatchError) as error:
            self._failed(step, slot, error)
            return
        graft.born = step
        if self._config.incubation_steps:
            self._change(Event(step, layer, seed, EventKind.INCUBATE, graft.kernel_id))
            graft.due = step + self._config.incubation_steps
        else:
            self._ramp(step, slot, graft)

    def _first_params(
        self, step: int, layer: int, graft: Graft, artifact: Artifact
    ) -> tuple[Params | None, str]:
        if graft.initialisation == "as_compiled":
            return None, ""
        random = np.random.default_rng([self._config.seed, 3, step, layer])
        probe = per_position(self._probe(layer, step), len(artifact.manifest.signature.input_shape))
        params = initialise(
            graft.initialisation, artifact, probe, random=random, blend=self._config.blend
        )
        return params, f"first parameters by {graft.initialisation}"

    def _ramp(self, step: int, slot: int, graft: Graft) -> None:
        layer, seed = self._place(slot)
        graft.due = None
        self._change(self._ramp_event(step, layer, seed, graft.target))

    def _ramp_event(self, step: int, layer: int, seed: int, target: float) -> Event:
        return Event(
            step, layer, seed, EventKind.RAMP,
            value=target, span=self._config.ramp_steps, shape=self._config.ramp,
        )  # fmt: skip

    # Leaving, or staying for good.

    def obey(self, step: int, decision: Decision) -> None:
        """Do what a decision asks for."""
        if decision.action is Action.GRAFT:
            self.graft(step, decision)
            return
        layer, seed = decision.layer, decision.seed
        slot = layer * self._config.seeds_per_layer + seed
        if decision.action is Action.RETARGET:
            if slot in self.course.grafts:
                self.course.grafts[slot].due = None
            self._change(self._ramp_event(step, layer, seed, decision.alpha), decision.reason)
            return
        graft = self.course.grafts.get(slot)
        kernel_id = "" if graft is None else graft.kernel_id
        self._change(Event(step, layer, seed, _KINDS[decision.action], kernel_id), decision.reason)
        if graft is not None:
            graft.due = None
            if decision.action is not Action.FOSSILIZE:
                del self.course.grafts[slot]

    def unload_youngest(self, step: int, reason: str) -> bool:
        """Empty the ACTIVE seed that was grafted last; False where there is none."""
        grafts = [
            (graft.born, slot)
            for slot, graft in self.course.grafts.items()
            if graft.born is not None and self._stage(slot) is SeedLifecycleState.ACTIVE
        ]
        if not grafts:
            return False
        layer, seed = self._place(max(grafts)[1])
        self.obey(step, Decision(Action.UNLOAD, layer, seed, reason))
        return True

    def absorbed(self, events: list[Event]) -> None:
        """Record failures that a trainee has counted."""
        self._journal.events([(event, "output not finite") for event in events])
