"""The queue: whatever happens in whatever order, a blueprint belongs to one worker at most."""

import json
import subprocess
import sys
import threading
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

from esper.contracts import BLUEPRINT_MOVES, BlueprintQuery, BlueprintState
from esper.errors import IllegalTransitionError, LeaseLostError
from esper.urza import Library
from esper.urza._schema import METADATA
from tests.esper.urza_kinds import blueprint_request, make_place

B = BlueprintState
QUEUES = ("sqlite-folder", "postgres-folder")
BLUEPRINTS = 3
ATTEMPTS = 3


@pytest.fixture(params=QUEUES)
def place(request, tmp_path):
    return make_place(request.param, tmp_path, request)


class QueueMachine(RuleBasedStateMachine):
    """A queue beside a model of it, under a clock that goes forwards and back."""

    library: Library
    clock: object
    kernel_id: str

    def __init__(self):
        super().__init__()
        with self.library._database.writing() as connection:
            for table in METADATA.sorted_tables:
                if table.name.startswith("blueprint"):
                    connection.execute(table.delete())
        self.clock.seconds = 1_000_000.0
        self.now = 0.0
        # By number: [state, attempts, the token of the last claim, when it began, until when].
        self.model = {}
        self.claims = []

    def _free(self, number):
        state, _, _, begun, until = self.model[number]
        return state is B.UNVALIDATED or (
            state is B.COMPILING and (until <= self.now or begun > self.now + 1.0)
        )

    @rule(seconds=st.sampled_from([0.0, 1.0, 9.0, 10.0, 11.0, 1e5, -0.5, -5.0, -1e5]))
    def the_clock_goes(self, seconds):
        self.clock.seconds += seconds
        self.now = self.clock.seconds

    @rule(number=st.integers(0, BLUEPRINTS - 1))
    def submit(self, number):
        self.now = self.clock.seconds
        record = self.library.submit(blueprint_request(number))
        self.model.setdefault(number, [B.UNVALIDATED, 0, None, None, None])
        # Its kernel is there all the time.
        assert record.state is self.model[number][0]

    @rule(most=st.integers(1, BLUEPRINTS), seconds=st.sampled_from([5.0, 10.0]))
    def claim(self, most, seconds):
        self.now = self.clock.seconds
        free = {n for n in self.model if self._free(n)}
        spent = {
            n for n in free if self.model[n][0] is B.COMPILING and self.model[n][1] >= ATTEMPTS
        }
        claimed = self.library.claim("worker", most=most, lease_seconds=seconds)
        assert len(claimed) == min(most, len(free - spent))
        for claim in claimed:
            number = int(claim.blueprint.name[-3:])
            assert number in free - spent
            entry = self.model[number]
            entry[:] = [B.COMPILING, entry[1] + 1, claim.token, self.now, self.now + seconds]
            assert claim.attempt == entry[1]
            self.claims.append((number, claim))
        for number in spent:
            # It was come upon, or is still to be.
            if self._record(number).state is B.INVALID:
                self.model[number][0] = B.INVALID

    def _record(self, number):
        return self.library.blueprint(blueprint_request(number).blueprint_id)

    def _holds(self, number, claim):
        return self.model[number][0] is B.COMPILING and self.model[number][2] == claim.token

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def renew(self, data):
        number, claim = data.draw(st.sampled_from(self.claims))
        if self._holds(number, claim):
            self.now = self.clock.seconds
            self.library.renew(claim)
            self.model[number][3:] = [self.now, self.now + claim.seconds]
        else:
            with pytest.raises(LeaseLostError):
                self.library.renew(claim)

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def complete(self, data):
        number, claim = data.draw(st.sampled_from(self.claims))
        if self._holds(number, claim) or self.model[number][0] is B.VALIDATED:
            assert self.library.complete(claim, self.kernel_id).state is B.VALIDATED
            self.model[number][0] = B.VALIDATED
        else:
            with pytest.raises(LeaseLostError):
                self.library.complete(claim, self.kernel_id)

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), end=st.sampled_from(["fail", "retry", "give back"]))
    def end(self, data, end):
        number, claim = data.draw(st.sampled_from(self.claims))
        again = end == "give back" or (end == "retry" and claim.attempt < ATTEMPTS)
        state = B.UNVALIDATED if again else B.INVALID

        def ask():
            if end == "give back":
                return self.library.give_back(claim)
            return self.library.fail(claim, end, retry=end == "retry")

        entry = self.model[number]
        if self._holds(number, claim):
            assert ask().state is state
            entry[0] = state
            if end == "give back":
                entry[1] -= 1
        elif entry[2] == claim.token and entry[0] is state:
            assert ask().state is state
        else:
            with pytest.raises(LeaseLostError):
                ask()

    @precondition(lambda self: self.model)
    @rule(data=st.data(), state=st.sampled_from(list(B)))
    def set_state(self, data, state):
        number = data.draw(st.sampled_from(sorted(self.model)))
        blueprint_id = blueprint_request(number).blueprint_id
        entry = self.model[number]
        by_hand = state in (B.UNVALIDATED, B.INVALID)
        if entry[0] is state or (state in BLUEPRINT_MOVES[entry[0]] and by_hand):
            assert self.library.set_blueprint_state(blueprint_id, state).state is state
            if entry[0] is not state:
                entry[0], entry[2] = state, None
                entry[1] = 0 if state is B.UNVALIDATED else entry[1]
        else:
            with pytest.raises(IllegalTransitionError):
                self.library.set_blueprint_state(blueprint_id, state)

    @invariant()
    def all_is_as_in_the_model(self):
        found = {
            int(r.name[-3:]): (r.state, r.attempts)
            for r in self.library.blueprints(BlueprintQuery()).items
        }
        assert found == {n: (entry[0], entry[1]) for n, entry in self.model.items()}


