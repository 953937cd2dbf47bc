"""Kernels whose programs are older than jax promises to read, compiled anew.

jax.export promises that a program runs for six months after the jaxlib that wrote it was built.
A minor version of jax comes every three months, so a program is due when the jaxlib at hand is
two minor versions further. (Dates of builds are in no package; the versions are.) jax often reads
far older programs: see `is_due` as the time to act, and not as the end.
"""

import re
from importlib.metadata import version

from esper.artifacts import Artifact
from esper.errors import InputError
from esper.tezzeret._blueprint import read_blueprint
from esper.tezzeret._compile import compile_blueprint
from esper.tezzeret._jobs import CompileJob

MINORS_PROMISED = 1
"""How many minor versions further a program is read for certain."""


def is_due(artifact: Artifact, *, jaxlib: str | None = None) -> bool:
    """Whether jax no longer promises to read the artifact's program.

    A program is due, too, whose manifest does not say which jaxlib wrote it.

    Args:
        jaxlib: the version that is to read it; by default the installed one.

    Raises:
        InputError: for a version that is no version.
    """
    text = jaxlib or version("jaxlib")
    made, reading = _minor(artifact.manifest.versions.get("jaxlib", "")), _minor(text)
    if reading is None:
        raise InputError(f"{text!r} is no version of jaxlib: expected one such as 0.10.2")
    if made is None:
        return True
    # An older jaxlib is promised three weeks, which is less than a minor version.
    return made[0] != reading[0] or not 0 <= reading[1] - made[1] <= MINORS_PROMISED


def recompile_job(artifact: Artifact) -> CompileJob:
    """The job that compiles an artifact's blueprint anew; the new artifact names the old one.

    Raises:
        InputError: for an artifact that holds no blueprint.
        BlueprintError: where the blueprint that it holds is none.
    """
    if artifact.blueprint is None:
        raise InputError(
            f"kernel {artifact.kernel_id[:12]} was made of a {artifact.manifest.origin} and holds"
            " no blueprint: make it anew from its source"
        )
    manifest = artifact.manifest
    return CompileJob(
        blueprint=read_blueprint(
            artifact.blueprint, f"the blueprint of kernel {artifact.kernel_id[:12]}"
        ),
        signature=manifest.signature,
        sizes=manifest.sizes,
        init_seed=manifest.init_seed,
        ancestor=artifact.kernel_id,
    )


def recompile(artifact: Artifact) -> Artifact:
    """Compile an artifact's blueprint with the libraries that are installed now.

    The new artifact has the same signature, sizes and first parameters, passes the same gates, and
    names its ancestor.

    Raises:
        InputError: for an artifact that holds no blueprint.
        BlueprintError: where the blueprint that it holds is none, or no longer fits.
        KernelCompilationError: where it no longer passes.
    """
    job = recompile_job(artifact)
    return compile_blueprint(
        job.blueprint,
        job.signature,
        sizes=job.sizes,
        init_seed=job.init_seed,
        ancestor=job.ancestor,
    )


def _minor(text: str) -> tuple[int, int] | None:
    found = re.match(r"(\d{1,9})\.(\d{1,9})", text)
    return None if found is None else (int(found[1]), int(found[2]))
