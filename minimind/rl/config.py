"""Settings of who samples the rollouts. Needs no torch."""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit


@dataclass(frozen=True)
class RolloutConfig:
    """Who samples the rollouts: this process, or a vLLM server."""

    backend: Literal["local", "vllm"] = "local"
    """local: the engine here, with the live weights; vllm: a server at `url`, which is handed the weights."""
    url: str = "http://127.0.0.1:8000"
    """Address of the vLLM server, without /v1. A key is read from the environment variable VLLM_API_KEY."""
    served_model: str = ""
    """Name under which the server serves the model; empty takes the only one there is."""
    reload: Literal["auto", "manual"] = "auto"
    """auto: the server is told to load new weights (it needs VLLM_SERVER_DEV_MODE=1); manual: you start it again."""
    max_staleness: int = 0
    """Optimizer steps by which the server's weights may be behind; older ones are replaced before a rollout."""
    server_path: str = ""
    """Where the server sees the directory `out`; empty: under the same absolute path."""
    connections: int = 64
    """Requests that are under way at the same time, of each process."""
    timeout: float = 600.0
    """Seconds after which a request is given up and made again."""
    patience: float = 600.0
    """Seconds for which a server that fails is tried again before the run stops."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        found = [] if self.timeout > 0 else [f"timeout = {self.timeout}: must be above 0"]
        if self.patience < 0:
            found.append(f"patience = {self.patience}: must not be negative")
        if self.connections < 1:
            found.append(f"connections = {self.connections}: at least 1")
        if self.max_staleness < 0:
            found.append(f"max_staleness = {self.max_staleness}: must not be negative")
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.netloc:
            found.append(f"url = {self.url!r}: expected http://HOST:PORT")
        elif address.path.strip("/") == "v1":
            found.append(f"url = {self.url!r}: give it without /v1")
        return found
