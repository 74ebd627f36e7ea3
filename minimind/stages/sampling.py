"""What a model says while it is trained: greedy continuations of the same few held-out openings, for samples.jsonl."""

from typing import TYPE_CHECKING, Any

from minimind.inference.engine import Engine
from minimind.inference.sampling import SamplingParams

if TYPE_CHECKING:
    from minimind.batch import Example
    from minimind.data.dataset import TokenDataset
    from minimind.model.transformer import Transformer
    from minimind.tokenizer.bpe import Tokenizer

NUM_PROMPTS = 4
MAX_TOKENS = 64
OPENING_TOKENS = 8
"""How much of a document without a prompt of its own (pretraining text) is given."""


class Sampler:
    """Continues the first documents of a data set: conversations from the first answer on, texts after a few tokens."""

    def __init__(self, model: "Transformer", tokenizer: "Tokenizer", documents: "TokenDataset") -> None:
        self.model, self.tokenizer = model, tokenizer
        spread = max(1, len(documents) // NUM_PROMPTS)
        self.prompts = [opening(documents.document(i)) for i in range(0, len(documents), spread)[:NUM_PROMPTS]]

    def __call__(self, step: int) -> list[dict[str, Any]]:
        """Return one row {"prompt", "output"} for each opening."""
        del step  # the loop notes it
        engine = Engine(self.model, max_batch_size=NUM_PROMPTS, max_length=max(map(len, self.prompts)) + MAX_TOKENS)
        ends = (self.tokenizer.eos_id, self.tokenizer.pad_id)
        answers = engine.generate(self.prompts, SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, stop_ids=ends))
        return [
            {"prompt": self.tokenizer.decode(prompt), "output": self.tokenizer.decode(answer.ids)}
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]


def opening(document: "Example") -> list[int]:
    """Return the ids before the first learned token: the prompt of a conversation; of plain text, its first tokens."""
    prompt = next(i for i, weight in enumerate(document.loss_weights) if weight)
    return document.ids[: prompt if prompt > 1 else OPENING_TOKENS]
