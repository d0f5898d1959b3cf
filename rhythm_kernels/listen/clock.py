"""Measures the time of parts of a forward without waiting for the device."""

import time

import torch


class Clock:
    """Adds up the seconds inside its `with` blocks: wall time, or the time of a GPU's current stream."""

    def __init__(self):
        self.device = torch.device("cpu")
        self.wall = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))  # the model's GPU need not be the current one
        return event

    def __enter__(self) -> None:
        self.begin = self._now()

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            self.events.append((self.begin, self._now()))
        else:
            self.wall += self._now() - self.begin

    def seconds(self) -> float:
        """Returns the sum in seconds; waits for a GPU."""
        if self.events:
            self.events[-1][1].synchronize()  # the events before it are done then too
        for begin, end in self.events:
            self.wall += begin.elapsed_time(end) / 1e3
        self.events.clear()
        return self.wall
