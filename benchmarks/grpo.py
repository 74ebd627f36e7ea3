"""How long one optimizer step of GRPO takes, generation included: ours beside TRL's GRPOTrainer.

    python benchmarks/grpo.py [--threads 2] [--rounds 5] [--only NAME ...]

The small preset (25.8M: 512 x 8, vocabulary 6400), new weights: 4 prompts of 24 to 40 random ids, 4 samples each, 64
tokens each (nobody stops earlier), temperature 1, advantages of the group, KL to a frozen reference (beta 0.02), one
step of AdamW with the norm clipped at 1. The reward is a count over the ids, which costs nothing.

- ours: the package's own path (`Experience` over the engine with the live weights, reference, packed rows, `Stepper`)
- TRL: generation through Transformers, one forward of 16 rows; bf16 as its `Trainer` has it, and float32

Both without gradient checkpointing. TRL runs as its `Trainer` runs; a callback holds it between rounds. Reported are
seconds for a step, and generated tokens a second of it all.
"""

import json
import tempfile
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import contest
from held import Held
from limits import LIMITS
from training_step import shapes

PROMPTS, SAMPLES, TOKENS, BETA = 4, 4, 64, 0.02
NUM_PROMPTS = 64
STEPS_OF_A_ROUND = 2
MUST, EXCELLENT = 2.5, 1.9
"""Seconds a step that we ask of ourselves, on the machine where TRL took 3.6 in bf16."""


def ours(task: contest.Task, *, dtype: str) -> contest.Round:
    """Return a round of our GRPO steps."""
    import torch

    from minimind.inference.engine import Engine
    from minimind.inference.sampling import SamplingParams
    from minimind.model.config import ModelConfig
    from minimind.model.transformer import Transformer
    from minimind.objectives.grpo import grpo
    from minimind.rl.credit import Groups, Reference
    from minimind.rl.experience import Experience, Plan, PromptOrder
    from minimind.rl.rollout import Sample, rollout
    from minimind.rl.trajectory import Meter, Packer, Trajectory
    from minimind.runtime.device import DTYPES
    from minimind.training.config import OptimConfig
    from minimind.training.optim import Optimizer
    from minimind.training.step import Stepper

    prompts: list[list[int]] = json.loads(Path(task["prompts"]).read_text())
    model, config = Transformer(ModelConfig.from_preset("small")).train(), OptimConfig(lr=1e-6)
    device, precision = torch.device("cpu"), DTYPES[dtype]
    params = SamplingParams(max_tokens=TOKENS)
    packer = Packer(1024, 4096, 0)
    meter = Meter(packer, device, precision)
    reference = Reference(deepcopy(model), meter, 1.0)
    longest = max(map(len, prompts)) + TOKENS
    engine = Engine(model, max_batch_size=PROMPTS * SAMPLES, max_length=longest, dtype=precision)

    def play(indices: Any, seeds: Any) -> list[Sample]:
        asked = [prompts[index] for index in indices]
        return rollout(engine, asked, samples_per_prompt=SAMPLES, params=params, seeds=seeds, prompt_indices=indices)

    def judge(samples: Any) -> list[Trajectory]:
        return [Trajectory(sample, _count(sample.ids)) for sample in samples]

    experience = Experience(
        Plan(prompts=PROMPTS, samples=SAMPLES, max_tokens=TOKENS),
        play=play,
        judge=judge,
        algorithm=Groups(PromptOrder(len(prompts), PROMPTS, 0), reference, samples=SAMPLES, use_std=True),
        packer=packer,
        identity={},
    )
    stepper = Stepper(
        model,
        partial(grpo, beta=BETA),
        Optimizer(model, config),
        config,
        steps=1_000_000,
        device=device,
        dtype=precision,
        is_compiled=False,
        inspection_dir=Path(tempfile.gettempdir()) / "minimind-diverged",
    )
    done = [0]

    def step() -> None:
        stepper.update(done[0], experience.micro_batches(done[0]))
        done[0] += 1

    return _round(lambda: [step() for _ in range(STEPS_OF_A_ROUND)])


