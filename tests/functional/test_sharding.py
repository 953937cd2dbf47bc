"""On several devices: batches, weights and populations that are spread give what one device gives.

The devices are simulated, which takes a process of its own: see sharded_process.py.
"""

from pathlib import Path

from tests.sharded import assert_cases_pass

CASES = {
    "data_parallel",
    "one_bad_example",
    "tensor_parallel",
    "data_and_tensor_parallel",
    "incubation",
    "population",
    "explicit_mesh",
    "explicit_mesh_mapped",
    "shard_map",
}


# One test, for workers of pytest-xdist would each start a process of their own.
def test_every_case_gives_what_one_device_gives():
    assert_cases_pass(Path(__file__).with_name("sharded_process.py"), CASES)
