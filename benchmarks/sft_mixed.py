"""How fast fine-tuning on conversations of mixed lengths is, in real tokens a second: ours beside TRL's SFTTrainer.

    python benchmarks/sft_mixed.py [--threads 2] [--rounds 5] [--only NAME ...]

The small preset (25.8M: 512 x 8, vocabulary 6400); 2,000 conversations of random ids whose lengths are drawn from a
log-normal, 24 to 512 tokens, 183 on average; the second half of each is learned. Every contender gets the same ones, in
bf16, with fused AdamW and the norm clipped at 1, about 4,096 real tokens a step:

- ours: 8 rows of 512 through the package's own path (token cache, packing, loader, `Stepper`), attention inside
  documents
- TRL padded: twice 11 conversations (22 at once need 5 GB); and the same grouped by length, an option of the trainer
- TRL packed (its default packing, "bfd"): 8 rows of 512, which it lays into one row with a dense mask; and the same
  rows one by one with gradient accumulation
- TRL wrapped: conversations laid end to end and cut at the rows' ends, each seeing its neighbours. Another training
  than all the others; reported, but not counted among the peers

TRL runs as its `Trainer` runs, without gradient checkpointing (its default, which would cost it a third); a callback
holds it between rounds. Real tokens are inputs that are not padding.
"""

import json
import tempfile
import threading
from functools import partial
from pathlib import Path
from typing import Any

import contest
from limits import LIMITS
from training_step import shapes, stepper

LENGTH = 512
ROWS = 8
NUM_CONVERSATIONS = 2000
CONVERSATIONS = 11
MEAN = 183
STEPS_OF_A_ROUND = 2


def ours(task: contest.Task, *, is_compiled: bool) -> contest.Round:
    """Return a round of our fine-tuning: the token cache, packing, the loader and the step."""
    from minimind.data.build import Writer
    from minimind.data.dataset import TokenDataset
    from minimind.data.loader import Loader
    from minimind.data.packing import pack

    documents: list[list[int]] = json.loads(Path(task["documents"]).read_text())
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens"
        tokens.mkdir()
        writer = Writer(tokens, task["vocab_size"], uniform=False)
        writer.add(documents, [[float(learned) for learned in _mask(ids)] for ids in documents])
        writer.close({"kind": "conversation", "fingerprint": "benchmark", "max_length": LENGTH, "report": {}})
        rows = pack(TokenDataset(tokens), LENGTH)
        loader = Loader(rows, batch_rows=ROWS, micro_rows=ROWS, seed=0)
        first = loader.micro_batches(0)  # the files are mapped now and stay readable
    update, done = stepper("small", is_compiled=is_compiled).update, [0]
    del first

    def play() -> dict[str, float]:
        found: list[dict[str, Any]] = []

        def steps() -> None:
            for _ in range(STEPS_OF_A_ROUND):
                found.append(update(done[0], loader.micro_batches(done[0])))
                done[0] += 1

        seconds = contest.timed(steps)
        return {"tokens_per_second": sum(row["step_tokens"] for row in found) / seconds}

    return play


