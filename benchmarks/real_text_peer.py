"""Who predicts held-out text better after ten minutes: `minimind pretrain`, or Transformers' Llama of the same shape?

    D="--data FOLDER --out runs/real-text-peer --corpus tinystories --minutes 10 --threads 1"
    python benchmarks/real_text_peer.py $D --contender minimind   [--our-batch-tokens 4096 --our-muon-lr 0.02 ...]
    python benchmarks/real_text_peer.py $D --contender transformers --lr 1e-3        # and 2e-3, 4e-3
    python benchmarks/real_text_peer.py --out runs/real-text-peer --collect          # results/real_text_peer.json

Each call is one run and leaves one partial result; calls may run side by side, one to a core. Same tokenizer, same
training and validation documents, same shape (256 x 6, vocabulary 6400), rows of 512. Time is that of the training
loop, without start-up, in wall seconds:

- ours is the command that a user types. Its steps are planned from a run of 20 seconds.
- the peer follows the clock itself: warmup over the first 5 % of the time, cosine to 10 % at its end, so that it uses
  all of its time whatever the machine does. Documents end to end in rows with the plain causal mask, reshuffled each
  epoch; fused AdamW (0.9, 0.95), decay 0.1 on matrices, clip 1; float32 or bf16 autocast, whichever is faster here.

The weights of both are judged by one function, in float32: bits per byte of the held-out documents, each by itself, and
(second figure, the peer's own way of reading) of all of them end to end.
"""

import argparse
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import contest
import peers

if TYPE_CHECKING:
    from minimind.batch import Batch
    from minimind.data.dataset import TokenDataset

ROW_LENGTH = 512
SHAPE: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 6}
RATES = (1e-3, 2e-3, 4e-3)
VALIDATION_FRACTION = 0.05
CALIBRATION_SECONDS = 20
MARGIN = 0.99
"""Of the time, what ours plans to use."""
TOLERANCE = 1.03
"""Ours may not take more than this times the peer's seconds."""


