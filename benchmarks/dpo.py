"""How long one optimizer step of DPO takes: ours beside TRL's DPOTrainer.

    python benchmarks/dpo.py [--threads 2] [--rounds 5] [--preset small] [--only NAME ...]

The small preset (25.8M: 512 x 8, vocabulary 6400); 120 pairs of random ids, a prompt of 24 to 128 tokens, answers of
24 to 128 tokens, so that a side has 256 at most and 152 on average. Every contender gets the same ones, in bf16,
with fused AdamW and the norm clipped at 1. Seconds are for four pairs: they are the time of a round over its pairs,
times 4.

- ours: one row of 1280 a step, four pairs on average, through the package's own path (packing, `PairLoader`, the
  objective, `Stepper`). The reference is asked once before; what that takes is a number of its own
- TRL: four pairs a step, padded to the longest; its reference runs in every step (the default)
- TRL precomputed: the same with the reference asked once before (an option of the trainer)

TRL runs without gradient checkpointing (its default, which would cost it a third).
"""

import copy
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import contest
from held import Held
from limits import LIMITS

LENGTHS = (24, 129)
ROW_LENGTH = 1280
NUM_PAIRS = 120
PAIRS_OF_A_STEP = 4
STEPS_OF_A_ROUND = 3
BETA = 0.1


def ours(task: contest.Task) -> contest.Round:
    """Return a round of our DPO: the token cache, packing, the loader with its reference, and the step."""
    import torch

    from minimind.batch import Batch
    from minimind.data.build import Writer
    from minimind.data.dataset import TokenDataset
    from minimind.data.packing import pack
    from minimind.data.pairs import PairLoader, Reference
    from minimind.model.config import ModelConfig
    from minimind.model.transformer import Transformer
    from minimind.objectives.dpo import dpo
    from minimind.objectives.preference import document_log_probs
    from minimind.training.config import OptimConfig
    from minimind.training.optim import Optimizer
    from minimind.training.step import Stepper

    model, config, cpu = Transformer(ModelConfig.from_preset(task["preset"])), OptimConfig(lr=1e-6), torch.device("cpu")

    def score(batch: Batch) -> torch.Tensor:
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):  # as stages/reference.py does
            output = model(batch.input_ids, positions=batch.positions, documents=batch.documents)
            return document_log_probs(output, batch).detach()

    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens"
        tokens.mkdir()
        writer = Writer(tokens, task["vocab_size"], uniform=False)
        for pair in _pairs(task):
            start = len(pair["prompt_ids"])
            sides = [pair["prompt_ids"] + pair[side] for side in ("chosen_ids", "rejected_ids")]
            writer.add(sides, [[float(i >= start) for i in range(len(ids))] for ids in sides])
        writer.close({"kind": "preference", "fingerprint": "benchmark", "max_length": 256, "report": {}})
        started = time.perf_counter()
        rows = pack(TokenDataset(tokens), ROW_LENGTH)
        loader = PairLoader(
            rows, reference=lambda: Reference("random", "bfloat16", score), batch_rows=1, micro_rows=1, seed=0
        )
        asked = time.perf_counter() - started
        first = loader.micro_batches(0)  # the files are mapped now and stay readable
    del first
    stepper = Stepper(
        model.train(),
        partial(dpo, beta=BETA),
        Optimizer(model, config),
        config,
        steps=1_000_000,
        device=cpu,
        dtype=torch.bfloat16,
        is_compiled=False,
        inspection_dir=Path(tempfile.gettempdir()) / "minimind-diverged",
    )
    done = [0]

    def play() -> dict[str, float]:
        found: list[dict[str, Any]] = []

        def steps() -> None:
            for _ in range(STEPS_OF_A_ROUND):
                found.append(stepper.update(done[0], loader.micro_batches(done[0])))
                done[0] += 1

        seconds = contest.timed(steps)
        num_pairs = sum(row["step_weight"] for row in found)
        numbers = _numbers(seconds, num_pairs, sum(row["step_tokens"] for row in found))
        return numbers | {"reference_seconds_of_four_pairs": PAIRS_OF_A_STEP * asked / NUM_PAIRS}

    return play


