"""A Transformers `Trainer` held between the rounds of a contest: it trains in a thread, some steps at a time."""

import threading
from collections.abc import Callable
from typing import Any


class Held:
    """Holds the trainer that `make(callback)` returns; `steps(n)` lets it make n more and waits for them."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        from transformers import TrainerCallback

        self._may_go, self._is_done = threading.Semaphore(0), threading.Semaphore(0)
        self._failed: list[BaseException] = []
        may_go, is_done = self._may_go, self._is_done

        class Gate(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                may_go.acquire()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                is_done.release()

        self._trainer = make(Gate())
        threading.Thread(target=self._train, daemon=True).start()

    def steps(self, count: int) -> None:
        """Have `count` optimizer steps made. Raises what stopped the trainer."""
        self._may_go.release(count)
        for _ in range(count):
            self._is_done.acquire()
            if self._failed:
                raise self._failed[0]

    def _train(self) -> None:
        try:
            self._trainer.train()
        except BaseException as error:
            self._failed.append(error)
            self._is_done.release()
            raise
