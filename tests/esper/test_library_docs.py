"""The page about the library: its tables of states are the code's."""

import pytest

from esper.contracts import BLUEPRINT_MOVES, KERNEL_MOVES, BlueprintState, KernelState
from tests.test_docs import described, table, text_of


def states_table(states, moves) -> str:
    meaning = described(states)
    rows = [(s.value, ", ".join(to.value for to in moves[s]), meaning[s.name]) for s in states]
    return table(("state", "may become", "meaning"), rows).replace("|  |", "| |")


@pytest.mark.parametrize(
    ("states", "moves"), [(KernelState, KERNEL_MOVES), (BlueprintState, BLUEPRINT_MOVES)]
)
def test_the_tables_of_states_are_the_codes(states, moves):
    assert states_table(states, moves) in text_of("library.md"), states_table(states, moves)
