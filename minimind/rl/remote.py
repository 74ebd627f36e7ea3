"""Rollouts on another machine: a `Backend` that talks to a vLLM server, and what makes its samples fit to learn from.

Written against the HTTP interface of vLLM as its repository had it in 2026 (0.33 was the newest release):
entrypoints/openai/completion/protocol.py at d5dba2d7, serve/rpc/api_router.py at 09cb327f, rl/online/api_router.py at
39929f18. It has not been run against a vLLM server itself, only against tests/rl/fake_vllm.py.

    POST /v1/completions        prompt as token ids, `return_token_ids`, `logprobs`, a `seed` for each request
    POST /collective_rpc        {"method": "reload_weights", "kwargs": {"weights_path": DIRECTORY}}, between
    POST /pause, /resume        with POST /reset_prefix_cache after the load
    GET  /weight_info, POST /update_weight_version          a label of the weights, by which a restart is noticed

All but the first need VLLM_SERVER_DEV_MODE=1. What is loaded is a checkpoint directory, which is a Transformers
directory as it stands. The server must report log-probabilities at the temperature of the sampling
(--logprobs-mode processed_logprobs).

The server computes with other kernels and maybe older weights. So the log-probabilities of the policy at the beginning
of a rollout's use are computed here again (`old_log_probs`), and what the server said is kept beside them
(`rollout_log_probs`): the objective weighs each token with their ratio, cut from above (truncated importance sampling,
Espeholt et al. 2018, arXiv 1802.01561; Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
training"). It knows neither prompts nor rewards.
"""

import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from minimind import checkpoint
from minimind.errors import ConfigError, MinimindError, OutOfResourcesError
from minimind.inference.request import Completion
from minimind.inference.sampling import SamplingParams
from minimind.model.transformer import Transformer
from minimind.rl.config import RolloutConfig
from minimind.rl.connection import BrokenError, Connection, RefusedError
from minimind.rl.credit import log_probs_at
from minimind.rl.experience import Algorithm
from minimind.rl.trajectory import Meter, Trajectory
from minimind.runtime import distributed
from minimind.runtime.log import get_logger
from minimind.tokenizer.bpe import Tokenizer

MAX_REPEATS = 3
"""How often a rollout is sampled again because the server changed its weights meanwhile."""
SUSPICIOUS_GAP = 0.05
"""Nats between the server's log-probabilities and ours, with the same weights, that are too many for rounding."""

_log = get_logger("rollout")


