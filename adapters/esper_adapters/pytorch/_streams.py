"""Kernels on streams of their own, beside the one on which their host runs.

Running a layer so changes when it runs, never what it computes. A side stream begins when the
layer's input is ready, runs beside the host, and is waited for by the host's stream before the
blend: by events on the device, and by nobody on the host. Autograd runs each operation's backward
on the stream of its forward, and synchronises where they meet.

A device without streams, such as the CPU, runs the same code on the one that it has.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esper_adapters.pytorch._containment import Verdict
from esper_adapters.pytorch._family import KasminaConv2dLayer
from esper_adapters.pytorch._grafted import GraftedKernel
from esper_functional import KasminaException


class Launched(NamedTuple):
    """A kernel that was put on a stream, and may not have run yet."""

    output: Tensor
    finite: Verdict
    stream: Any
    """The stream, of the device's own class."""


class StreamManager:
    """Streams beside the current one, made for a device when it is first seen.

    Args:
        num_streams: how many; kernels beyond share them in turn.
    """

    def __init__(self, num_streams: int = 4) -> None:
        if num_streams < 1:
            raise KasminaException(f"StreamManager: num_streams must be at least 1: {num_streams}")
        self.num_streams = num_streams
        self._streams: dict[torch.device, list[Any]] = {}
        self._usage = [0] * num_streams

    def __getstate__(self) -> dict[str, Any]:
        # Streams belong to a process.
        return {**self.__dict__, "_streams": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> "StreamManager":
        return StreamManager(self.num_streams)

    def get_stream(self, seed_idx: int, device: torch.device | str = "cpu") -> Any:
        """The stream of a seed: `seed_idx` modulo their number."""
        place = torch.device(device)
        if place not in self._streams:
            made = [
                torch.get_device_module(place).Stream(**_on(place)) for _ in range(self.num_streams)
            ]
            self._streams[place] = made
        index = seed_idx % self.num_streams
        self._usage[index] += 1
        return self._streams[place][index]

    def mark(self, x: Tensor) -> Any:
        """An event of the current stream of a tensor's device: it is reached when `x` is ready."""
        return torch.get_device_module(x.device).current_stream(**_on(x.device)).record_event()

    def launch(self, kernels: Sequence[GraftedKernel], x: Tensor, ready: Any) -> list[Launched]:
        """Run kernels on a layer's input, each on a stream that waits for `ready` alone."""
        module = torch.get_device_module(x.device)
        launched = []
        for i, kernel in enumerate(kernels):
            stream = self.get_stream(i, x.device)
            stream.wait_event(ready)
            with module.stream(stream):
                k, finite = kernel(x)
            # The allocator may not give the input's memory away while this stream reads it.
            _record(x, stream)
            launched.append(Launched(k, finite, stream))
        return launched

    def synchronize_all(self) -> None:
        """Let the current stream of each device wait for all of its side streams."""
        for device, streams in self._streams.items():
            current = torch.get_device_module(device).current_stream(**_on(device))
            for stream in streams:
                current.wait_stream(stream)

    def get_stats(self) -> dict[str, Any]:
        """How often each stream was given out, and on which devices there are any."""
        return {
            "num_streams": self.num_streams,
            "stream_usage": list(self._usage),
            "total_usage": sum(self._usage),
            "devices": [str(device) for device in self._streams],
        }


class GradientSynchronizer:
    """Where side streams and the current one meet."""

    def __init__(self) -> None:
        self._joined = 0
        self._synchronised = 0

    def join(self, launched: Sequence[Launched]) -> list[tuple[Tensor, Verdict]]:
        """The kernels' results, for the current stream, which waits for them on the device."""
        results: list[tuple[Tensor, Verdict]] = []
        for k, finite, stream in launched:
            current = torch.get_device_module(k.device).current_stream(**_on(k.device))
            current.wait_stream(stream)
            _record(k, current)
            if finite is not None:
                _record(finite, current)
            results.append((k, finite))
        self._joined += len(results)
        return results

    def synchronize_pending(self, streams: StreamManager) -> None:
        """Let the current stream wait for what a backward pass has put on side streams.

        `backward()` does so for its own caller's stream at its end; this is for gradients that
        are read on another stream.
        """
        streams.synchronize_all()
        self._synchronised += 1

    def get_stats(self) -> dict[str, int]:
        """How many results were joined, and how often a stream was made to wait for gradients.

        No times: it is the device that waits, and asking how long would make the host wait too.
        """
        return {"joined": self._joined, "sync_count": self._synchronised}


class AsyncKasminaConv2dLayer(KasminaConv2dLayer):
    """`KasminaConv2dLayer`, whose kernels run on streams of their own; its numbers are the same."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.stream_manager = StreamManager(self.num_seeds)
        self.gradient_sync = GradientSynchronizer()

    def forward(self, input: Tensor) -> Tensor:
        """`[*batch, in_channels, height, width]` to `[*batch, out_channels, …]`."""
        live = self._live
        if live is None:
            return nn.Conv2d.forward(self, input)
        ready = self.stream_manager.mark(input)
        # The host first, as elsewhere: in this order gradients are added up. Kernels do not wait
        # for it.
        h = nn.Conv2d.forward(self, input)
        x = input.detach() if self.isolate else input
        launched = self.stream_manager.launch(live.kernels, x, ready)
        return self.run_grafted(live, h, (input,), {}, self.gradient_sync.join(launched))


AsyncKasminaConv2dLayer._esper_base = AsyncKasminaConv2dLayer


def _on(device: torch.device) -> dict[str, torch.device]:
    # torch.cpu's streams are of no device.
    return {} if device.type == "cpu" else {"device": device}


def _record(tensor: Tensor, stream: Any) -> None:
    if tensor.device.type != "cpu":
        tensor.record_stream(stream)
