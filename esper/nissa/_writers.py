"""All that writes down what a run publishes, made together and flushed together."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from esper.nissa._metrics import MetricsWriter
from esper.nissa._prometheus import PrometheusWriter
from esper.nissa._tensorboard import TensorBoardWriter
from esper.oona import Bus

Writer = MetricsWriter | TensorBoardWriter | PrometheusWriter


class Writers:
    """The writers of one run."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = tuple(writers)

    @property
    def lost(self) -> int:
        """Messages that TensorBoard and Prometheus have not been given."""
        return sum(0 if isinstance(w, MetricsWriter) else w.lost for w in self._writers)

    def flush(self) -> None:
        """Write what is waiting; for decision boundaries, never for steps.

        Raises:
            OSError: where the disk does not take `metrics.jsonl`, which is the run's own record.
                Of what only shows it, failures are counted in `lost`.
        """
        for writer in self._writers:
            writer.flush()


@contextmanager
def make_writers(
    path: Path, bus: Bus, *, tensorboard: bool, prometheus: Path | None
) -> Iterator[Writers]:
    """What writes down the measurements of a run, while it is trained.

    Args:
        path: the run's folder: `metrics.jsonl` is written there always.
        bus: what they listen to, from now on.
        tensorboard: write event files for TensorBoard into the folder `tensorboard` there.
        prometheus: a file for the textfile collector of Prometheus, ending in `.prom`; the run's
            label is its folder's path as given.

    Yields:
        An object with `flush`.

    Raises:
        InputError: where the package that TensorBoard needs is missing, or the file for Prometheus
            cannot be one; before anything is opened.
        OSError: where `metrics.jsonl` cannot be written.
    """
    writers: list[Writer] = []
    if tensorboard:
        writers.append(TensorBoardWriter(path / "tensorboard", bus))
    if prometheus is not None:
        writers.append(PrometheusWriter(prometheus, bus, str(path)))
    # The record first: if the disk does not take it, nothing else matters.
    writers.insert(0, MetricsWriter(path / "metrics.jsonl", bus))
    with ExitStack() as stack:
        for writer in writers:
            stack.enter_context(writer)
        yield Writers(writers)