class VLLMServer:
    """A `Backend`: a vLLM server that is handed the policy's weights when its own are too old.

    `at(step)` comes before the rollout of that step, on every rank alike; `generate` then samples.
    """

    def __init__(self, config: RolloutConfig, *, publish: Callable[[int], Path], run: Path, vocab_size: int) -> None:
        """`publish(step)` writes the weights of now and returns their directory, which lies below `run`."""
        self.config, self._publish, self._run, self._vocab_size = config, publish, run, vocab_size
        self._connection = Connection(config.url, timeout=config.timeout, patience=config.patience)
        self._name = config.served_model
        self._mark = uuid.uuid4().hex[:12]  # labels of another run, or of before a resume, are not taken for ours
        self._label, self._folder = "", Path()
        self._step = self.held_step = -1
        self._can_label = True

    @property
    def staleness(self) -> int:
        """Optimizer steps by which the weights of the last rollout are older than the policy's."""
        return self._step - self.held_step

    def at(self, step: int) -> None:
        """See to it that the server's weights are no more than `max_staleness` steps older than those of `step`.

        Auto: hands new ones over. Manual: writes them, says what to serve and waits for it. Raises ConfigError for a
        server that cannot do it, OutOfResourcesError when it stays away.
        """
        found: tuple[str, int] | MinimindError = ("", -1)
        if distributed.is_main():
            try:
                found = self._bring_to(step)
            except MinimindError as error:
                found = error
            except RefusedError as error:
                found = ConfigError(f"rollout: the vLLM server at {self.config.url} refused: {error}")
        found = distributed.broadcast_object(found)
        if isinstance(found, MinimindError):
            raise found
        self._step, (self._label, self.held_step) = step, found

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Completion]:
        """Return the answer to each prompt, in order, sampled by one version of the weights.

        Raises ConfigError for a server of another model or of other settings, OutOfResourcesError when it stays away.
        """
        if not prompts:
            return []
        if len(prompts) != len(params):
            raise ConfigError(f"generate: {len(prompts)} prompts but {len(params)} sampling parameters")
        for _ in range(MAX_REPEATS):
            answers = self._sample(prompts, params)
            if self._seen() == self._label:
                return answers
            _log.warning("%s changed its weights during the rollout, which is sampled again", self.config.url)
            self._restore()
        raise OutOfResourcesError(
            f"rollout: the vLLM server at {self.config.url} changed its weights {MAX_REPEATS} times in one rollout; "
            "see that it does not restart and that no other run uses it; the same command then goes on"
        )

    # -- weights -------------------------------------------------------------------------------------------------------

    def _bring_to(self, step: int) -> tuple[str, int]:
        """Return (label of the weights that the server will sample with, the step they are of)."""
        if self.config.reload == "manual":
            return self._await(step)
        held = self.held_step if self._label and self._seen() == self._label else None
        if held is None or not 0 <= step - held <= self.config.max_staleness:
            self._folder, label = self._publish(step), f"{self._mark}-{step}"
            self._load(self._folder, label)
            return label, step
        return self._label, held

    def _load(self, folder: Path, label: str) -> None:
        """Have the server take the weights in `folder`, and nothing that it computed with others."""
        start = time.perf_counter()
        path = self._as_seen_there(folder)
        self._control("POST", "/pause?mode=wait")
        try:
            call = {"method": "reload_weights", "kwargs": {"weights_path": path}, "timeout": self.config.timeout}
            self._connection.ask("POST", "/collective_rpc", call, final=(500,))
            self._control("POST", "/reset_prefix_cache")
        except RefusedError as error:
            raise ConfigError(
                f"rollout: the vLLM server at {self.config.url} could not load {path}: {error}. It must see that "
                "directory (a shared file system; --rollout.server-path says where it sees --out) and serve this model"
            ) from None
        finally:
            self._control("POST", "/resume")
        try:
            self._connection.ask("POST", "/update_weight_version", {"new_version": label})
        except RefusedError:  # a vLLM that has no labels yet
            if self._can_label:
                _log.warning("%s keeps no label of its weights: a restart would go unseen", self.config.url)
            self._can_label = False
        _log.info("%s loaded %s in %.1f s", self.config.url, path, time.perf_counter() - start)

    def _restore(self) -> None:
        """Give the server the weights of this rollout again, or wait until someone has."""
        if self.config.reload == "manual":
            self._label, self.held_step = self._await(self._step)
        elif distributed.is_main():
            self._load(self._folder, self._label)
        else:
            self._wait_for(lambda: self._seen() == self._label, f"serve the weights of step {self.held_step} again")

    def _await(self, step: int) -> tuple[str, int]:
        """Return (path that is served, its step) as soon as that is recent enough."""
        found: tuple[str, int] = ("", -1)

        def is_recent() -> bool:
            nonlocal found
            root = self._seen()
            number = re.search(r"step-(\d+)/?$", root)
            found = (root, int(number[1]) if number else -1)
            return number is not None and 0 <= step - found[1] <= self.config.max_staleness

        if not is_recent():
            path = self._as_seen_there(self._publish(step))
            _log.warning(
                "%s serves %s, the policy is at step %d; serve: vllm serve %s", self.config.url, found[0], step, path
            )
            self._wait_for(is_recent, f"serve {path}")
        return found

    def _wait_for(self, is_there: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.config.patience
        while not is_there():
            if time.monotonic() > deadline:
                raise OutOfResourcesError(
                    f"rollout: the vLLM server at {self.config.url} did not {what} within {self.config.patience:g} s; "
                    "see to that, or allow more with --rollout.max-staleness or --rollout.patience; the same command "
                    "then goes on from the newest checkpoint"
                )
            time.sleep(min(1.0, self.config.patience / 10))

    def _seen(self) -> str:
        """Return the label of the weights that the server holds now (manual: the path that it serves)."""
        if self.config.reload == "manual":
            return str(self._card().get("root", ""))
        if not self._can_label:
            return self._label
        try:
            return str(self._connection.ask("GET", "/weight_info")["weight_version"])
        except RefusedError:
            self._can_label = False
            return self._label

    def _control(self, method: str, path: str) -> None:
        try:
            self._connection.ask(method, path)
        except RefusedError as error:
            raise ConfigError(
                f"rollout: the vLLM server at {self.config.url} does not take {method} {path} ({error}): start it with "
                "VLLM_SERVER_DEV_MODE=1 in its environment, or give --rollout.reload manual"
            ) from None

    def _as_seen_there(self, folder: Path) -> str:
        folder, run = folder.resolve(), self._run.resolve()
        if not self.config.server_path:
            return str(folder)
        return f"{self.config.server_path.rstrip('/')}/{folder.relative_to(run).as_posix()}"

    # -- sampling ------------------------------------------------------------------------------------------------------

    def _sample(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Completion]:
        name = self._name = self._name or self._card()["id"]
        pool = ThreadPoolExecutor(min(self.config.connections, len(prompts)), thread_name_prefix="rollout")
        try:
            return list(pool.map(partial(self._complete, name), prompts, params))
        except BaseException:  # a server that is gone, Ctrl-C: no request goes on by itself
            self._connection.give_up()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            pool.shutdown(wait=False)

    def _card(self) -> dict[str, Any]:
        """Return what the server says about its model."""
        try:
            cards: list[dict[str, Any]] = self._connection.ask("GET", "/v1/models")["data"]
        except RefusedError as error:
            raise ConfigError(f"rollout: {self.config.url} is no vLLM server, or wants VLLM_API_KEY: {error}") from None
        wanted = [card for card in cards if not self._name or card["id"] == self._name]
        if len(wanted) != 1:
            names = ", ".join(str(card["id"]) for card in cards)
            raise ConfigError(f"rollout: {self.config.url} serves {names}; name one with --rollout.served-model")
        return wanted[0]

    def _complete(self, name: str, prompt: Sequence[int], params: SamplingParams) -> Completion:
        # Everything that vLLM would else take from the model's generation_config is said.
        body = {
            "model": name,
            "prompt": list(prompt),
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "seed": params.seed,
            "stop_token_ids": list(params.stop_ids),
            "logprobs": 0,
            "return_token_ids": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
        }
        try:
            return self._connection.ask(
                "POST", "/v1/completions", body, read=lambda reply: self._read(reply, prompt, params)
            )
        except RefusedError as error:
            raise ConfigError(
                f"rollout: the vLLM server at {self.config.url} refused a prompt of {len(prompt)} tokens with "
                f"max_tokens {params.max_tokens}: {error}"
            ) from None

    def _read(self, reply: Mapping[str, Any], prompt: Sequence[int], params: SamplingParams) -> Completion:
        """Return the completion in a reply. BrokenError for half of one, ConfigError for one of another model."""
        try:
            choice = cast(dict[str, Any], reply["choices"][0])
            ids, log_probs = list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"])
            reason, asked = choice["finish_reason"], choice["prompt_token_ids"]
        except (KeyError, IndexError, TypeError) as error:
            raise ConfigError(
                f"rollout: the reply of {self.config.url} has no {error}: it must be a vLLM that knows return_token_ids"
            ) from None
        if reason not in ("stop", "length"):  # "abort": the server threw the request out
            raise BrokenError(f"finish_reason {reason!r}")
        is_other = list(asked) != list(prompt) or any(not 0 <= i < self._vocab_size for i in ids)
        # The end of an answer is learned, so it must be among the ids.
        is_other |= reason == "stop" and bool(ids) and ids[-1] not in params.stop_ids
        if is_other or len(ids) != len(log_probs) or not 0 < len(ids) <= params.max_tokens:
            raise ConfigError(
                f"rollout: the vLLM server at {self.config.url} answered with other token ids than this model can: "
                "it serves another model or another tokenizer; serve this run's checkpoint"
            )
        return Completion(ids, [float(value) for value in log_probs], reason)


class Recomputed:
    """An `Algorithm` whose rollouts came from a server: the policy's own log-probabilities are computed here.

    `old_log_probs` are those of the weights of now; `rollout_log_probs` those that the server told.
    """

    def __init__(
        self, inner: Algorithm, server: VLLMServer, *, policy: Transformer, meter: Meter, temperature: float
    ) -> None:
        """Wrap `inner`, which keeps deciding everything else."""
        self._inner, self._server, self._policy, self._meter = inner, server, policy, meter
        self._read = log_probs_at(temperature)
        self._has_warned = False
        self.extras = (*inner.extras, "rollout_log_probs")
        self.begin, self.choose, self.state, self.load_state = inner.begin, inner.choose, inner.state, inner.load_state

    def measure(self, trajectories: Sequence[Trajectory]) -> None:
        """Add `old_log_probs`, then what `inner` measures; the server's are those of the samples."""
        for one, found in zip(trajectories, self._meter(self._policy, trajectories, self._read), strict=True):
            one.tokens["old_log_probs"] = found
        self._inner.measure(trajectories)

    def credit(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Add the advantages; return also `rollout_staleness` (steps) and `rollout_gap` (mean |log ratio|, nats)."""
        pairs = [
            abs(old - told)
            for one in trajectories
            for old, told, chosen in zip(
                one.tokens["old_log_probs"], one.sample.log_probs, one.sample.mask, strict=True
            )
            if chosen
        ]
        gap = float(torch.tensor(pairs or [0.0], dtype=torch.float64).mean())
        if gap > SUSPICIOUS_GAP and self._server.staleness == 0 and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "the server's log-probabilities differ from those computed here by %.3f nats in the mean, at equal "
                "weights: start vLLM with --logprobs-mode processed_logprobs, and with the precision of training",
                gap,
            )
        numbers = {"rollout_staleness": float(self._server.staleness), "rollout_gap": gap}
        return self._inner.credit(trajectories) | numbers


def publish(run: Path, policy: Transformer, tokenizer: Tokenizer, step: int) -> Path:
    """Return the directory below `run` to which the weights of now were written, as a checkpoint without optimizer."""
    return checkpoint.save(
        run / "published",
        step,
        model=policy,
        model_config=policy.config,
        tokenizer=tokenizer,
        optimizer_state={},
        state={},
    )
