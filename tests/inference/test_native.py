"""The native step against its definition, the Transformer: same logits, same tokens, and no surprise without it."""

import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.inference import native, runner
from minimind.inference.engine import Engine
from minimind.inference.native import SOURCE, NativeStep
from minimind.inference.sampling import SamplingParams
from minimind.model.cache import KVCache
from minimind.model.config import ModelConfig
from minimind.model.transformer import Transformer
from minimind.native import build

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")

Change = Callable[[Transformer], object]

GREEDY = SamplingParams(temperature=0, max_tokens=24)
YARN: dict[str, Any] = {"rope_scaling": "yarn", "yarn_factor": 4.0, "original_max_position_embeddings": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "one key head": {"num_key_value_heads": 1},
    "a key head for each query head": {"num_key_value_heads": 4},
    "untied head": {"tie_word_embeddings": False},
    "qwen3": {"qk_norm": True, "head_dim": 16, "tie_word_embeddings": False},
    "yarn": YARN,
    "qwen3 with yarn": {"qk_norm": True, **YARN},
    "widths that fill no panel": {"hidden_size": 44, "head_dim": 22, "intermediate_size": 70, "vocab_size": 33},
    "six heads share one": {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 48},
}


def tiny(seed: int = 0, **fields: Any) -> Transformer:
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 97,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,  # far from uniform, so that greedy choices are not ties
        **fields,
    }
    model = Transformer(ModelConfig(**shape)).eval()  # pyright: ignore[reportArgumentType]
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(weight, 0.5, 1.5)
    return model


def ids_of(rows: int, length: int, model: Transformer, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)


def decoded(
    model: Transformer, ids: Tensor, dtype: torch.dtype = torch.float32, cache: torch.dtype = torch.float32
) -> Tensor:
    """Return the logits (B, T, V) of the native step, token after token from an empty cache."""
    with torch.inference_mode():
        step = NativeStep(model, KVCache(model.config, len(ids), ids.shape[1], dtype=cache), dtype)
        assert step.prepare()
        rows = [step(ids[:, t].numpy().copy(), np.full(len(ids), t)).clone() for t in range(ids.shape[1])]
        return torch.stack(rows, dim=1)


