"""Models of both JAX frameworks with a kernel from an artifact, on several simulated devices."""

from pathlib import Path

from tests.functional.test_sharding import run_cases

CASES = {
    "equinox, data parallel",
    "equinox, tensor parallel",
    "equinox, functional, data parallel",
    "flax, data parallel",
    "flax, tensor parallel",
}


def test_every_case_gives_what_one_device_gives():
    report = run_cases(Path(__file__).with_name("sharded_process.py"))
    assert report.pop("devices") == "4"
    assert report.keys() == CASES
    failed = {name: trace for name, trace in report.items() if trace}
    assert not failed, "\n".join(failed.values())
