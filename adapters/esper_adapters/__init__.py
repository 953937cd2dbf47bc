"""The semantics of `esper_functional` with a framework's face: `pytorch` and `equinox`.

Nothing is imported here: each face needs its own framework.
"""
