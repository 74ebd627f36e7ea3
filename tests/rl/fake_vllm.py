"""A vLLM server small enough for tests: the same HTTP interface around our own engine, and faults on demand."""

import json
import threading
import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from minimind import checkpoint
from minimind.inference.engine import Engine
from minimind.inference.sampling import SamplingParams

Fault = Literal["500", "429", "drop", "half", "slow", "abort", "other prompt", "other ids", "no ids", "restart"]


class FakeVLLM(ThreadingHTTPServer):
    """Serves the checkpoint at `path`; the next answers suffer from `faults`, one each."""

    daemon_threads = True

    def __init__(self, path: Path, *, is_dev: bool = True, has_labels: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.path, self.is_dev, self.has_labels = path, is_dev, has_labels
        self.faults: deque[Fault] = deque()
        self.asked: list[dict[str, Any]] = []
        """Bodies of the completions, as they came."""
        self.calls: list[str] = []
        """Paths of everything else that was posted."""
        self.lock = threading.Lock()
        self.cannot_load = False
        self.shift = 0.0
        """Added to every log-probability."""
        self.restart()

    def restart(self) -> None:
        """Begin anew with the weights of the beginning."""
        self.label, self.is_paused = "default", False
        self.load(self.path)

    def load(self, path: Path) -> None:
        model, _ = checkpoint.load(path)
        self.engine = Engine(model, max_batch_size=8, max_length=model.config.max_position_embeddings)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that goes away is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeVLLM  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name it has
        pass

    def do_GET(self) -> None:
        fake = self.server
        if self.path == "/v1/models":
            self.say({"data": [{"id": "tiny", "root": str(fake.path)}]})
        elif self.path == "/weight_info" and fake.is_dev and fake.has_labels:
            self.say({"weight_version": fake.label})
        else:
            self.say({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        fake = self.server
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(text) if text else {}
        path = self.path.partition("?")[0]
        if path == "/v1/completions":
            return self.complete(body)
        fake.calls.append(path)
        if not fake.is_dev or (path == "/update_weight_version" and not fake.has_labels):
            return self.say({"detail": "Not Found"}, 404)
        if path in ("/pause", "/resume"):
            fake.is_paused = path == "/pause"
        elif path == "/collective_rpc":
            assert fake.is_paused
            assert body["method"] == "reload_weights"
            if fake.cannot_load:
                return self.say({"error": "no such file"}, 500)
            with fake.lock:
                fake.load(Path(body["kwargs"]["weights_path"]))
        elif path == "/update_weight_version":
            fake.label = body["new_version"]
        return self.say({})

    def complete(self, body: dict[str, Any]) -> None:
        fake = self.server
        fault = fake.faults.popleft() if fake.faults else ""
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
            return
        if fault in ("500", "429"):
            self.say({"error": "busy"}, int(fault))
            return
        if fault == "slow":
            time.sleep(1.0)
        if fault == "restart":
            with fake.lock:
                fake.restart()
        assert not fake.is_paused
        params = SamplingParams(
            temperature=body["temperature"],
            max_tokens=body["max_tokens"],
            seed=body["seed"],
            stop_ids=tuple(body["stop_token_ids"]),
            logprobs=body["logprobs"] is not None,
        )
        with fake.lock:  # the engine is for one thread
            fake.asked.append(body)
            (answer,) = fake.engine.generate([body["prompt"]], [params])
        choice: dict[str, Any] = {
            "index": 0,
            "text": "",
            "finish_reason": "abort" if fault == "abort" else answer.finish_reason,
            "token_ids": [10**6] if fault == "other ids" else answer.ids,
            "prompt_token_ids": [1] if fault == "other prompt" else body["prompt"],
            "logprobs": {"token_logprobs": [value + fake.shift for value in answer.log_probs]},
        }
        if fault == "no ids":
            del choice["token_ids"]
        self.say({"choices": [choice]}, is_half=fault == "half")

    def say(self, reply: dict[str, Any], status: int = 200, *, is_half: bool = False) -> None:
        text = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text[: len(text) // 2] if is_half else text)
        if is_half:
            self.close_connection = True


@contextmanager
def serving(path: Path, **how: Any) -> Generator[FakeVLLM]:
    """Serve a checkpoint while the block lasts."""
    server = FakeVLLM(path, **how)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
