"""How a model says which files its weights are: what the loop saves and resumes, whatever the model is made of."""

from torch import Tensor, nn

from minimind.model import disk


class WeightsOnDisk(nn.Module):
    """A module that the loop can train and a checkpoint can hold: here in one file, names as in memory."""

    rates: dict[str, float] = {}  # noqa: RUF012 - replaced as a whole, never changed
    """Prefix of parameter names -> what the optimizer's rates are multiplied with for them; 1 for all others."""

    def state_dict_for_disk(self) -> dict[str, Tensor]:
        """Return the weights under the names of the file."""
        return dict(self.state_dict())

    def load_disk_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load weights named as on disk, all of them and nothing else. CheckpointError naming every difference."""
        disk.check(state, self.state_dict_for_disk())
        self.load_state_dict(state)

    def files_for_disk(self) -> dict[str, dict[str, Tensor]]:
        """Return file name -> tensor name -> tensor: every weight that training changes, float32, on any device."""
        return {disk.MODEL: self.state_dict_for_disk()}

    def load_files(self, files: dict[str, dict[str, Tensor]]) -> None:
        """Take over what `files_for_disk` returned. Raises CheckpointError, naming the difference, for others."""
        disk.check_files(files, self.files_for_disk())
        self.load_disk_state_dict(files[disk.MODEL])

    def texts_for_disk(self) -> dict[str, str]:
        """Return file name -> content of the JSON files that belong to the weights; config.json may be among them."""
        return {}
