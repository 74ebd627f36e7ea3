"""JSON over HTTP to one server that may be slow, restart or be gone for a while. It does not know what is asked."""

import contextlib
import http.client
import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from minimind.errors import OutOfResourcesError
from minimind.runtime.log import get_logger

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between two tries: doubled each time, up to the second number."""
LONGEST_IDLE = 2.0
"""Seconds after which a connection is made anew: servers close idle ones."""

_log = get_logger("rollout")


class RefusedError(Exception):
    """A reply that trying again will not change."""

    def __init__(self, status: int, text: str) -> None:
        """Note the HTTP status and what was said."""
        super().__init__(f"{status}: {text}")
        self.status = status


class BrokenError(Exception):
    """A request without a usable reply, worth another try."""


class Connection:
    """JSON over HTTP to one server, from any thread, tried again while the server may yet come back."""

    def __init__(self, url: str, *, timeout: float, patience: float) -> None:
        """Note the address; nothing is asked yet."""
        self.url, self._timeout, self._patience = url.rstrip("/"), timeout, patience
        self._address = urlsplit(self.url)
        self._local = threading.local()
        self._is_given_up = threading.Event()
        self._is_down = False
        self._open: weakref.WeakSet[http.client.HTTPConnection] = weakref.WeakSet()
        key = os.environ.get("VLLM_API_KEY")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        read: Callable[[Any], Any] = lambda reply: reply,
        final: Sequence[int] = (),
    ) -> Any:
        """Return `read` of the JSON reply (`read` of None for an empty one).

        A connection that fails, a timeout, 429, 5xx (but `final`) and a `BrokenError` of `read` are tried again for
        `patience` seconds, then OutOfResourcesError. Any other status is a RefusedError at once.
        """
        deadline, pause = time.monotonic() + self._patience, FIRST_PAUSE
        while True:
            try:
                reply = read(self._once(method, path, body, final))
            except (OSError, http.client.HTTPException, ValueError, BrokenError) as error:
                self._forget()
                why = f"{type(error).__name__}: {error}" if not isinstance(error, BrokenError) else str(error)
                if self._is_given_up.is_set() or time.monotonic() + pause > deadline:
                    raise OutOfResourcesError(
                        f"rollout: the server at {self.url} gave no usable reply to {method} {path} within "
                        f"{self._patience:g} s ({why}). Start it again; the same command then goes on from the newest "
                        "checkpoint and samples the rollout again"
                    ) from error
                if not self._is_down:
                    _log.warning("%s%s: %s; trying again for up to %g s", self.url, path, why, self._patience)
                self._is_down = True
                self._is_given_up.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                self._is_down = False
                return reply

    def give_up(self) -> None:
        """Let all requests that are under way fail now."""
        self._is_given_up.set()
        for connection in list(self._open):
            with contextlib.suppress(OSError, AttributeError):  # not connected, or no more
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _once(self, method: str, path: str, body: Any, final: Sequence[int]) -> Any:
        connection = getattr(self._local, "connection", None)
        if connection is not None and time.monotonic() - self._local.used > LONGEST_IDLE:
            self._forget()
            connection = None
        if connection is None:
            kind = http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
            connection = self._local.connection = kind(self._address.netloc, timeout=self._timeout)
            self._open.add(connection)
        text = None if body is None else json.dumps(body).encode()
        connection.request(method, self._address.path + path, text, self._headers)
        reply = connection.getresponse()
        content = reply.read().decode("utf-8", errors="replace")
        self._local.used = time.monotonic()
        if reply.status != http.HTTPStatus.OK:
            what = " ".join(content.split())[:300]
            if (reply.status >= 500 or reply.status in (408, 429)) and reply.status not in final:
                raise BrokenError(f"{reply.status}: {what}")
            raise RefusedError(reply.status, what)
        return json.loads(content) if content else None

    def _forget(self) -> None:
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None
