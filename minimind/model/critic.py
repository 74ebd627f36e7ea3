"""Actor and critic in one module, so that one loop trains both: the policy that writes, the critic that values states.

The critic is a model of its own (a Transformer with a scalar head, `heads.py`), since what makes a good next token and
what a state is worth pull shared layers apart. The checkpoint is the policy's, with the critic's weights beside it.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from minimind.batch import Output
from minimind.model import disk
from minimind.model.heads import ScalarModel
from minimind.model.transformer import Transformer
from minimind.model.weights import WeightsOnDisk

CRITIC = "critic.safetensors"
"""The file of the critic's weights, named as those of a reward model."""


class ActorCritic(WeightsOnDisk):
    """`policy` and `critic`, run on the same tokens; the critic learns at `critic_rate` times the policy's rate."""

    def __init__(self, policy: Transformer, critic: ScalarModel, *, critic_rate: float = 1.0) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic
        self.rates = {"critic.": critic_rate}

    def forward(self, *arguments: Any, **options: Any) -> Output:
        """Return the policy's output with the critic's `values` (B, T): of the state after each token was read."""
        output, valued = self.policy(*arguments, **options), self.critic(*arguments, **options)
        return replace(output, values=valued.values, aux_loss=output.aux_loss + valued.aux_loss)

    def state_dict_for_disk(self) -> dict[str, Tensor]:
        """Return the policy's weights under the names of `model.safetensors`."""
        return self.policy.state_dict_for_disk()

    def files_for_disk(self) -> dict[str, dict[str, Tensor]]:
        """Return both files."""
        return {disk.MODEL: self.policy.state_dict_for_disk(), CRITIC: self.critic.state_dict_for_disk()}

    def load_files(self, files: dict[str, dict[str, Tensor]]) -> None:
        """Take over what `files_for_disk` returned. Raises CheckpointError, naming the difference, for others."""
        disk.check_files(files, self.files_for_disk())
        self.policy.load_disk_state_dict(files[disk.MODEL])
        self.critic.load_disk_state_dict(files[CRITIC])