def trl(task: contest.Task, *, is_bf16: bool) -> contest.Round:
    """Return a round of TRL's GRPOTrainer."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports] - in the peers' environment only
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl.trainer.grpo_config import GRPOConfig  # pyright: ignore[reportMissingImports]
    from trl.trainer.grpo_trainer import GRPOTrainer  # pyright: ignore[reportMissingImports]

    prompts: list[list[int]] = json.loads(Path(task["prompts"]).read_text())
    words = {f"w{i}": i for i in range(task["shape"]["vocab_size"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w2")

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [_count(ids) for ids in completion_ids]

    folder = tempfile.mkdtemp()  # the trainer reads its reference from where the policy came from
    LlamaForCausalLM(LlamaConfig(**task["shape"])).save_pretrained(folder)

    def make(gate: Any) -> Any:
        return GRPOTrainer(
            model=folder,
            reward_funcs=reward,  # pyright: ignore[reportArgumentType] - installed or not, its type asks for less
            args=GRPOConfig(
                output_dir=tempfile.mkdtemp(),
                model_init_kwargs={"dtype": "float32"},
                per_device_train_batch_size=PROMPTS * SAMPLES,
                num_generations=SAMPLES,
                max_completion_length=TOKENS,
                generation_kwargs={"min_new_tokens": TOKENS},
                temperature=1.0,
                beta=BETA,
                max_steps=10_000,
                bf16=is_bf16,
                use_cpu=True,
                gradient_checkpointing=False,
                optim="adamw_torch_fused",
                learning_rate=1e-6,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in ids) for ids in prompts]}),
            processing_class=tokenizer,
            callbacks=[gate],
        )

    held = Held(make)
    return _round(lambda: held.steps(STEPS_OF_A_ROUND))


def _count(ids: list[int]) -> float:
    """Return the reward: how many ids are even."""
    return float(sum(i % 2 == 0 for i in ids))


def _round(steps: contest.Action) -> contest.Round:
    def play() -> dict[str, float]:
        seconds = contest.timed(steps) / STEPS_OF_A_ROUND
        return {"seconds_per_step": seconds, "tokens_per_second": PROMPTS * SAMPLES * TOKENS / seconds}

    return play


CONTENDERS = [
    LIMITS,
    contest.Contender("minimind", partial(ours, dtype="bfloat16")),
    contest.Contender("minimind fp32", partial(ours, dtype="float32")),
    contest.Contender("trl bf16", partial(trl, is_bf16=True), is_peer=True),
    contest.Contender("trl fp32", partial(trl, is_bf16=False), is_peer=True),
]


def main() -> None:
    """Play the race, print and write."""
    options = contest.parser(__doc__).parse_args()
    if options.worker:
        contest.work(CONTENDERS, options.worker)
        return
    import numpy as np

    shape = shapes()["llama"]
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.json"
        lengths = random.integers(24, 41, NUM_PROMPTS)
        prompts.write_text(json.dumps([random.integers(3, shape["vocab_size"], size).tolist() for size in lengths]))
        results = contest.race(CONTENDERS, {"prompts": str(prompts), "shape": shape}, options)
    title = (
        f"GRPO, {PROMPTS} prompts x {SAMPLES} samples x {TOKENS} tokens (speeds are generated tokens of whole steps)"
    )
    contest.report(title, results, [one.name for one in CONTENDERS if one.is_peer], ceilings={})
    for name, found in results.items():
        if "seconds_per_step" in found:
            print(f"{name:32} {found['seconds_per_step']:6.2f} s a step")
    contest.write("grpo", {"threads": options.threads, "must": MUST, "excellent": EXCELLENT, **results})


if __name__ == "__main__":
    main()
