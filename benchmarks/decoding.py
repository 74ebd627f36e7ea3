"""How fast tokens come out: greedy decoding, one stream and many, ours beside Transformers and llama.cpp.

    python benchmarks/decoding.py [--threads 2] [--rounds 5] [--streams 1 8 32] [--only NAME ...]

The small preset (25.8M: 512 x 8, vocabulary 6400) with random weights, written once as a Transformers directory that
all load (for llama.cpp as GGUF files of the same weights: f32, f16, q8_0). One stream: 32 random tokens in, 256 out;
8 and 32 streams: 32 in and 128 out each, all at once. No token ends an answer. The time is that of the whole call,
prompt included; tokens per second count the tokens that came out, of all streams. Ours is `Engine.generate` as it is.

The limit of one stream is the bandwidth at which the weights can be read (`limits.py`, the block nearest to their size)
over their bytes, for each precision of weights by itself.

Transformers' "compiled" is its static cache with torch.compile of the step. llama.cpp is compiled from source for the
machine on first use (`apt-get install cmake g++`, some minutes); `--only minimind transformers` leaves it out.
"""

import json
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import contest
from limits import LIMITS

PROMPT_TOKENS = 32
NEW_TOKENS = {1: 256}
"""Tokens out by number of streams; else `NEW_TOKENS_OF_MANY`."""
NEW_TOKENS_OF_MANY = 128
WEIGHT_BYTES = {"fp32": 4.0, "f32": 4.0, "bf16": 2.0, "f16": 2.0, "int8": 1.0, "q8_0": 34 / 32}
COMPARED_TOKENS = 8
"""Tokens at the beginning of each answer that must be the same for all float32 contenders."""
NEAREST_BLOCK = {4.0: 104, 2.0: 52}


def ours(task: contest.Task, *, dtype: str) -> contest.Round:
    """Return a round of our engine with weights of `dtype`."""
    import torch
    from safetensors.torch import load_file

    from minimind.inference.engine import Engine
    from minimind.inference.sampling import SamplingParams
    from minimind.model.config import ModelConfig
    from minimind.model.transformer import Transformer

    folder, new_tokens = Path(task["folder"]), task["new_tokens"]
    model = Transformer(ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))).eval()
    model.load_disk_state_dict(load_file(folder / "model.safetensors"))
    rows, length = len(task["prompts"]), PROMPT_TOKENS + new_tokens
    engine = Engine(model, max_batch_size=rows, max_length=length, dtype=getattr(torch, dtype))
    params = SamplingParams(temperature=0, max_tokens=new_tokens)

    def generate() -> list[list[int]]:
        return [answer.ids for answer in engine.generate(task["prompts"], params)]

    return _round(generate)


def transformers(task: contest.Task, *, dtype: str, is_compiled: bool = False) -> contest.Round:
    """Return a round of Transformers' `generate`."""
    import torch
    from transformers import AutoModelForCausalLM, CompileConfig

    model: Any = AutoModelForCausalLM.from_pretrained(task["folder"], dtype=getattr(torch, dtype)).eval()
    prompts, new_tokens = torch.tensor(task["prompts"]), task["new_tokens"]
    model.generation_config.eos_token_id = None
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    if is_compiled:
        how |= {"cache_implementation": "static", "compile_config": CompileConfig(fullgraph=False, mode="default")}
        how["compile_config"]._compile_all_devices = True

    def generate() -> list[list[int]]:
        with torch.inference_mode():
            answers = model.generate(prompts, attention_mask=torch.ones_like(prompts), **how)
        return answers[:, PROMPT_TOKENS:].tolist()

    return _round(generate)


