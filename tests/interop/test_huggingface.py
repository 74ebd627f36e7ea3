"""A teacher of any architecture: what it says about packed rows is what Transformers says about each document alone."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minimind.batch import Batch, Example
from minimind.data.collate import collate
from minimind.errors import CheckpointError, ConfigError
from minimind.interop.huggingface import HuggingFaceTeacher, vocabulary

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")

VOCAB, LENGTH = 60, 24
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},  # learned positions
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},  # a body inside the body, and a projection after it
    "gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 4},  # a softcap on the logits
    "granite": {"logits_scaling": 8.0},  # a scale on them
    "phi": {"partial_rotary_factor": 0.5},  # a bias on them
    "mixtral": {"num_local_experts": 4},
    "mamba": {"state_size": 4, "time_step_rank": 4},  # no attention at all
}


def save(name: str, folder: Path) -> Path:
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(name, **SMALL, **ARCHITECTURES[name])
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # biases and norms too must matter
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def packed() -> tuple[Batch, list[list[Tensor]]]:
    """Return two packed rows and the documents of each."""
    torch.manual_seed(4)
    rows = [[torch.randint(3, VOCAB, (size,)) for size in sizes] for sizes in ((9, 3, 11), (6, 2))]
    examples = [[Example(ids.tolist(), [1.0] * len(ids)) for ids in row] for row in rows]
    return collate(examples, LENGTH, pad_id=0), rows


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_rows_are_documents_alone(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path)
    teacher = HuggingFaceTeacher(folder, torch.device("cpu"))
    assert teacher.vocab_size == VOCAB
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batch, rows = packed()
    taught = teacher(batch)
    for row, hidden in zip(rows, taught.hidden, strict=True):
        start = 0
        for ids in row:
            end = start + len(ids) - 1
            with torch.inference_mode():
                want = model(input_ids=ids[None, :-1]).logits[0]
            assert want.std() > 0.05  # it says something
            torch.testing.assert_close(taught.logits_of(hidden[start:end]), want, rtol=1e-5, atol=1e-5)
            start = end
    with torch.inference_mode():  # the model is whole again after being asked for logits alone
        torch.testing.assert_close(teacher.model(batch.input_ids).logits, model(batch.input_ids).logits)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher.model.training


def test_nothing_but_padding_is_answered_too(tmp_path: Path) -> None:
    teacher = HuggingFaceTeacher(save("llama", tmp_path), torch.device("cpu"))
    taught = teacher(collate([[]], LENGTH, pad_id=0))
    assert taught.hidden.shape == (1, LENGTH, 32)
    assert taught.logits_of(taught.hidden[0]).shape == (LENGTH, VOCAB)


def test_one_long_document_and_many_short_ones_run_in_groups_of_the_batchs_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = HuggingFaceTeacher(save("llama", tmp_path), torch.device("cpu"))
    short = [Example([5, 6], [1.0, 1.0])] * LENGTH
    batch = collate([[Example([3] * (LENGTH + 1), [1.0] * (LENGTH + 1))], short], LENGTH, pad_id=0)
    seen: list[tuple[int, ...]] = []
    hidden_of = teacher._hidden

    def watched(input_ids: Tensor, mask: Tensor) -> Tensor:
        seen.append(tuple(input_ids.shape))
        return hidden_of(input_ids, mask)

    monkeypatch.setattr(teacher, "_hidden", watched)
    teacher(batch)
    assert seen == [(2, LENGTH), (LENGTH - 1, 1)]


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(CheckpointError, match="cannot read it as a causal model"):
        HuggingFaceTeacher(tmp_path, torch.device("cpu"))
    with pytest.raises(CheckpointError, match="cannot read its tokenizer"):
        vocabulary(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'minimind\[hf\]'"):
        HuggingFaceTeacher(tmp_path, torch.device("cpu"))


def test_a_model_whose_logits_need_more_than_its_last_states_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save("llama", tmp_path)
    forward = transformers.LlamaForCausalLM.forward

    def with_memory(self: Any, input_ids: Tensor, **options: Any) -> Any:
        output = forward(self, input_ids=input_ids, **options)
        output.logits = output.logits + self.model.embed_tokens(input_ids).sum(-1, keepdim=True)
        return output

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", with_memory)
    with pytest.raises(CheckpointError, match="more than a function of the last hidden states"):
        HuggingFaceTeacher(folder, torch.device("cpu"))