def trl(task: contest.Task, *, rows: int, accumulate: int = 1, **options: Any) -> contest.Round:
    """Return a round of TRL's SFTTrainer with `options` of its config."""
    import torch
    from datasets import Dataset  # pyright: ignore[reportMissingImports] - in the peers' environment only
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports, reportPrivateImportUsage]

    documents: list[list[int]] = json.loads(Path(task["documents"]).read_text())
    columns = {"input_ids": documents, "completion_mask": [_mask(ids) for ids in documents]}
    words = {f"w{i}": i for i in range(task["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w2"
    )
    may_go, is_done, found = threading.Semaphore(0), threading.Semaphore(0), [0]

    class Held(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            may_go.acquire()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            is_done.release()

    class Counting(SFTTrainer):  # pyright: ignore[reportUntypedBaseClass]
        def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *more: Any) -> torch.Tensor:
            mask = inputs.get("attention_mask")
            found[0] += inputs["input_ids"].numel() if mask is None else int(mask.sum())
            return super().training_step(model, inputs, *more)

    trainer = Counting(
        model=LlamaForCausalLM(LlamaConfig(**task["shape"])),
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulate,
            max_steps=10_000,
            max_length=LENGTH,
            completion_only_loss=True,
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
            optim="adamw_torch_fused",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **options,
        ),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[Held()],
    )
    failed: list[BaseException] = []

    def train() -> None:
        try:
            trainer.train()
        except BaseException as error:
            failed.append(error)
            is_done.release(STEPS_OF_A_ROUND)
            raise

    threading.Thread(target=train, daemon=True).start()

    def steps() -> None:
        may_go.release(STEPS_OF_A_ROUND)
        for _ in range(STEPS_OF_A_ROUND):
            is_done.acquire()

    def play() -> dict[str, float]:
        found[0] = 0
        seconds = contest.timed(steps)
        if failed:
            raise failed[0]
        return {"tokens_per_second": found[0] / seconds}

    return play


def _mask(ids: list[int]) -> list[int]:
    """Return which tokens are learned: the second half."""
    return [int(i >= len(ids) // 2) for i in range(len(ids))]


def _peer(name: str, **options: Any) -> contest.Contender:
    return contest.Contender(f"trl {name}", partial(trl, **options), is_peer=True)


CONTENDERS = [
    LIMITS,
    contest.Contender("minimind", partial(ours, is_compiled=False)),
    contest.Contender("minimind compiled", partial(ours, is_compiled=True)),
    _peer("padded", rows=CONVERSATIONS, accumulate=2),
    _peer("padded by length", rows=CONVERSATIONS, accumulate=2, train_sampling_strategy="group_by_length"),
    _peer("packed", rows=ROWS, packing=True),
    _peer("packed row by row", rows=1, accumulate=ROWS, packing=True),
    _peer("wrapped", rows=ROWS, packing=True, packing_strategy="wrapped"),
]
OTHER_TRAINING = {"trl wrapped"}


def write_documents(path: Path, vocab_size: int) -> dict[str, float]:
    """Write the conversations' token ids; return what their lengths are like."""
    import numpy as np

    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(MEAN) - 0.2, 0.7, NUM_CONVERSATIONS), 24, LENGTH).astype(int)
    path.write_text(json.dumps([random.integers(3, vocab_size, size).tolist() for size in lengths]))
    return {"mean": float(lengths.mean()), "median": float(np.median(lengths)), "max": int(lengths.max())}


def main() -> None:
    """Play the race, print and write."""
    options = contest.parser(__doc__).parse_args()
    if options.worker:
        contest.work(CONTENDERS, options.worker)
        return
    from minimind.model.config import ModelConfig

    shape = shapes()["llama"]
    with tempfile.TemporaryDirectory() as folder:
        documents = Path(folder) / "documents.json"
        lengths = write_documents(documents, shape["vocab_size"])
        task = {"documents": str(documents), "vocab_size": shape["vocab_size"], "shape": shape}
        results = contest.race(CONTENDERS, task, options)
    flops = ModelConfig.from_preset("small").flops_per_token(MEAN)
    ceiling: float = 1e9 * results["limits"]["gemm_bf16_gflops"] / flops
    title = f"fine-tuning, {lengths['mean']:.0f} tokens on average, {flops / 1e6:.1f} MFLOP a real token"
    peers = [one.name for one in CONTENDERS if one.is_peer and one.name not in OTHER_TRAINING]
    contest.report(title, results, peers, ceilings=dict.fromkeys(results, ceiling))
    contest.write("sft_mixed", {"threads": options.threads, "lengths": lengths, "limit": ceiling, **results})


if __name__ == "__main__":
    main()
