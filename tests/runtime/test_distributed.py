"""Collectives: identities alone, exact between two processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from minimind.runtime import distributed

WORKER = """
import json, sys, torch
from minimind.runtime import distributed as d
d.init(torch.device("cpu"))
d.init(torch.device("cpu"))
mine = torch.tensor([1.0 + d.rank(), 10.0])
out = d.all_reduce_sum(mine)
result = {
    "rank": d.rank(), "world": d.world_size(), "main": d.is_main(), "sum": out.tolist(), "in_place": out is mine,
    "broadcast": d.broadcast_object({"from": d.rank()}), "gathered": d.all_gather_object(["r", d.rank()]),
}
d.barrier()
d.shutdown()
result["after"] = [d.rank(), d.world_size()]
print(json.dumps(result))
"""


def test_alone_everything_is_the_identity() -> None:
    distributed.init(torch.device("cpu"))
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    x = torch.tensor([2.0])
    assert distributed.all_reduce_sum(x) is x
    assert x.item() == 2.0
    box = object()
    assert distributed.broadcast_object(box) is box
    assert distributed.all_gather_object(box) == [box]
    distributed.barrier()
    distributed.shutdown()


def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    workers: list[subprocess.Popen[str]] = []
    for rank in range(2):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env = {**os.environ, **env, "MASTER_PORT": str(port)}
        workers.append(subprocess.Popen([sys.executable, str(script)], env=env, stdout=subprocess.PIPE, text=True))
    results = [json.loads(worker.communicate(timeout=120)[0]) for worker in workers]
    for rank, result in enumerate(results):
        assert result == {
            "rank": rank,
            "world": 2,
            "main": rank == 0,
            "sum": [3.0, 20.0],
            "in_place": True,
            "broadcast": {"from": 0},
            "gathered": [["r", 0], ["r", 1]],
            "after": [0, 1],
        }
