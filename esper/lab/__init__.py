"""A lab on one machine: PostgreSQL, Redis, S3, Urza and workers, as plain processes.

`python -m esper.lab up` brings one up; `docs/lab.md` says what it does.
"""

from esper.lab._errors import LabError, LabInputError
from esper.lab._lab import DEFAULT_FOLDER, down, status, up

__all__ = ["DEFAULT_FOLDER", "LabError", "LabInputError", "down", "status", "up"]
