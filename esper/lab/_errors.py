"""What goes wrong with a lab.

These are not of the tree in `esper.errors`: its root is the core's, and importing that imports jax.
A lab is supervised for days by a process that has no use for it.
"""


class LabError(Exception):
    """A server of the lab could not be made, started or ended; the command exits 1."""


class LabInputError(LabError):
    """The lab cannot come up as asked; the command exits 2."""