def trl(task: contest.Task, *, is_precomputed: bool) -> contest.Round:
    """Return a round of TRL's DPOTrainer."""
    import torch
    from datasets import Dataset  # pyright: ignore[reportMissingImports] - in the peers' environment only
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports, reportPrivateImportUsage]

    words = {f"w{i}": i for i in range(task["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w2"
    )
    found = [0]

    class Counting(DPOTrainer):  # pyright: ignore[reportUntypedBaseClass]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return dataset  # token ids already

        def training_step(self, model: Any, inputs: dict[str, torch.Tensor], *more: Any) -> torch.Tensor:
            found[0] += int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *more)

    def make(callback: Any) -> Any:
        model = LlamaForCausalLM(LlamaConfig(**task["shape"]))
        return Counting(
            model=model,
            ref_model=None if is_precomputed else copy.deepcopy(model),
            args=DPOConfig(
                output_dir=tempfile.mkdtemp(),
                per_device_train_batch_size=PAIRS_OF_A_STEP,
                max_steps=10_000,
                max_length=256,
                beta=BETA,
                precompute_ref_log_probs=is_precomputed,
                bf16=True,
                use_cpu=True,
                gradient_checkpointing=False,
                optim="adamw_torch_fused",
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(_pairs(task)),
            processing_class=tokenizer,
            callbacks=[callback],
        )

    trainer = Held(make)

    def play() -> dict[str, float]:
        found[0] = 0
        seconds = contest.timed(lambda: trainer.steps(STEPS_OF_A_ROUND))
        return _numbers(seconds, STEPS_OF_A_ROUND * PAIRS_OF_A_STEP, found[0])

    return play


def _numbers(seconds: float, num_pairs: float, num_tokens: int) -> dict[str, float]:
    return {
        "seconds_of_four_pairs": PAIRS_OF_A_STEP * seconds / num_pairs,
        "tokens_per_second": num_tokens / seconds,
    }


def _pairs(task: contest.Task) -> list[dict[str, list[int]]]:
    return json.loads(Path(task["pairs"]).read_text())


def write_pairs(path: Path, vocab_size: int) -> float:
    """Write the pairs' token ids; return the mean length of a side."""
    import numpy as np

    random = np.random.default_rng(0)

    def ids() -> list[int]:
        return random.integers(3, vocab_size, random.integers(*LENGTHS)).tolist()

    pairs = [{"prompt_ids": ids(), "chosen_ids": ids(), "rejected_ids": ids()} for _ in range(NUM_PAIRS)]
    path.write_text(json.dumps(pairs))
    sides = [len(pair["prompt_ids"]) + len(pair[side]) for pair in pairs for side in ("chosen_ids", "rejected_ids")]
    return float(np.mean(sides))


CONTENDERS = [
    LIMITS,
    contest.Contender("minimind", ours),
    contest.Contender("trl", partial(trl, is_precomputed=False), is_peer=True),
    contest.Contender("trl precomputed", partial(trl, is_precomputed=True), is_peer=True),
]


def main() -> None:
    """Play the race, print and write."""
    parser = contest.parser(__doc__)
    parser.add_argument("--preset", default="small")
    options = parser.parse_args()
    if options.worker:
        contest.work(CONTENDERS, options.worker)
        return
    from minimind.model.config import ModelConfig

    config = ModelConfig.from_preset(options.preset)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.json"
        mean = write_pairs(path, config.vocab_size)
        shape = {
            key: value
            for key, value in config.to_hf().items()
            if key not in ("architectures", "minimind", "model_type", "torch_dtype")
        }
        task = {"pairs": str(path), "vocab_size": config.vocab_size, "preset": options.preset, "shape": shape}
        results = contest.race(CONTENDERS, task, options)
    flops = config.flops_per_token(round(mean))
    ceiling: float = 1e9 * results["limits"]["gemm_bf16_gflops"] / flops
    title = f"DPO, {mean:.0f} tokens a side on average, {flops / 1e6:.1f} MFLOP a real token without the reference"
    peers = [one.name for one in CONTENDERS if one.is_peer]
    contest.report(title, results, peers, ceilings=dict.fromkeys(results, ceiling))
    for name, found in results.items():
        if "seconds_of_four_pairs" in found:
            print(f"{name:32} {found['seconds_of_four_pairs']:9.2f} s for four pairs")
    if options.preset == "small":
        contest.write("dpo", {"threads": options.threads, "mean_length": mean, "limit": ceiling, **results})


if __name__ == "__main__":
    main()