def main() -> None:
    """Make one run, or collect those made."""
    options = parse()
    if options.worker:
        print(json.dumps(train_llama(options)))
    elif options.collect:
        collect(options.out)
    else:
        files = corpus_files(options.data)[options.corpus]
        train, validation = prepare(options, files)
        is_ours = options.contender == "minimind"
        name = f"{options.corpus}-{options.contender}" + ("" if is_ours else f"-{options.lr:g}")
        contender = train_ours if is_ours else train_peer
        weights, numbers = contender(options, options.out / name, files, train)
        numbers = {"corpus": options.corpus, "contender": options.contender, **numbers, **judge(weights, validation)}
        (options.out / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(numbers, indent=1))


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder of tinystories/ and zh_classics/")
    parser.add_argument("--out", type=Path, default=Path("runs/real-text-peer"))
    parser.add_argument("--corpus", choices=("tinystories", "zh_classics"), default="tinystories")
    parser.add_argument("--contender", choices=("minimind", "transformers"), default="minimind")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--lr", type=float, default=RATES[0], help="the peer's highest learning rate")
    parser.add_argument("--peer-batch-tokens", type=int, default=4096)
    parser.add_argument("--our-batch-tokens", type=int, default=4096)
    parser.add_argument("--our-muon-lr", type=float, default=0.02)
    parser.add_argument("--our-lr", type=float, default=0.004)
    parser.add_argument("--our", nargs=argparse.REMAINDER, default=[], help="more flags of minimind pretrain; last")
    parser.add_argument("--collect", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def corpus_files(data: Path) -> dict[str, list[Path]]:
    """Return the text files of both corpora."""
    names = ("tinystories", "zh_classics")
    return {name: [f for f in sorted((data / name).glob("*.txt")) if "LICENSE" not in f.name] for name in names}


def prepare(options: argparse.Namespace, files: list[Path]) -> "tuple[TokenDataset, TokenDataset]":
    """Return (training, validation) documents, tokenised by one tokenizer of both corpora, made by the first call."""
    from minimind.data.config import DataConfig
    from minimind.data.dataset import train_and_validation
    from minimind.tokenizer.bpe import Tokenizer

    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = options.out / "tokenizer"
    with (options.out / "lock").open("w") as lock:  # calls side by side train it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tokenizer.exists():
            every = [str(file) for group in corpus_files(options.data).values() for file in group]
            minimind(options.threads, "train-tokenizer", "--data", *every, "--out", str(tokenizer))
    cache = options.out / "cache"
    config = DataConfig(
        files=tuple(files), row_length=ROW_LENGTH, cache_dir=cache, validation_fraction=VALIDATION_FRACTION
    )
    train, validation = train_and_validation(config, Tokenizer.load(tokenizer), kind="pretrain")
    assert validation
    return train, validation


def minimind(threads: int, *words: str) -> None:
    """Run one of our commands to its end."""
    subprocess.run([sys.executable, "-m", "minimind", *words], check=True, env=contest.environment(threads))


def train_ours(
    options: argparse.Namespace, out: Path, files: list[Path], _train: "TokenDataset"
) -> tuple[Path, dict[str, Any]]:
    """Run `minimind pretrain` for the given time and return (its run, its cost)."""
    flags: dict[str, Any] = {
        "data": [*map(str, files)],
        "data.validation-fraction": VALIDATION_FRACTION,
        "data.row-length": ROW_LENGTH,
        "data.cache-dir": options.out / "cache",
        "tokenizer": options.out / "tokenizer",
        "model.preset": "",
        "batch-tokens": options.our_batch_tokens,
        "eval-every": 0,
        "eval-tokens": ROW_LENGTH,
        "sample-every": 0,
        "optim.name": "muon",
        "optim.muon-lr": options.our_muon_lr,
        "optim.lr": options.our_lr,
    }
    flags |= {f"model.{name.replace('_', '-')}": size for name, size in SHAPE.items()}
    words = ["pretrain", *_words(flags)]
    budget = 60 * options.minutes
    first, rest = calibrate(options, [*words, *options.our], out.with_name(out.name + "-calibration"))
    steps = 1 + int((MARGIN * budget - first) / rest)
    end = {"steps": steps, "save-every": steps, "optim.warmup-steps": steps // 20, "out": out}
    words += [*_words(end), *options.our]
    minimind(options.threads, *words, "--fresh")
    last = [row for row in _metrics(out) if "train_loss" in row][-1]
    command = "minimind " + " ".join(words).replace(str(options.data), "DATA").replace(str(options.out), "OUT")
    cost = {"planned_seconds": MARGIN * budget, "seconds": last["seconds"], "tokens": last["tokens"], "steps": steps}
    return out, {"command": command, "rate": options.our_muon_lr, **cost, "memory_bytes": last["memory_bytes"]}


def _words(flags: dict[str, Any]) -> list[str]:
    """Return flags as words of a command line."""
    several = ((name, value if isinstance(value, list) else [value]) for name, value in flags.items())
    return [word for name, values in several for word in (f"--{name}", *map(str, values))]


def _metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def calibrate(options: argparse.Namespace, words: list[str], out: Path) -> tuple[float, float]:
    """Return (seconds of the first step, of every later one), from the same command, interrupted after a while."""
    shutil.rmtree(out, ignore_errors=True)
    endless = ["--steps", "1000000", "--save-every", "0", "--log-every", "2", "--out", str(out)]
    child = subprocess.Popen(
        [sys.executable, "-m", "minimind", *words, *endless], env=contest.environment(options.threads)
    )
    rows: list[dict[str, Any]] = []
    while child.poll() is None and (len(rows) < 3 or rows[-1]["seconds"] - rows[0]["seconds"] < CALIBRATION_SECONDS):
        time.sleep(0.5)
        rows = [row for row in _metrics(out) if "train_loss" in row]
    child.send_signal(signal.SIGINT)
    child.wait()
    if len(rows) < 3:
        sys.exit("the calibration run ended early")
    return rows[0]["seconds"], (rows[-1]["seconds"] - rows[0]["seconds"]) / (rows[-1]["step"] - rows[0]["step"])


def train_peer(
    options: argparse.Namespace, out: Path, _files: list[Path], train: "TokenDataset"
) -> tuple[Path, dict[str, Any]]:
    """Train Transformers' Llama in the peers' environment and return (its directory, its cost)."""
    import numpy as np

    from minimind.model.config import ModelConfig
    from minimind.tokenizer.bpe import Tokenizer

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    tokenizer = Tokenizer.load(options.out / "tokenizer")
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE)
    (out / "shape.json").write_text(json.dumps(shape.to_hf()), encoding="utf-8")
    np.save(out / "tokens.npy", train.ids)
    words = [str(peers.python()), __file__, *sys.argv[1:], "--worker"]
    words += ["--tokens", str(out / "tokens.npy"), "--shape", str(out / "shape.json"), "--out", str(out)]
    done = subprocess.run(words, check=True, env=contest.environment(options.threads), stdout=subprocess.PIPE)
    tokenizer.save(out, model_max_length=shape.max_position_embeddings)
    return out, json.loads(done.stdout.splitlines()[-1])


def train_llama(options: argparse.Namespace) -> dict[str, Any]:
    """Train LlamaForCausalLM for the given time (in the peers' environment), write it, and return what it cost."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_json_file(options.shape))
    stream = torch.from_numpy(np.load(options.tokens).astype(np.int64))
    rows = stream[: len(stream) // ROW_LENGTH * ROW_LENGTH].view(-1, ROW_LENGTH)
    size = options.peer_batch_tokens // ROW_LENGTH
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)

    def update(batch: torch.Tensor, rate: float, *, is_bf16: bool) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def seconds_of_step(*, is_bf16: bool) -> float:
        taken: list[float] = []
        for _ in range(4):
            start = time.perf_counter()
            update(rows[:size], 0.0, is_bf16=is_bf16)
            taken.append(time.perf_counter() - start)
        return min(taken)

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    is_bf16 = seconds_of_step(is_bf16=True) < seconds_of_step(is_bf16=False)
    model.load_state_dict(state)
    optimizer.state.clear()

    budget, steps, losses = 60 * options.minutes, 0, [math.nan]
    order = torch.empty(0, dtype=torch.int64)
    start, busy = time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - start) < budget * (1 - 0.5 / max(1, steps)):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(rows))])
        batch, order = rows[order[:size]], order[size:]
        part = elapsed / budget
        decay = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * max(0.0, (part - 0.05) / 0.95)))
        losses.append(update(batch, options.lr * min(decay, max(part, 1 / 1000) / 0.05), is_bf16=is_bf16))
        steps += 1
        if steps % 50 == 0:
            print(f"step {steps}  loss {losses[-1]:.3f}  {elapsed:.0f} s", file=sys.stderr)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - busy
    model.save_pretrained(options.out)
    cost = {"planned_seconds": budget, "seconds": seconds, "cpu_seconds": cpu_seconds, "steps": steps}
    cost |= {"tokens": steps * size * ROW_LENGTH, "memory_bytes": contest.peak_rss()}
    return {"rate": options.lr, "batch_tokens": options.peer_batch_tokens, "bf16": is_bf16, **cost}


def judge(weights: Path, validation: "TokenDataset") -> dict[str, Any]:
    """Return the bits per byte of the validation documents under a trained model of either contender."""
    from minimind.checkpoint import load
    from minimind.data.loader import Loader
    from minimind.data.packing import pack
    from minimind.evaluation.perplexity import evaluate_loss

    model, tokenizer = load(weights)
    loader = Loader(pack(validation, ROW_LENGTH), batch_rows=8, micro_rows=8, seed=0, pad_id=tokenizer.pad_id)
    apart = evaluate_loss(model, loader.all_batches(), tokenizer.token_bytes)
    together = evaluate_loss(model, end_to_end(validation, tokenizer.bos_id), tokenizer.token_bytes)
    return {
        "val_bits_per_byte": apart["val_bits_per_byte"],
        "val_bits_per_byte_end_to_end": together["val_bits_per_byte"],
        "val_loss": apart["val_loss"],
        "val_tokens": validation.num_learned_tokens,
        "parameters": model.config.num_parameters()[0],
    }


def end_to_end(dataset: "TokenDataset", bos_id: int) -> "Iterator[Batch]":
    """Yield all documents as one stream in rows with the plain causal mask; the openings of documents are not asked."""
    import numpy as np
    import torch

    from minimind.batch import Batch

    ids = torch.from_numpy(np.asarray(dataset.ids, dtype=np.int64))
    for start in range(0, len(ids) - 1, ROW_LENGTH):
        row = ids[None, start : start + ROW_LENGTH + 1]
        inputs, labels = row[:, :-1].contiguous(), row[:, 1:].contiguous()
        positions, weights = torch.arange(inputs.shape[1])[None], (labels != bos_id).float()
        yield Batch(inputs, labels, positions, torch.zeros_like(inputs), weights, float(weights.sum()))


def collect(out: Path) -> None:
    """Print every run and write them all; ours is compared with the peer's best rate of the same corpus."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*.json"))]
    verdicts: dict[str, Any] = {}
    print(f"{'corpus':12} {'contender':13} {'rate':>6} {'bits/byte':>9} {'tokens/s':>9} {'seconds':>8} {'GiB':>5}")
    for run in runs:
        speed, memory = run["tokens"] / run["seconds"], run["memory_bytes"] / 2**30
        print(
            f"{run['corpus']:12} {run['contender']:13} {run['rate']:6g} {run['val_bits_per_byte']:9.4f} "
            f"{speed:9.0f} {run['seconds']:8.1f} {memory:5.2f}"
        )
    for corpus in sorted({run["corpus"] for run in runs}):
        own = [run for run in runs if run["corpus"] == corpus and run["contender"] == "minimind"]
        theirs = [run for run in runs if run["corpus"] == corpus and run["contender"] != "minimind"]
        if own and theirs:
            best = min(theirs, key=lambda run: run["val_bits_per_byte"])
            verdicts[corpus] = {
                "ours / best peer, bits per byte": own[0]["val_bits_per_byte"] / best["val_bits_per_byte"],
                "ours / best peer, end to end": own[0]["val_bits_per_byte_end_to_end"]
                / min(run["val_bits_per_byte_end_to_end"] for run in theirs),
                "ours / peer, seconds": own[0]["seconds"] / best["seconds"],
                "is_in_time": own[0]["seconds"] <= TOLERANCE * best["seconds"],
                "rates_tried": sorted(run["rate"] for run in theirs),
            }
            print(corpus, json.dumps(verdicts[corpus]))
    contest.write("real_text_peer", {"verdicts": verdicts, "runs": runs})


if __name__ == "__main__":
    main()
