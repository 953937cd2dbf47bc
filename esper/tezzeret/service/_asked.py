"""From what was submitted to what is compiled, and back."""

from collections.abc import Sequence

from esper.contracts import BlueprintRecord, BlueprintRequest
from esper.tezzeret._blueprint import read_blueprint
from esper.tezzeret._jobs import CompileJob


def job_of(record: BlueprintRecord) -> CompileJob:
    """What a blueprint of the library asks to compile.

    Raises:
        BlueprintError: where its source is no blueprint.
    """
    source = read_blueprint(
        record.source.encode(), f"blueprint {record.blueprint_id[:12]} of the library"
    )
    return CompileJob(source, record.signature, dict(record.sizes), record.init_seed)


def request_of(job: CompileJob, *, tags: Sequence[str] = (), priority: int = 0) -> BlueprintRequest:
    """A job as it is submitted to a library's queue.

    Raises:
        ValidationError: for sizes, a seed, tags or a priority that cannot be.
    """
    return BlueprintRequest(
        source=job.blueprint.canonical_json().decode(),
        signature=job.signature,
        sizes=dict(job.sizes),
        init_seed=job.init_seed,
        tags=tuple(tags),
        priority=priority,
    )
