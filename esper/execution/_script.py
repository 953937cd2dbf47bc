"""A kernel's TorchScript, run as it is written."""

from typing import Any

from esper.artifacts import load_torchscript


class ScriptProgram:
    """`program(*params, x)` by the TorchScript of an artifact, which passes the scan.

    It is run without torch's optimising executor, which watches the first calls and computes the
    later ones otherwise, in the last bit: a run that is taken up again would not be the same run.

    Args:
        archive: the bytes of the artifact's program.

    Raises:
        ArtifactError: for one that does not pass.
    """

    def __init__(self, archive: bytes) -> None:
        self.archive = archive
        self.module = load_torchscript(archive)

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        import torch

        with torch.jit.optimized_execution(False):  # pyright: ignore[reportPrivateImportUsage]
            return self.module(*args)

    def __reduce__(self) -> tuple[type["ScriptProgram"], tuple[bytes]]:
        return ScriptProgram, (self.archive,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ScriptProgram":
        # It has no parameters and changes nothing.
        return self
