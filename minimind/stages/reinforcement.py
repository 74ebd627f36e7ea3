"""Learning from rewards: what GRPO, PPO and SPO do once they have a model. Prompts -> player -> experience -> loop.

The policy answers prompts of a file, rewards judge the answers, and the one loop learns from them. Which prompts are
asked, what an answer's advantage is and what the loss is, the stage says.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import cache, partial
from math import ceil
from typing import TYPE_CHECKING, Any

from minimind.stages.base import begin, loop_config
from minimind.stages.rollouts import ReinforcementConfig

if TYPE_CHECKING:
    from minimind.model.transformer import Transformer
    from minimind.model.weights import WeightsOnDisk
    from minimind.rl.experience import Algorithm, Experience
    from minimind.rl.player import Player
    from minimind.rl.rollout import Backend, Sample
    from minimind.rl.trajectory import Meter
    from minimind.tokenizer.bpe import Tokenizer
    from minimind.training.loop import FitResult
    from minimind.training.step import Objective

ROW_LENGTH = 1024
"""The longest row of a micro-batch, unless `data.row_length` says otherwise or a sample needs more."""


def train(
    config: ReinforcementConfig,
    model: "WeightsOnDisk",
    policy: "Transformer",
    tokenizer: "Tokenizer",
    *,
    objective: "Objective",
    make_algorithm: "Callable[[Meter, int], Algorithm]",
    make_player: "Callable[..., Player] | None" = None,
    on_row: "Callable[[Experience, dict[str, Any]], None] | None" = None,
    tools: Sequence[dict[str, Any]] | None = None,
    observation_tokens: int = 0,
    **plan: Any,
) -> "FitResult":
    """Run the one loop on what `policy` (a part of `model`, or all of it) experiences; returns what the loop returns.

    `make_algorithm(meter, number of prompts)`; `plan` completes the `Plan`; `make_player` takes what `Player` takes;
    `on_row` sees the numbers of each step. `tools`: every prompt must offer some, one that names none offers these; all
    replies to one prompt have `observation_tokens`.

    Raises ConfigError for rewards that are not there, CheckpointError for a run of another model or tokenizer,
    DataError for bad, too long or changed prompts, and whatever `fit` raises.
    """
    from minimind.checkpoint import check_identity
    from minimind.inference.engine import Engine
    from minimind.inference.sampling import SamplingParams
    from minimind.rl.experience import Experience, Plan
    from minimind.rl.player import Player
    from minimind.rl.prompts import PromptSet, read_prompts
    from minimind.rl.remote import Recomputed, VLLMServer, publish
    from minimind.rl.rewards import Rewards
    from minimind.rl.trajectory import Meter, Packer
    from minimind.runtime import distributed
    from minimind.runtime.device import pick_device, pick_dtype
    from minimind.runtime.integrity import sha256_of_tensors
    from minimind.stages.scorers import scorers_on
    from minimind.training.loop import fit
    from minimind.training.run import RunDirectory

    device = pick_device(config.device)
    distributed.init(device)
    dtype = pick_dtype(config.dtype, device, num_parameters=policy.config.num_parameters()[0])
    policy.gradient_checkpointing = config.gradient_checkpointing
    enable_thinking = {"auto": None, "on": True, "off": False}[config.thinking]
    rewards, run = Rewards(config.rewards, scorer_of=scorers_on(device)), RunDirectory(config.out)
    with closing(rewards), run:
        if config.resume and not config.fresh:
            check_identity(run.path, tokenizer_sha256=tokenizer.sha256, model_config=policy.config)
        # What needs no rollout is refused before the first one.
        answer = config.max_tokens + observation_tokens
        room = policy.config.max_position_embeddings - answer
        asked, held_out = read_prompts(config.data, tokenizer, room=room, enable_thinking=enable_thinking, tools=tools)
        rewards.check([*asked.prompts, *held_out.prompts])

        @cache
        def engine() -> Engine:  # not before the loop has moved the model
            rows = min(config.generation_rows, max(config.prompts * config.samples, len(held_out)))
            length = max(asked.longest, held_out.longest) + answer
            return Engine(policy, max_batch_size=rows, max_length=length, dtype=dtype)

        def player(prompts: PromptSet, backend: "Callable[[], Backend]" = engine) -> Player:
            params = SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens)
            new = make_player or Player
            return new(backend, prompts, tokenizer, rewards, params=params, enable_thinking=enable_thinking)

        teacher, examiner = player(asked), player(held_out)
        packer = Packer(config.data.row_length or ROW_LENGTH, config.micro_batch_tokens, tokenizer.pad_id)
        names = ("prompts", "samples", "max_tokens", "minibatches", "mask_truncated", "seed")
        meter = Meter(packer, device, dtype)
        algorithm = make_algorithm(meter, len(asked))
        play = teacher.play
        if config.rollout.backend == "vllm":
            hand_over = partial(publish, run.path, policy, tokenizer)
            server = VLLMServer(config.rollout, publish=hand_over, run=run.path, vocab_size=policy.config.vocab_size)
            algorithm = Recomputed(algorithm, server, policy=policy, meter=meter, temperature=config.temperature)
            distant = player(asked, lambda: server)

            def play_there(indices: Sequence[int], seeds: Sequence[int]) -> "list[Sample]":
                server.at(experience.step)
                return distant.play(indices, seeds)

            play = play_there

        identity = {"prompts": asked.fingerprint}
        if "ref_log_probs" in algorithm.extras:
            identity["reference"] = sha256_of_tensors(policy.state_dict_for_disk())
        experience = Experience(
            Plan(epochs=config.rollout_epochs, **{name: getattr(config, name) for name in names}, **plan),
            play=play,
            judge=teacher.judge,
            algorithm=algorithm,
            packer=packer,
            identity=identity,
        )
        describe = begin(run, config, {"prompts": asked.fingerprint, "tokenizer": tokenizer.sha256})

        def on_step(_: int, row: dict[str, Any]) -> None:
            describe()
            if on_row:
                on_row(experience, row)

        rollouts = ceil(config.epochs * len(asked) / config.prompts)
        return fit(
            model,
            objective,
            experience,
            run=run,
            loop=loop_config(config, config.steps or rollouts * experience.plan.updates),
            optim=config.optim,
            model_config=policy.config,
            tokenizer=tokenizer,
            validate=partial(examiner.validate, config.eval_tokens // config.max_tokens or 1)
            if len(held_out)
            else None,
            sample=lambda _: [teacher.show(one) for one in experience.shown()],
            on_step=on_step,
        )
