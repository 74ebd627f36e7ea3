"""The loss of a reward model: the chosen answer is worth more, as Bradley and Terry (1952) model it.

    loss = -log sigmoid(r(chosen) - r(rejected) - margin) + centre * (r(chosen) + r(rejected))^2

r is the value at the last token of prompt and answer. Rewards are compared only, so that any constant could be added;
`centre` (arXiv 2312.09244) keeps them near 0. The sum is over pairs; the loop divides by their number.
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from minimind.batch import PAD_DOCUMENT, Batch, Output
from minimind.objectives.preference import DOCUMENTS, Sides, logistic, summed
from minimind.objectives.sequences import sum_by_document


def bradley_terry(
    output: Output, batch: Batch, *, margin: float = 0.0, centre: float = 0.0
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Return the sum of the loss over the pairs, and the metrics of `preference.summed` on the rewards."""
    rewards = Sides.of(last_values(output, batch))
    losses = logistic(rewards.margin - margin) + centre * (rewards.chosen + rewards.rejected) ** 2
    return summed(batch, losses, rewards)


def last_values(output: Output, batch: Batch) -> Float[Tensor, "B M"]:
    """Return the value at the last input token of each document; 0 where a row has no such document.

    A rendered conversation ends with a line break, which is a label only: its last input token is the end token.
    """
    assert output.values is not None, "a reward model has values: model/heads.py"
    is_last = batch.documents != pad(batch.documents[:, 1:], (0, 1), value=PAD_DOCUMENT - 1)
    return sum_by_document(output.values * is_last, batch.documents, batch.extras[DOCUMENTS].shape[1])
