"""What crosses a seam, as strict data: unknown keys are refused, bounds are checked.

Importing this needs neither torch nor jax.
"""

from esper.contracts._blueprints import (
    LONGEST_LEASE_SECONDS,
    LONGEST_SOURCE,
    BlueprintQuery,
    BlueprintRecord,
    BlueprintRequest,
    Claim,
    blueprint_id,
)
from esper.contracts._changes import (
    BlueprintChanged,
    KernelChanged,
)
from esper.contracts._columns import (
    MOST_ROWS,
    Columns,
)
from esper.contracts._data import (
    LARGEST_COUNT,
    LARGEST_SIZE,
    LONGEST_REASON,
    Count,
    Data,
    Fraction,
    Label,
    Name,
    Reason,
    Seconds,
    Sha256,
    Size,
    Tag,
    Token,
    reason_text,
)
from esper.contracts._decisions import (
    Action,
    AdaptationDecision,
    AdaptationDecisionBatch,
)
from esper.contracts._health import (
    HealthSignal,
    HealthSignalBatch,
)
from esper.contracts._kernel_metadata import (
    KernelMetadata,
)
from esper.contracts._kernels import (
    MOST_RESULTS,
    MOST_TAGS,
    Cursor,
    KernelMeasurementRecord,
    KernelOutcome,
    KernelQuery,
    KernelRecord,
    KernelUsage,
)
from esper.contracts._ledger_entry import (
    ENTRY_FIELDS,
    SeedEvent,
    SeedStage,
)
from esper.contracts._manifest import (
    Manifest,
    TensorSpec,
)
from esper.contracts._message import (
    MAX_MESSAGE_BYTES,
    OonaMessage,
)
from esper.contracts._metrics import (
    TrainingMetrics,
)
from esper.contracts._model_report import (
    MOST_SITES,
    ModelReport,
    SiteKind,
)
from esper.contracts._page import (
    Page,
)
from esper.contracts._payloads import (
    BATCHES,
    PAYLOADS,
    payload_model,
    payload_of,
)
from esper.contracts._recovery import (
    CircuitChanged,
    CircuitEvent,
    CircuitState,
    ErrorOccurred,
    ErrorType,
    HealthMeasured,
    RecoveryDone,
    RecoveryStrategy,
)
from esper.contracts._retention import (
    GarbageReport,
    RetentionPolicy,
)
from esper.contracts._signature import (
    KernelSignature,
    SignatureText,
)
from esper.contracts._states import (
    BLUEPRINT_MOVES,
    CURRENT_KERNELS,
    KERNEL_MOVES,
    BlueprintState,
    KernelState,
    check_move,
    moves_from,
)
from esper.contracts._topics import (
    Topic,
    TopicNames,
    topic_of,
)
from esper.contracts._versions import (
    UPGRADES,
    explained,
    read,
    schema_version,
    upgraded,
)

__all__ = [
    "BATCHES",
    "BLUEPRINT_MOVES",
    "CURRENT_KERNELS",
    "ENTRY_FIELDS",
    "KERNEL_MOVES",
    "LARGEST_COUNT",
    "LARGEST_SIZE",
    "LONGEST_LEASE_SECONDS",
    "LONGEST_REASON",
    "LONGEST_SOURCE",
    "MAX_MESSAGE_BYTES",
    "MOST_RESULTS",
    "MOST_ROWS",
    "MOST_SITES",
    "MOST_TAGS",
    "PAYLOADS",
    "UPGRADES",
    "Action",
    "AdaptationDecision",
    "AdaptationDecisionBatch",
    "BlueprintChanged",
    "BlueprintQuery",
    "BlueprintRecord",
    "BlueprintRequest",
    "BlueprintState",
    "CircuitChanged",
    "CircuitEvent",
    "CircuitState",
    "Claim",
    "Columns",
    "Count",
    "Cursor",
    "Data",
    "ErrorOccurred",
    "ErrorType",
    "Fraction",
    "GarbageReport",
    "HealthMeasured",
    "HealthSignal",
    "HealthSignalBatch",
    "KernelChanged",
    "KernelMeasurementRecord",
    "KernelMetadata",
    "KernelOutcome",
    "KernelQuery",
    "KernelRecord",
    "KernelSignature",
    "KernelState",
    "KernelUsage",
    "Label",
    "Manifest",
    "ModelReport",
    "Name",
    "OonaMessage",
    "Page",
    "Reason",
    "RecoveryDone",
    "RecoveryStrategy",
    "RetentionPolicy",
    "Seconds",
    "SeedEvent",
    "SeedStage",
    "Sha256",
    "SignatureText",
    "SiteKind",
    "Size",
    "Tag",
    "TensorSpec",
    "Token",
    "Topic",
    "TopicNames",
    "TrainingMetrics",
    "blueprint_id",
    "check_move",
    "explained",
    "moves_from",
    "payload_model",
    "payload_of",
    "read",
    "reason_text",
    "schema_version",
    "topic_of",
    "upgraded",
]