def forward(model: Transformer, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_those_of_one_forward_over_the_whole_text(shape: str) -> None:
    model = tiny(**SHAPES[shape])
    ids = ids_of(3, 70, model)
    assert (decoded(model, ids) - forward(model, ids)).abs().max() < 1e-4


@pytest.mark.parametrize("shape", ["llama", "qwen3 with yarn"])
def test_greedy_answers_equal_those_of_pytorch(shape: str) -> None:
    model = tiny(**SHAPES[shape])
    prompts = [ids_of(1, n, model, seed=n)[0].tolist() for n in (1, 30, 2, 17, 9, 9, 25, 3, 12)]
    answers: list[list[list[int]]] = []
    for is_native in (True, False):
        engine = Engine(model, max_batch_size=4, max_length=64, native=is_native)
        answers.append([answer.ids for answer in engine.generate(prompts, GREEDY)])
        assert engine._runner._is_native_ready is is_native
    assert answers[0] == answers[1]
    assert len({tuple(ids) for ids in answers[0]}) > 5


@pytest.mark.parametrize("rows", [2, 7, 8, 9, 21])
def test_a_row_has_the_same_bits_alone_and_in_any_company(rows: int) -> None:
    model = tiny()
    cache, alone = KVCache(model.config, rows, 64), KVCache(model.config, 1, 64)
    random = torch.Generator().manual_seed(rows)
    with torch.inference_mode():
        together, single = NativeStep(model, cache, torch.float32), NativeStep(model, alone, torch.float32)
        assert together.prepare()
        assert single.prepare()
        positions = np.zeros(rows, dtype=np.int64)
        for _ in range(30):
            tokens = torch.randint(0, 97, (rows,), generator=random).numpy()
            is_idle = (torch.rand(rows, generator=random) < 0.3).numpy()  # so lengths come apart
            logits = together(tokens, np.where(is_idle, -1, positions)).clone()
            if not is_idle[rows - 1]:
                last = slice(rows - 1, rows)
                assert torch.equal(logits[last], single(tokens[last].copy(), positions[last].copy()))
            positions += ~is_idle
        assert positions.max() > positions.min()
        assert torch.equal(cache.keys[:, -1, :, :64], alone.keys[:, 0, :, :64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    model = tiny(num_key_value_heads=4)
    ids = ids_of(5, 40, model)
    before = torch.get_num_threads()
    results: list[Tensor] = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(decoded(model, ids, dtype))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts threads as Linux tells them")
def test_threads_are_those_of_pytorch() -> None:
    # Others would fight with PyTorch's for the cores, which wait for their next work awake.
    def number() -> int:
        return int(re.findall(r"Threads:\s+(\d+)", Path("/proc/self/status").read_text())[0])

    model = tiny()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        torch.ones(1 << 20).sum()  # starts them
        num_threads = number()
        for _ in range(2):
            engine = Engine(model, max_batch_size=2, max_length=64)
            engine.generate([[5, 6], [7]], GREEDY)
            assert engine._runner._is_native_ready
            assert number() == num_threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["llama", "qwen3", "widths that fill no panel"])
def test_bfloat16_is_as_exact_as_autocast(shape: str, cache: torch.dtype) -> None:
    # Both round weights and inputs to 8 bits of mantissa; autocast rounds the results of products as well. So the
    # error has no reason to be larger than autocast's, but for chance, which the quarter is for.
    model = tiny(**SHAPES[shape])
    ids = ids_of(8, 60, model)
    exact = forward(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = (forward(model, ids).float() - exact).square().mean().sqrt()
    logits = decoded(model, ids, torch.bfloat16, cache)
    ours = (logits - exact).square().mean().sqrt()
    assert 1e-4 < ours < 1.25 * theirs
    wide, narrow = (F.cross_entropy(x.flatten(0, 1), exact.argmax(-1).flatten()) for x in (exact, logits))
    assert abs(narrow - wide) < 0.01 * wide


def in_whole_numbers(x: Tensor) -> Tensor:
    """The last axis rounded to whole multiples of a 127th of its largest."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (x / scale).round() * scale


class InWholeNumbers(nn.Module):
    """What int8 means: a product of rounded inputs with rounded weights."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(in_whole_numbers(x), in_whole_numbers(self.weight))


@pytest.mark.parametrize("shape", ["llama", "qwen3", "widths that fill no panel"])
def test_int8_equals_its_definition(shape: str) -> None:
    model = tiny(**SHAPES[shape])
    ids = ids_of(8, 40, model)
    exact = forward(model, ids)
    ours = decoded(model, ids, torch.int8)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, InWholeNumbers(module.weight.detach()))
    with torch.inference_mode():
        defined = InWholeNumbers(model.head)(model(ids).hidden)
    error = (defined - exact).square().mean().sqrt()
    assert 0.002 < error / exact.std() < 0.1
    # Sums in another order may round an input to the neighbouring number now and then; nothing else may differ.
    assert (ours - defined).square().mean().sqrt() < 0.2 * error


def test_int8_in_the_engine_keeps_the_cache_exact_and_speaks_up_where_it_cannot(said: list[str]) -> None:
    model = tiny()
    engine = Engine(model, max_batch_size=3, max_length=64, dtype=torch.int8)
    answers = engine.generate([[5, 6, 7], [8]], GREEDY)
    assert engine._runner._is_native_ready
    assert engine.dtype == torch.float32
    assert engine.generate([[8]], GREEDY)[0] == answers[1]
    assert said == []
    experts = Engine(tiny(use_moe=True), max_length=64, dtype=torch.int8)
    for _ in range(2):
        experts.generate([[5, 6, 7]], GREEDY)
    assert len(said) == 1
    assert "int8" in said[0]


def test_weights_that_are_bfloat16_already_lose_nothing() -> None:
    model = tiny().to(torch.bfloat16)
    wide = tiny()
    wide.load_state_dict(model.state_dict())
    ids = ids_of(4, 30, model)
    assert torch.equal(decoded(model, ids, torch.bfloat16), decoded(wide, ids, torch.bfloat16))


def by_optimizer(model: Transformer) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)  # raises no version counter
    model(ids_of(2, 9, model)).logits.logsumexp(-1).mean().backward()
    optimizer.step()


def by_data(model: Transformer) -> None:
    dict(model.named_parameters())["model.layers.1.mlp.down_proj.weight"].data[3] *= -8


def by_new_memory(model: Transformer) -> None:
    for weight in model.parameters():
        weight.data = weight.data.flip(0).clone()


def by_loading(model: Transformer) -> None:
    model.load_state_dict(tiny(seed=9).state_dict())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("change", [by_optimizer, by_data, by_new_memory, by_loading])
def test_weights_changed_between_two_calls_are_seen(change: Change, dtype: torch.dtype | None) -> None:
    model = tiny()
    prompts = ids_of(6, 9, model).tolist()
    params = SamplingParams(temperature=0, max_tokens=16, logprobs=True)
    engine = Engine(model, max_batch_size=6, max_length=64, dtype=dtype)
    before = engine.generate(prompts, params)
    change(model)
    after = engine.generate(prompts, params)
    assert engine._runner._is_native_ready
    fresh = Engine(model, max_batch_size=6, max_length=64, dtype=dtype).generate(prompts, params)
    assert after == fresh
    assert after != before
    if dtype is None:
        plain = Engine(model, max_batch_size=6, max_length=64, native=False).generate(prompts, params)
        assert [answer.ids for answer in after] == [answer.ids for answer in plain]


def test_unchanged_weights_are_packed_once() -> None:
    model = tiny()
    step = NativeStep(model, KVCache(model.config, 1, 8), torch.float32)
    assert step.prepare()
    packed = step._packed
    assert step.prepare()
    assert step._packed is packed


def with_another_module(model: Transformer) -> None:
    mlp = model.get_submodule("model.layers.0.mlp")
    mlp.up_proj = nn.Sequential(mlp.get_submodule("up_proj"))


def with_a_hook(model: Transformer) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, output: None)


