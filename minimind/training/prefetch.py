"""Micro-batches made one or two steps ahead by a background thread. It knows only `micro_batches(step)`."""

import queue
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from minimind.batch import Batch


class Ahead:
    """Calls `make(step)` for consecutive steps ahead of time; whatever it raises is raised again by `take`."""

    def __init__(self, make: Callable[[int], Sequence[Batch]], steps: range, *, depth: int = 2) -> None:
        self._make, self._steps = make, steps
        self._ready: queue.Queue[tuple[int, Sequence[Batch] | BaseException]] = queue.Queue(depth)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="minimind-prefetch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        while not self._ready.empty():  # lets a thread that waits for room see that it is over
            self._ready.get_nowait()
        self._thread.join(timeout=5)

    def take(self, step: int) -> Sequence[Batch]:
        """Return the micro-batches of `step`. Raises what the thread met, or RuntimeError if it is gone."""
        while True:
            try:
                made, batches = self._ready.get(timeout=1)
                break
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    raise RuntimeError(f"the thread that prepares batches ended before step {step}") from None
        if isinstance(batches, BaseException):
            raise batches
        if made != step:
            raise RuntimeError(f"batches of step {made} came where step {step} was due")
        return batches

    def _work(self) -> None:
        for step in self._steps:
            try:
                batches = self._make(step)
            except BaseException as error:  # noqa: BLE001 - handed to the loop, which raises it
                self._put(step, error)
                return
            if not self._put(step, batches):
                return

    def _put(self, step: int, item: Sequence[Batch] | BaseException) -> bool:
        while not self._is_over.is_set():
            try:
                self._ready.put((step, item), timeout=0.2)
            except queue.Full:
                continue
            return True
        return False
