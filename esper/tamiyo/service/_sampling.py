"""Which of the signals that nothing is the matter with are taken: by a hash, and not by chance.

A signal is taken or not by what it is of, so that two services, and one that reads a bus again,
take the same ones, and what is taken at a lower rate is taken at a higher one too.
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash_of(name: str) -> np.uint64:
    """A model's name as 64 bits, the same in every process."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def taken(model: np.uint64, rows: np.ndarray, rate: float) -> np.ndarray:
    """Which rows are taken, by model, layer, seed and step.

    Args:
        model: `hash_of` its name.
        rows: `HEALTH` `[rows]`.
        rate: the share that is taken, in [0, 1].

    Returns:
        bool `[rows]`.
    """
    drawn = np.full(len(rows), model)
    # Arithmetic modulo 2^64 is what is meant, for which numpy warns of scalars alone.
    for name in ("layer", "seed", "step"):
        drawn = _mix(drawn + _GOLDEN * (rows[name].astype(np.uint64) + np.uint64(1)))
    return (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53 < rate
