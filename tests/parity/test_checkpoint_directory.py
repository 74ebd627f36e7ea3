"""A checkpoint directory is a Transformers directory as it stands: model, tokenizer and chat template."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training.tiny_run import DENSE, MOE, tiny_tokenizer

from minimind import checkpoint
from minimind.model.config import ModelConfig
from minimind.model.transformer import Transformer

transformers = pytest.importorskip("transformers")

CASES = {
    "llama": DENSE,
    "llama-untied": replace(DENSE, tie_word_embeddings=False),
    "qwen3": replace(DENSE, qk_norm=True),
    "granitemoeshared": MOE,
    "mixtral": replace(MOE, n_shared_experts=0),
    "qwen3_moe": replace(MOE, n_shared_experts=0, qk_norm=True),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_loads_in_transformers_as_it_is(case: str, tmp_path: Path) -> None:
    config: ModelConfig = CASES[case]
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = Transformer(config).eval()
    moments = {"adamw.exp_avg/x": torch.ones(2)}
    path = checkpoint.save(
        tmp_path, 3, model=model, model_config=config, tokenizer=tokenizer, optimizer_state=moments, state={}
    )
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.model_type == case.partition("-untied")[0]
    ids = torch.randint(20, config.vocab_size, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs.eval()(ids).logits, rtol=0, atol=1e-5)
    auto = transformers.AutoTokenizer.from_pretrained(path)
    text = "The red ball 是红色的球\n"
    assert auto.encode(text) == tokenizer.encode(text)
    assert auto.decode(auto.encode(text)) == text
    assert "<|im_start|>user\nhi<|im_end|>" in auto.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    assert checkpoint.verify(path) == []  # reading it changed nothing
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")  # and back: what Transformers writes, in shards
    auto.save_pretrained(tmp_path / "theirs")
    again, _ = checkpoint.load(tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
