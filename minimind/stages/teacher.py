"""The teacher of `minimind distill`: any model that a stage can start from, or any that Transformers knows. Frozen.

It answers batches (`ask`); one of ours can also write (`stages/answers.py`). A distribution is over ids, so teacher and
student must mean the same token by each: `check_vocabulary`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F

from minimind.batch import Batch
from minimind.checkpoint import load, resolve
from minimind.checkpoint.directory import is_ours, read_config
from minimind.errors import CheckpointError
from minimind.model.transformer import Transformer
from minimind.objectives.distillation import Taught
from minimind.runtime.integrity import sha256_of_tensors
from minimind.runtime.log import get_logger
from minimind.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class Teacher:
    """A model in evaluation mode whose weights nothing changes."""

    directory: Path
    """What was read: a checkpoint, or a Transformers directory."""
    ask: Callable[[Batch], Taught]
    vocab_size: int
    """Number of its logits, padding of the vocabulary included."""
    max_length: int | None
    """Tokens of one document at most; None for no limit."""
    sha256: str
    """Of its weights."""
    model: Transformer | None
    """None for a model that only Transformers runs."""


def load_teacher(path: Path, device: torch.device) -> Teacher:
    """Return the teacher in `path`: a run, a checkpoint or a Transformers directory of any architecture.

    Raises CheckpointError when nothing there can be read, ConfigError where it takes Transformers and that is missing.
    """
    directory = resolve(path)
    if is_ours(directory) or _is_known(directory):
        model = load(directory, device=device)[0].requires_grad_(False)
        config, weights = model.config, model.state_dict_for_disk()
        sizes, description = (config.vocab_size, config.max_position_embeddings), config.describe()

        def ask(batch: Batch) -> Taught:
            output = model(batch.input_ids, positions=batch.positions, documents=batch.documents)
            return Taught(output.hidden, partial(F.linear, weight=output.head))

        teacher = Teacher(directory, ask, *sizes, sha256_of_tensors(weights), model)
    else:
        from minimind.interop.huggingface import HuggingFaceTeacher

        found = HuggingFaceTeacher(directory, device)
        sha256, description = sha256_of_tensors(found.model.state_dict()), found.description
        teacher = Teacher(directory, found, found.vocab_size, found.max_length, sha256, None)
    get_logger("teacher").info("teacher %s: %s, weights %s", directory, description, teacher.sha256[:12])
    return teacher


def _is_known(directory: Path) -> bool:
    try:
        read_config(directory)
    except CheckpointError:
        return False
    return True


def check_vocabulary(teacher: Teacher, student: Transformer, tokenizer: Tokenizer, name: str) -> None:
    """Raise CheckpointError unless every id is the same token for the teacher and the student called `name`.

    One of our checkpoints must have the same tokenizer, byte for byte; a Transformers directory, whose tokenizer may
    have been written anew, the same tokens.
    """
    theirs = _tokens(teacher)
    ours = [tokenizer.id_to_token(index) for index in range(tokenizer.vocab_size)]
    pairs = enumerate(zip_longest(theirs, ours))
    first = next((f"id {index} is {a!r} for it and {b!r} here" for index, (a, b) in pairs if a != b), "")
    if is_ours(teacher.directory) and not first and Tokenizer.load(teacher.directory).sha256 != tokenizer.sha256:
        first = "the tokens are the same, but not how text is cut into them"
    if not first and teacher.vocab_size < student.config.vocab_size:
        first = f"it has {teacher.vocab_size} logits, the student {student.config.vocab_size}"
    if first:
        raise CheckpointError(
            f"{teacher.directory}: this teacher has another vocabulary than the student ({name}): {first}. What it "
            "says about ids cannot be learned; what it says in words can: --method black-box"
        )


def _tokens(teacher: Teacher) -> list[str]:
    if teacher.model is not None:
        tokenizer = Tokenizer.load(teacher.directory)
        return [tokenizer.id_to_token(index) for index in range(tokenizer.vocab_size)]
    from minimind.interop.huggingface import vocabulary

    return vocabulary(teacher.directory)
