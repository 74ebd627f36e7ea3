"""A tool agent, learning from rewards: it calls tools, reads their replies and answers, in up to three turns.

    loss as in `stages/grpo.py`, over the tokens of all turns that the policy chose, the end of each turn included;
    what a tool replied, and what the template writes between two turns, weighs 0

Which tools there are and how their calls are run is known to `rl/tools.py`, how an episode goes on to `rl/episodes.py`.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from minimind.config import parse
from minimind.stages import grpo

if TYPE_CHECKING:
    from minimind.training.loop import FitResult


@dataclass(frozen=True)
class Config(grpo.Config):
    """Learn to use tools from rewards: --init-from RUN --data AGENT_PROMPTS [--tools FILE.py]"""

    out: Path = Path("runs/agent")
    """Directory of the run: configuration, metrics, samples, checkpoints."""
    rewards: tuple[str, ...] = ("contains_gt", "valid_calls=0.2")
    """What is rewarded, NAME or NAME=WEIGHT each: contains_gt (the final answer holds the values of `gt`), grade,
    valid_calls, format, length, repetition, model:PATH, transformers:PATH, or FILE.py:FUNCTION of your own."""
    tools: Path | None = None
    """Python file whose functions may be called besides the world's tools; they run in a sandboxed process."""
    tool_seconds: float = 5.0
    """Seconds that a call of your own tools may take."""
    tool_memory_bytes: int = 2 << 30
    """Memory that the process of your own tools may have."""
    max_turns: int = 3
    """Turns of the model; calls in the last one are not run."""
    max_tokens: int = 256
    """The most tokens of an answer, all turns of the model together."""
    observation_tokens: int = 256
    """The most tokens of all replies of tools to one prompt; an answer that would get more is cut off."""

    def problems(self) -> list[str]:
        """Return what is impossible in these values, one sentence each."""
        found = super().problems()
        names = ("max_turns", "observation_tokens", "tool_memory_bytes")
        found += [f"{name} = {getattr(self, name)}: at least 1" for name in names if getattr(self, name) < 1]
        if not self.tool_seconds > 0:
            found.append(f"tool_seconds = {self.tool_seconds}: must be above 0")
        return found


def run(config: Config) -> "FitResult":
    """Train as `config` says (or go on with the run in `config.out`) and return what came of it."""
    from minimind.rl.agent import AgentPlayer
    from minimind.rl.sandbox import Limits
    from minimind.rl.tools import Toolbox

    limits = Limits(memory_bytes=config.tool_memory_bytes)
    with closing(Toolbox(config.tools, seconds=config.tool_seconds, limits=limits)) as tools:
        budget = {"max_turns": config.max_turns, "observation_tokens": config.observation_tokens}
        return grpo.run(
            config,
            make_player=partial(AgentPlayer, tools=tools, **budget),
            tools=tools.own,
            observation_tokens=config.observation_tokens,
        )


def main(argv: Sequence[str]) -> None:
    """`minimind agent`."""
    run(parse(Config, argv, command="agent"))
