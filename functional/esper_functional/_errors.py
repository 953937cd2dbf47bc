"""The exceptions of Esper that concern grafted layers.

    KasminaException
    ├── SeedLifecycleError     a move that the lifecycle table forbids
    ├── SeedIndexError         a layer or seed that does not exist
    ├── KernelMismatchError    a kernel whose structure does not fit its site
    ├── KernelIdError          what is given as a kernel's id is none
    ├── LayerShapeError        a shape, dtype or option that does not fit a host layer
    ├── DerivativeError        a derivative that a contained kernel does not have
    ├── FoldError              a kernel that cannot be folded into its host's weights
    └── BlendError             an unknown blend, or an alpha outside [0, 1]

    UncalledSiteWarning        kernels run at a site that the network does not call

Wrong *values* inside a compiled step never raise: they are contained and
counted (see `_containment`).
"""


class KasminaException(Exception):
    """Root of every error that Esper raises on purpose."""


class SeedLifecycleError(KasminaException):
    """A seed was asked to make a move that its stage does not allow."""


class SeedIndexError(KasminaException, LookupError):
    """A layer name, site name or seed index names nothing."""


class KernelMismatchError(KasminaException, ValueError):
    """A kernel's shape, dtype or rank does not fit the site it was meant for."""


class KernelIdError(KasminaException, ValueError):
    """A kernel's id is not the 64 hexadecimal digits of a SHA-256."""


class LayerShapeError(KasminaException, ValueError):
    """A shape, dtype or option does not fit the host layer that it is given to."""


class DerivativeError(KasminaException, TypeError):
    """A contained kernel was differentiated in forward mode, or twice."""


class FoldError(KasminaException, ValueError):
    """A kernel cannot be folded into its host's weights without changing the output."""


class BlendError(KasminaException, ValueError):
    """An unknown blend name, or a blending coefficient outside [0, 1]."""


class UncalledSiteWarning(UserWarning):
    """Kernels run at a site that the network never calls, and have no part in its output."""