@pytest.mark.parametrize("change", [with_another_module, with_a_hook, lambda model: model.half()])
def test_a_model_that_is_not_plain_stays_in_pytorch(change: Change) -> None:
    model = tiny()
    step = NativeStep(model, KVCache(model.config, 1, 8), torch.float32)
    assert step.prepare()
    change(model)
    assert not step.prepare()


def test_a_mixture_of_experts_stays_in_pytorch() -> None:
    engine = Engine(tiny(use_moe=True), max_length=64)
    engine.generate([[5, 6]], GREEDY)
    assert engine._runner._is_native_ready is False


# -- building ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def unbuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and a process that has not tried yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.library.cache_clear()
    native._library.cache_clear()
    yield tmp_path / "cache" / "minimind"
    build.library.cache_clear()
    native._library.cache_clear()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What build and runner say on the log."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    for log in (build._log, runner._log):
        monkeypatch.setattr(log, "handlers", [Keep()])
    return lines


def broken(folder: Path) -> Path:
    compiler = folder / "broken-c++"
    compiler.write_text("#!/bin/sh\necho 'native.cpp:1: error: this machine is odd' >&2\nexit 3\n")
    compiler.chmod(0o755)
    return compiler


@pytest.mark.parametrize(("case", "message"), [("none", "no C\\+\\+ compiler"), ("broken", "exit code 3.*is odd")])
def test_without_a_working_compiler_pytorch_decodes_and_one_line_says_why(
    case: str, message: str, unbuilt: Path, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    monkeypatch.setenv("CXX", str(broken(tmp_path)) if case == "broken" else "no-such-compiler")
    engine = Engine(model, max_length=64)
    for _ in range(2):
        answers = engine.generate([[5, 6], [7]], GREEDY)
        assert answers == Engine(model, max_length=64, native=False).generate([[5, 6], [7]], GREEDY)
        assert engine._runner._is_native_ready is False
    assert len(said) == 1
    assert re.search(message, said[0])
    assert not unbuilt.exists() or not list(unbuilt.iterdir())


def test_a_cache_folder_that_cannot_be_made_is_no_error(
    unbuilt: Path, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert build.library(SOURCE) is None
    assert len(said) == 1


SMALL = 'extern "C" int answer() { return %d; }\n'


def test_processes_that_build_at_once_all_get_a_whole_library(tmp_path: Path) -> None:
    source, folder = tmp_path / "small.cpp", tmp_path / "folder"
    source.write_text(SMALL % 42)
    code = (
        "import ctypes, sys; from pathlib import Path; from minimind.native.build import built;"
        "print(ctypes.CDLL(str(built(Path(sys.argv[1]), Path(sys.argv[2])))).answer())"
    )
    command = [sys.executable, "-c", code, str(source), str(folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate()[0].split() for process in processes] == [["42"]] * 4
    assert len(list(folder.iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["x86-64", "x86-64-v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_narrower_machines_compute_the_same(
    machine: str, dtype: torch.dtype, unbuilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec c++ "$@" -march={machine}\n')
    compiler.chmod(0o755)
    if subprocess.run([compiler, "-E", "-x", "c++", "/dev/null"], capture_output=True).returncode:
        pytest.skip(f"this compiler makes nothing for {machine}")
    model = tiny(qk_norm=True)
    ids = ids_of(9, 40, model)
    wide = decoded(model, ids, dtype)
    monkeypatch.setenv("CXX", str(compiler))
    native._library.cache_clear()
    build.library.cache_clear()
    narrow = decoded(model, ids, dtype)
    library = native._library()
    assert library is not None
    assert library.panel_width() == {"x86-64": 8, "x86-64-v3": 16}[machine]
    # The order of sums differs, so now and then a narrower input is rounded to its other neighbour.
    worst, usual = (narrow - wide).abs().max(), (narrow - wide).square().mean().sqrt()
    assert worst < 1e-4 if dtype == torch.float32 else usual < 0.005 * wide.std()
