"""How much a cache may hold."""

import dataclasses

from esper.errors import InputError


@dataclasses.dataclass(frozen=True)
class Limits:
    """The numbers that a copy of a cache has in common with it.

    Raises:
        InputError: for one that is no number of its kind.
    """

    max_cache_size_mb: float
    max_entries: int
    max_device_mb: float
    max_disk_mb: float
    max_metadata: int
    remember_missing: int
    prefetch: int
    max_fetches: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            megabytes = field.name.endswith("_mb")
            least = 1 if field.name == "max_fetches" else 0
            kinds = (int, float) if megabytes else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
                what = "a number" if megabytes else "a whole number"
                raise InputError(f"{field.name} must be {what} of at least {least}, got {value!r}")


def in_bytes(megabytes: float) -> int:
    """Whole bytes in so many MB of 2²⁰ bytes.

    Raises:
        InputError: for infinitely many.
    """
    try:
        return int(megabytes * (1 << 20))
    except OverflowError as error:
        raise InputError(f"a limit must be a finite number of MB, got {megabytes}") from error
