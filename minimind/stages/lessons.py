"""What a student's lessons are besides the loss: rows that its teacher can read, and how far it still is from it."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch

from minimind.batch import Batch
from minimind.data.loader import Loader
from minimind.data.packing import PackedRows
from minimind.errors import CheckpointError, ConfigError, DataError
from minimind.model.transformer import Transformer
from minimind.objectives.distillation import Mixture, distillation
from minimind.runtime import distributed
from minimind.stages.teacher import Teacher


class TaughtLoader(Loader):
    """The loader of a student: its rows are not too long for the teacher, and a resumed run must find the same one."""

    def __init__(self, rows: PackedRows, *, teacher: Teacher, **options: Any) -> None:
        super().__init__(rows, **options)
        self.teacher, most = teacher, teacher.max_length
        if most is not None and rows.row_length > most:
            raise ConfigError(
                f"{teacher.directory}: this teacher reads {most} tokens at once and rows have {rows.row_length}; "
                f"give --data.row-length {most} or less"
            )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return super().state() | {"teacher_sha256": self.teacher.sha256}

    def check_state(self, saved: dict[str, Any]) -> None:
        """Raise CheckpointError for another teacher, and what `Loader` raises."""
        check_same_teacher(self.teacher, saved)
        super().check_state(saved)


def check_same_teacher(teacher: Teacher, saved: dict[str, Any]) -> None:
    """Raise CheckpointError unless `saved` names the weights of `teacher`."""
    if saved.get("teacher_sha256") != teacher.sha256:
        raise CheckpointError(
            f"{teacher.directory}: not the teacher that this run was started with (weights {teacher.sha256[:12]}, then "
            f"{str(saved.get('teacher_sha256'))[:12]}); give that one again, or start over with --fresh"
        )


def distance(
    model: Transformer, teacher: Teacher, batches: Iterable[Batch], *, autocast: AbstractContextManager[object]
) -> dict[str, float]:
    """Return {val_kl: mean KL(teacher || model) in nats, val_teacher_agreement} over the learned tokens, by weight.

    Each process gives its own share of the batches. The model is put into evaluation mode and back. Raises DataError
    when no token is learned.
    """
    device, is_training = next(model.parameters()).device, model.training
    sums = torch.zeros(3, dtype=torch.float64)
    model.eval()
    try:
        with torch.inference_mode(), autocast:
            for batch in batches:
                batch = batch.to(device)
                output = model(batch.input_ids, positions=batch.positions, documents=batch.documents)
                found = distillation(output, batch, teacher=teacher.ask, mixture=Mixture(1.0, 0.0, "forward"))[1]
                values = found["kl"], found["teacher_agreement"], batch.loss_weights.sum()
                sums += torch.stack([value.to("cpu", torch.float64) for value in values])
    finally:
        model.train(is_training)
    kl, agreement, weight = distributed.all_reduce_sum(sums).tolist()
    if not weight:
        raise DataError("validation: no token is learned in these data; give other --data.validation files")
    return {"val_kl": kl / weight, "val_teacher_agreement": agreement / weight}
