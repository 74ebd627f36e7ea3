"""Greedy answers and log-probabilities equal those of Transformers' `generate`, from the directory we write."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minimind.inference.engine import Engine
from minimind.inference.sampling import SamplingParams
from minimind.model.config import PRESETS, ModelConfig
from minimind.model.transformer import Transformer

transformers = pytest.importorskip("transformers", reason="parity needs the extra 'hf'")

TINY = {
    "vocab_size": 120,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "initializer_range": 0.2,
}


def pair(config: ModelConfig, directory: Path):
    torch.manual_seed(1)
    ours = Transformer(config).eval()
    state = {name: tensor.contiguous() for name, tensor in ours.state_dict_for_disk().items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return ours, theirs


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 120, (n,), generator=generator).tolist() for n in (1, 4, 9, 9, 17, 30)]


@pytest.mark.parametrize("preset", ["small", "v3", "moe", "v3-moe"])
def test_greedy_answers_and_log_probs_equal_generate(preset: str, tmp_path: Path) -> None:
    ours, theirs = pair(replace(PRESETS[preset], **TINY), tmp_path)
    params = SamplingParams(temperature=0, max_tokens=20, stop_ids=(2, 50, 51, 52, 53), logprobs=True)
    answers = Engine(ours, max_batch_size=4, max_length=64).generate(prompts(), params)
    for prompt, answer in zip(prompts(), answers, strict=True):
        output = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=list(params.stop_ids),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert answer.ids == output.sequences[0, len(prompt) :].tolist()
        expected = [float(s[0].log_softmax(-1)[i]) for s, i in zip(output.scores, answer.ids, strict=True)]
        assert answer.log_probs == pytest.approx(expected, abs=1e-4)
    assert len({tuple(answer.ids) for answer in answers}) > 3


def test_repetition_penalty_equals_generate(tmp_path: Path) -> None:
    ours, theirs = pair(replace(PRESETS["small"], **TINY), tmp_path)
    params = SamplingParams(temperature=0, max_tokens=24, repetition_penalty=1.4)
    answers = Engine(ours, max_batch_size=3, max_length=64).generate(prompts(), params)
    for prompt, answer in zip(prompts(), answers, strict=True):
        output = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=24,
            repetition_penalty=1.4,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert answer.ids == output[0, len(prompt) :].tolist()