def llama_cpp(task: contest.Task, *, dtype: str) -> contest.Round:
    """Return a round of llama.cpp through its C interface, all streams in one batch a step."""
    import llama_cpp as lib  # pyright: ignore[reportMissingImports] - in the peers' environment only
    import numpy as np

    @lib.llama_log_callback  # pyright: ignore[reportUntypedFunctionDecorator]
    def silent(*_: Any) -> None:
        """Say nothing."""

    lib.llama_log_set(silent, None)
    lib.llama_backend_init()
    prompts, new_tokens = task["prompts"], task["new_tokens"]
    streams = len(prompts)
    file = write_gguf(Path(task["folder"]), dtype)
    model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_seq_max = streams * (PROMPT_TOKENS + new_tokens), streams
    params.n_batch = params.n_ubatch = streams * PROMPT_TOKENS
    params.n_threads = params.n_threads_batch = task["threads"]
    context = lib.llama_init_from_model(model, params)
    batch = lib.llama_batch_init(streams * PROMPT_TOKENS, 0, 1)
    size = task["vocab_size"]

    def put(tokens: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(tokens)
        for i, (token, position, stream, is_asked) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, is_asked
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, stream
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def likeliest() -> list[int]:  # of every stream: their logits stand one after the other
        logits = np.ctypeslib.as_array(lib.llama_get_logits(context), (streams, size))
        return logits.argmax(axis=1).tolist()

    def generate() -> list[list[int]]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        last = PROMPT_TOKENS - 1
        put([(token, i, row, i == last) for row, prompt in enumerate(prompts) for i, token in enumerate(prompt)])
        answers = [likeliest()]
        for position in range(PROMPT_TOKENS, PROMPT_TOKENS + new_tokens - 1):
            put([(token, position, row, True) for row, token in enumerate(answers[-1])])
            answers.append(likeliest())
        return [list(answer) for answer in zip(*answers, strict=True)]

    return _round(generate, silent)  # the library calls it as long as it lives


def write_gguf(folder: Path, dtype: str) -> Path:
    """Write the directory's Llama as a GGUF file without vocabulary, matrices in `dtype`; return its path."""
    import gguf  # pyright: ignore[reportMissingImports] - in the peers' environment only
    import numpy as np
    from safetensors.numpy import load_file

    shape = json.loads((folder / "config.json").read_text())
    heads, kv_heads, layers = (shape[f"num_{what}"] for what in ("attention_heads", "key_value_heads", "hidden_layers"))
    kind = {
        "f32": gguf.GGMLQuantizationType.F32,
        "f16": gguf.GGMLQuantizationType.F16,
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
    }[dtype]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    path = folder / f"model-{dtype}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_tokenizer_model("no_vocab")
    weights: dict[str, Any] = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:  # llama.cpp rotates neighbours, Hugging Face halves: the same rows in another order
                tensor = tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        where = names.get_name(name, try_suffixes=(".weight",))
        is_matrix = tensor.ndim == 2
        data = gguf.quants.quantize(np.ascontiguousarray(tensor), kind) if is_matrix else tensor
        writer.add_tensor(where, data, raw_dtype=kind if is_matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _round(generate: Callable[[], list[list[int]]], *kept: object) -> contest.Round:
    """Return a round of `generate`, which returns the new tokens of each stream; `kept` lives as long as the round."""
    answers: list[list[int]] = []

    def answer() -> None:
        answers[:] = generate()

    def play(_kept: object = kept) -> dict[str, float]:
        seconds = contest.timed(answer)
        beginnings = json.dumps([ids[:COMPARED_TOKENS] for ids in answers])
        return {
            "tokens_per_second": sum(map(len, answers)) / seconds,
            "beginnings_crc": zlib.crc32(beginnings.encode()),
        }

    return play


CONTENDERS = [
    LIMITS,
    *(
        contest.Contender(f"minimind {name}", partial(ours, dtype=dtype))
        for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16"), ("int8", "int8"))
    ),
    *(
        contest.Contender(f"transformers {name}", partial(transformers, dtype=dtype), is_peer=True)
        for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
    ),
    contest.Contender(
        "transformers compiled bf16", partial(transformers, dtype="bfloat16", is_compiled=True), is_peer=True
    ),
    *(
        contest.Contender(f"llama.cpp {dtype}", partial(llama_cpp, dtype=dtype), is_peer=True, has_llama_cpp=True)
        for dtype in ("f32", "f16", "q8_0")
    ),
]

PAIRS = (
    *((f"minimind {name}", "transformers fp32") for name in ("fp32", "bf16", "int8")),
    ("minimind bf16", "transformers bf16"),
    *((f"minimind {a}", f"llama.cpp {b}") for a, b in (("fp32", "f32"), ("bf16", "f16"), ("int8", "q8_0"))),
)
"""Whom we compare with whom: weights of like size, and the plainest way to decode."""


def write_model(folder: Path) -> dict[str, Any]:
    """Write a Transformers directory of random weights; return its shape."""
    import torch
    from safetensors.torch import save_file

    from minimind.model.config import ModelConfig
    from minimind.model.transformer import Transformer

    torch.manual_seed(0)
    config = ModelConfig.from_preset("small")
    weights = {name: tensor.contiguous() for name, tensor in Transformer(config).state_dict_for_disk().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shape = config.to_hf()
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    return {"folder": str(folder), "vocab_size": config.vocab_size, "weights": config.num_parameters()[0]}


def main() -> None:
    """Play a race for each number of streams, print and write."""
    parser = contest.parser(__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    options = parser.parse_args()
    if options.worker:
        contest.work(CONTENDERS, options.worker)
        return
    import torch

    outcome: dict[str, Any] = {"threads": options.threads, "prompt_tokens": PROMPT_TOKENS}
    with tempfile.TemporaryDirectory() as folder:
        task = write_model(Path(folder))
        for streams in options.streams:
            new_tokens = NEW_TOKENS.get(streams, NEW_TOKENS_OF_MANY)
            prompts = torch.randint(3, task["vocab_size"], (streams, PROMPT_TOKENS)).tolist()
            results = contest.race(CONTENDERS, task | {"prompts": prompts, "new_tokens": new_tokens}, options)
            title = f"{streams} stream(s), {PROMPT_TOKENS} + {new_tokens} tokens"
            ceilings = {name: ceiling(name, task["weights"], results["limits"]) for name in results if streams == 1}
            peers = [one.name for one in CONTENDERS if one.is_peer]
            contest.report(title, results, peers, ceilings=ceilings)
            said = {found.get("beginnings_crc") for name, found in results.items() if name.endswith((" fp32", " f32"))}
            print("the float32 contenders say", "the same" if len(said) == 1 else f"DIFFERENT THINGS: {said}")
            speeds = {
                name: found["tokens_per_second"] for name, found in results.items() if "tokens_per_second" in found
            }
            ratios = {f"{a} / {b}": speeds[a] / speeds[b] for a, b in PAIRS if a in speeds and b in speeds}
            print(*(f"{ratio:6.2f}  {pair}" for pair, ratio in ratios.items()), sep="\n")
            outcome[f"{streams} streams"] = {"new_tokens": new_tokens, "ratios": ratios, **results}
    contest.write("decoding", outcome)


def ceiling(name: str, weights: int, limits: dict[str, float]) -> float:
    """Return the tokens per second of one stream at which the weights are read at the machine's bandwidth."""
    size = WEIGHT_BYTES.get(name.rsplit(" ", 1)[-1], 0.0)
    if not size:
        return 0.0
    return 1e9 * limits[f"read_{NEAREST_BLOCK.get(size, 26)}_mb_gb_per_s"] / (weights * size)


if __name__ == "__main__":
    main()
