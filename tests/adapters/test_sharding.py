"""Models of both JAX frameworks with a kernel from an artifact, on several simulated devices."""

from pathlib import Path

from tests.sharded import assert_cases_pass

CASES = {
    "equinox, data parallel",
    "equinox, tensor parallel",
    "equinox, functional, data parallel",
    "flax, data parallel",
    "flax, tensor parallel",
}


def test_every_case_gives_what_one_device_gives():
    assert_cases_pass(Path(__file__).with_name("sharded_process.py"), CASES)
