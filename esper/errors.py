"""The errors of the platform, and what a command exits with.

KasminaException               (from the core, with its own subclasses)
└── EsperError                 exit 1: the work failed
    ├── ArtifactError          an artifact is damaged, lies, or is refused
    ├── KernelCompilationError the two programs of a blueprint disagree, or it breaks its claim
    ├── LibraryError           the library cannot be read or written
    │   ├── KernelNotFoundError  it holds no such kernel
    │   ├── BlueprintNotFoundError  it holds no such blueprint
    │   ├── IllegalTransitionError  a state may not follow another
    │   ├── ConflictError      something else is there under that name
    │   └── LeaseLostError     what was claimed belongs to somebody else by now
    ├── ServiceUnavailableError  a service cannot be reached, or has too much to do
    ├── AccessDeniedError      a service refuses who asks, or what is asked for
    ├── BusError               a message could not be published, received or acknowledged
    │   └── BusFullError       a stream takes no more until some of it was read
    ├── KernelExecutionError   a kernel did not run, or gave what it should not
    ├── CircuitBreakerOpenError  a service that failed is left alone for a while
    ├── LedgerError            the record of a run is damaged
    ├── CheckpointError        a checkpoint is damaged or missing
    │   └── CheckpointMismatchError  it holds another structure (in esper.checkpoints)
    ├── Interrupted            exit 130: asked to stop, and saved
    └── InputError             exit 2: what was asked for is not valid
        ├── BlueprintError     a blueprint is unknown, malformed or does not fit
        ├── SchemaVersionError something was written by a newer version of Esper
        ├── UnknownTopicError  nothing is spoken about under that name
        ├── MessageError       a message is malformed or too large
        └── RunFolderError     the output folder cannot be used as asked
"""

from esper_functional import KasminaException


class EsperError(KasminaException):
    """Something the platform was doing failed; commands exit 1."""


class ArtifactError(EsperError):
    """A kernel artifact is damaged, contradicts its manifest, or holds what is not allowed."""


class KernelCompilationError(EsperError):
    """A blueprint did not become an artifact: its programs disagree or its claim is false."""


class LibraryError(EsperError):
    """The library's folder or database cannot be used."""


class KernelNotFoundError(LibraryError, LookupError):
    """The library holds no kernel of that id."""


class BlueprintNotFoundError(LibraryError, LookupError):
    """The library holds no blueprint of that id."""


class IllegalTransitionError(LibraryError):
    """The state of a blueprint or kernel may not be followed by the one that was asked for."""


class ConflictError(LibraryError):
    """Something that is not the same is already there."""


class LeaseLostError(LibraryError):
    """A claim ran out, and what was claimed belongs to somebody else by now."""


class ServiceUnavailableError(EsperError, ConnectionError):
    """A service cannot be reached, or says that it has too much to do."""


class AccessDeniedError(EsperError):
    """A service does not know who asks, or does not allow them what they ask for."""


class BusError(EsperError):
    """A message could not be published, received or acknowledged."""


class BusFullError(BusError):
    """A bounded stream takes no more messages until some of it was read."""


class KernelExecutionError(EsperError):
    """A kernel did not run, or what it returned was asked to be finite and is not."""


class CircuitBreakerOpenError(EsperError, ConnectionError):
    """A call was not made, because those before it failed: the service is given time.

    It is a ConnectionError too, so that whoever can do without the service treats it as away.
    """


class LedgerError(EsperError):
    """A run's ledger is damaged or contradicts the run."""


class CheckpointError(EsperError):
    """A run's checkpoint is damaged or missing."""


class Interrupted(EsperError):
    """A run was asked to stop; it is saved and can be resumed. Commands exit 130."""


class InputError(EsperError):
    """What the user asked for is not valid; commands exit 2."""


class BlueprintError(InputError):
    """A blueprint is unknown, malformed, or does not fit the signature."""


class SchemaVersionError(InputError):
    """Something was written in a newer form than this version of Esper knows."""


class UnknownTopicError(InputError):
    """There is no topic of that name."""


class MessageError(InputError):
    """A message is malformed, or larger than a message may be."""


class RunFolderError(InputError):
    """The output folder holds something else, or cannot be written."""