def test_the_queue_is_what_its_model_is(place, artifact):
    library = place.open(max_attempts=ATTEMPTS)
    values = {"library": library, "clock": place.clock, "kernel_id": library.put(artifact)}
    machine = type("Machine", (QueueMachine,), values)
    run_machine(machine, settings=settings(stateful_step_count=40))
    library.close()


def test_of_many_threads_one_gets_each_blueprint(place):
    library = place.open()
    total = 96
    for number in range(total):
        library.submit(blueprint_request(number))
    claimed, failures = [], []
    start = threading.Barrier(32)

    def work(number):
        try:
            start.wait()
            while found := library.claim(f"worker-{number}", most=1 + number % 3):
                claimed.extend(claim.blueprint.name for claim in found)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=[number]) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert Counter(claimed) == Counter(f"blueprint-{n:03d}" for n in range(total))
    library.close()


_WORKER = """
import json, sys
from esper.urza import Library
for line in sys.stdin:
    library = Library.connect(*json.loads(line))
    print("ready", flush=True)
    sys.stdin.readline()
    claimed = []
    while found := library.claim(sys.argv[1], most=2):
        claimed += [claim.blueprint.name for claim in found]
    print(json.dumps(claimed), flush=True)
"""


def test_of_several_processes_one_gets_each_blueprint(tmp_path, request):
    total = 60
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, f"worker-{number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]

    def tell(text):
        for worker in workers:
            worker.stdin.write(f"{text}\n")
            worker.stdin.flush()

    try:
        for kind in QUEUES:
            place = make_place(kind, tmp_path, request)
            library = place.open(clock=None)
            for number in range(total):
                library.submit(blueprint_request(number))
            library.close()
            tell(json.dumps([place.database, place.blobs]))
            assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 4
            tell("go")
            claimed = [name for w in workers for name in json.loads(w.stdout.readline())]
            assert Counter(claimed) == Counter(f"blueprint-{n:03d}" for n in range(total))
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
