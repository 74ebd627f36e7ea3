"""Writing, verifying and reading one run's checkpoints, with a model of a few hundred weights."""

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from training.tiny_run import DENSE, MOE, tiny_tokenizer

from minimind import checkpoint
from minimind.checkpoint import directory
from minimind.errors import CheckpointError, OutOfResourcesError
from minimind.model.config import ModelConfig
from minimind.model.disk import MODEL
from minimind.model.transformer import Transformer
from minimind.runtime import faults
from minimind.runtime.integrity import sha256_of_tensors
from minimind.tokenizer.bpe import Tokenizer

NOT_WHILE_WRITING = ("start", "old-moved", "prune-renamed", "pruned")
FILES = [*directory.REQUIRED, MODEL, "tokenizer_config.json", "chat_template.jinja", "MANIFEST.json"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture
def save(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Save step N of a run in tmp_path, with weights that depend on N."""

    def save(step: int, config: ModelConfig = DENSE, **options: Any) -> Path:
        torch.manual_seed(step)
        model = Transformer(config)
        moments = {"adamw.exp_avg/a": torch.randn(3), "adamw.step/a": torch.tensor(float(step))}
        return checkpoint.save(
            tmp_path,
            step,
            model=model,
            model_config=config,
            tokenizer=tokenizer,
            optimizer_state=moments,
            state={"position": {"step": step}, "pi": 0.1 + 0.2},
            **options,
        )

    return save


@pytest.fixture
def fault() -> Iterator[Callable[[str, Exception], None]]:
    """Raise an exception at one fault point."""

    def install(name: str, error: Exception) -> None:
        def hook(passed: str) -> None:
            if passed == name:
                raise error

        faults.hook = hook

    yield install
    faults.hook = None


class CrashError(BaseException):
    """Stands for the process dying: nothing may catch it."""


def visible(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith("."))


def hash_of(path: Path) -> str:
    found = checkpoint.read(path)
    return sha256_of_tensors(found.model_state, found.optimizer_state)


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_round_trip(save: Callable[..., Path], tmp_path: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    path = save(5, config)
    assert path == tmp_path / "checkpoints" / "step-000005"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert (tmp_path / "latest").resolve() == path.resolve()
    assert not (tmp_path / "latest").readlink().is_absolute()
    found = checkpoint.read(path)
    torch.manual_seed(5)
    model = Transformer(config)
    assert sha256_of_tensors(found.model_state) == sha256_of_tensors(model.state_dict_for_disk())
    assert all(tensor.dtype == torch.float32 for tensor in found.model_state.values())
    assert (found.step, found.model_config.to_hf()) == (5, config.to_hf())
    assert found.state["pi"] == 0.1 + 0.2
    assert found.tokenizer_sha256 == tokenizer.sha256
    loaded, loaded_tokenizer = checkpoint.load(tmp_path)
    assert not loaded.training
    assert loaded_tokenizer.sha256 == tokenizer.sha256
    ids = torch.arange(12)[None] + 30
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


class Shifted(Transformer):
    """A model whose weights are two files, and which describes them."""

    def files_for_disk(self) -> dict[str, dict[str, torch.Tensor]]:
        return super().files_for_disk() | {"critic.safetensors": {"score.weight": torch.ones(1, 4)}}

    def texts_for_disk(self) -> dict[str, str]:
        return {"critic.json": '{"layers": 1}'}


def test_the_model_says_which_files_its_weights_are(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = Shifted(DENSE)
    rest: dict[str, Any] = {"model_config": DENSE, "tokenizer": tokenizer, "optimizer_state": {}, "state": {}}
    path = checkpoint.save(tmp_path, 1, model=model, **rest)
    assert (path / "critic.json").read_text() == '{"layers": 1}'
    found = checkpoint.read(path)
    assert set(found.files) == {MODEL, "critic.safetensors"}
    assert found.files["critic.safetensors"]["score.weight"].shape == (1, 4)
    checkpoint.load(path)  # the language model alone
    with pytest.raises(CheckpointError, match="another kind of stage"):
        Transformer(DENSE).load_files(found.files)
    flip_bit(path / "critic.safetensors", 0.9)
    assert "sha256" in checkpoint.verify(path)[0]


def test_keeps_two_and_moves_latest(save: Callable[..., Path], tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(step)
    assert visible(tmp_path) == ["step-000003", "step-000004"]
    assert checkpoint.find_latest(tmp_path) == tmp_path / "checkpoints" / "step-000004"
    save(5, keep=0)  # fewer than two are never kept
    assert visible(tmp_path) == ["step-000004", "step-000005"]


def test_the_same_step_again_replaces_it(save: Callable[..., Path], tmp_path: Path) -> None:
    save(5)
    save(5, MOE)
    assert checkpoint.read(tmp_path / "latest").model_config.use_moe
    assert visible(tmp_path) == ["step-000005"]


# --- corruption ------------------------------------------------------------------------------------------------------


def rewrite(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def flip_bit(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "first bit": lambda path: flip_bit(path, 0.0),
    "middle bit": lambda path: flip_bit(path, 0.5),
    "last bit": lambda path: flip_bit(path, 1.0),
    "truncated": truncate,
    "emptied": lambda path: rewrite(path, b""),
    "appended": lambda path: rewrite(path, path.read_bytes() + b" "),
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_found(save: Callable[..., Path], tmp_path: Path, name: str) -> None:
    good, bad = save(1), save(2)
    whole = (bad / name).read_bytes()
    for kind, damage in DAMAGES.items():
        damage(bad / name)
        problems = checkpoint.verify(bad)
        assert problems, f"{kind} {name} was not noticed"
        assert name in " ".join(problems), (kind, problems)
        (bad / name).write_bytes(whole)
    assert checkpoint.verify(bad) == []
    truncate(bad / name)
    with pytest.raises(CheckpointError, match=r"step-000001"):  # the message offers the good one
        checkpoint.read(bad)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(bad)
    (bad / name).unlink()
    with pytest.raises(CheckpointError, match=name):  # also without the manifest it is no Transformers directory
        checkpoint.load(bad)
    assert checkpoint.find_latest(tmp_path) == good
    assert checkpoint.load(tmp_path)[0].config == DENSE


def test_swapped_files_and_directories_are_found(save: Callable[..., Path], tmp_path: Path) -> None:
    old, new = save(1), save(2)
    shutil.copy(old / MODEL, new / MODEL)
    assert "sha256" in checkpoint.verify(new)[0]
    shutil.rmtree(new)
    shutil.copytree(old, new)
    assert "holds the files of step 1" in checkpoint.verify(new)[0]
    assert checkpoint.find_latest(tmp_path) == old
    copied = shutil.copytree(old, tmp_path / "best")  # under another name a copy is fine
    assert checkpoint.read(copied).step == 1


def test_every_one_bad_is_an_error_and_changes_nothing(save: Callable[..., Path], tmp_path: Path) -> None:
    for step in (1, 2):
        flip_bit(save(step) / MODEL, 0.9)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"every checkpoint is bad.*step-000002.*step-000001.*--fresh"):
        checkpoint.find_latest(tmp_path)
    with pytest.raises(CheckpointError, match="every checkpoint is bad"):
        checkpoint.load(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_another_tokenizer_or_model_is_refused(save: Callable[..., Path], tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = save(1)
    (path / MODEL).write_bytes(b"would be found bad only after the identity")
    stretched = replace(DENSE, original_max_position_embeddings=7)
    for look in (checkpoint.read_latest, checkpoint.check_identity):
        with pytest.raises(CheckpointError, match=r"tokenizer .*, here 0000.*--fresh"):
            look(tmp_path, tokenizer_sha256="0" * 64, model_config=DENSE)
        with pytest.raises(CheckpointError, match="model_type llama, here granitemoeshared"):
            look(tmp_path, tokenizer_sha256=tokenizer.sha256, model_config=MOE)
        with pytest.raises(CheckpointError, match=r"step-000001: data\.row_length was 0 and is 7\. Give the same, or"):
            look(tmp_path, tokenizer_sha256=tokenizer.sha256, model_config=stretched)
        with pytest.raises(CheckpointError, match=r"another model: .*tokenizer"):
            look(tmp_path, tokenizer_sha256="0" * 64, model_config=stretched)
    checkpoint.check_identity(tmp_path, tokenizer_sha256=tokenizer.sha256, model_config=DENSE)
    checkpoint.check_identity(tmp_path / "no run", tokenizer_sha256="0" * 64, model_config=MOE)


def test_a_hostile_manifest_reaches_no_other_directory(save: Callable[..., Path], tmp_path: Path) -> None:
    path = save(1)
    (tmp_path / "secret").write_text("x")
    files = json.loads((path / "MANIFEST.json").read_text())["files"]
    entry = {"bytes": 1, "sha256": "0" * 64}
    (path / "MANIFEST.json").write_bytes(directory._manifest_bytes(1, {**files, "../../secret": entry}))
    assert "altered" in checkpoint.verify(path)[0]


# --- pruning ---------------------------------------------------------------------------------------------------------


def test_pruning_never_takes_the_last_good_one(save: Callable[..., Path], tmp_path: Path) -> None:
    good = save(1)
    flip_bit(save(2) / MODEL, 0.9)
    flip_bit(save(3) / MODEL, 0.9)
    if not good.exists():  # step 3 was good when it was written, so 1 was surplus then; put it back
        good = save(1)
    directory._prune(tmp_path, 2)
    assert good.exists()
    assert checkpoint.find_latest(tmp_path) == good


def test_failing_deletes_are_survived(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(1)
    save(2)

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.EBUSY, "device busy")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        save(3)
    assert visible(tmp_path) == ["step-000002", "step-000003"]
    assert list((tmp_path / "checkpoints").glob(".deleted-*"))
    save(4)
    assert not list((tmp_path / "checkpoints").glob(".*"))


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", checkpoint.FAULT_POINTS)
def test_a_crash_at_any_point_leaves_whole_checkpoints(
    save: Callable[..., Path], tmp_path: Path, fault: Callable[[str, BaseException], None], point: str
) -> None:
    save(1)
    newest = save(2)
    before = hash_of(newest)
    fault(point, CrashError())  # type: ignore[arg-type]
    with pytest.raises(CrashError):
        save(2) if point == "old-moved" else save(3)
    for path in checkpoint.checkpoints_of(tmp_path):
        assert checkpoint.verify(path) == []
    found = checkpoint.find_latest(tmp_path)
    assert found is not None
    reached = checkpoint.FAULT_POINTS.index(point) >= checkpoint.FAULT_POINTS.index("renamed")
    assert checkpoint.read(found).step == (3 if reached else 2)
    assert reached or hash_of(found) == before
    faults.hook = None
    save(4)
    assert len(visible(tmp_path)) == 2
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert (tmp_path / "latest").resolve().name == "step-000004"


@pytest.mark.parametrize("point", [p for p in checkpoint.FAULT_POINTS if p not in NOT_WHILE_WRITING])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk(
    save: Callable[..., Path], tmp_path: Path, fault: Callable[[str, Exception], None], point: str, number: int
) -> None:
    before = hash_of(save(1))
    fault(point, OSError(number, "no"))
    with pytest.raises(OutOfResourcesError, match=r"needs [\d,]+ bytes.*untouched"):
        save(2)
    faults.hook = None
    assert hash_of(tmp_path / "checkpoints" / "step-000001") == before
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert not any(checkpoint.verify(path) for path in checkpoint.checkpoints_of(tmp_path))


def test_free_space_is_looked_at_first(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OutOfResourcesError, match="only 1,000 bytes are free"):
        save(2)
    assert visible(tmp_path) == ["step-000001"]


# --- starting from anything ------------------------------------------------------------------------------------------


def test_resolve_takes_runs_checkpoints_and_their_folder(save: Callable[..., Path], tmp_path: Path) -> None:
    path = save(7)
    for given in (tmp_path, tmp_path / "checkpoints", path, tmp_path / "latest"):
        assert checkpoint.resolve(given).resolve() == path.resolve()


def test_resolve_says_what_exists_nearby(save: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("aaa", "pretrain-2"):
        shutil.copytree(save(7).parent, tmp_path / "runs" / name / "checkpoints")
    with pytest.raises(CheckpointError, match=r"pretrain: does not exist. Runs near it: .*/pretrain-2, .*/aaa$"):
        checkpoint.resolve(tmp_path / "runs" / "pretrain")
    with pytest.raises(CheckpointError, match=r"runs: is neither.*Runs near it: .*runs/aaa"):
        checkpoint.resolve(tmp_path / "runs")
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        checkpoint.resolve(tmp_path / "note.txt")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        checkpoint.resolve(tmp_path / "empty")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickled"):
        checkpoint.resolve(tmp_path / "pickle")


@pytest.fixture
def foreign(tmp_path: Path, tokenizer: Tokenizer) -> tuple[Path, Transformer]:
    """A Transformers directory in two shards, with what Transformers would write twice or recompute."""
    folder = tmp_path / "foreign"
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps(DENSE.to_hf()))
    torch.manual_seed(3)
    model = Transformer(DENSE)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict_for_disk().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder, model


def test_a_sharded_transformers_directory_loads(foreign: tuple[Path, Transformer]) -> None:
    folder, model = foreign
    loaded, _ = checkpoint.load(folder)
    for name, tensor in loaded.state_dict_for_disk().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict_for_disk()[name].to(torch.bfloat16).float())
    narrow, _ = checkpoint.load(folder, dtype=torch.bfloat16)
    assert next(narrow.parameters()).dtype == torch.bfloat16


def test_a_bad_transformers_directory_is_refused(foreign: tuple[Path, Transformer]) -> None:
    folder, _ = foreign
    shard = folder / "model-00001-of-00002.safetensors"
    whole = shard.read_bytes()
    for content, words in (
        ((1 << 40).to_bytes(8, "little") + whole[8:], "header claims 1,099,511,627,776"),
        (whole[: len(whole) // 2], "cannot be read"),
        (b"\x80\x04\x95pickle", "not a whole safetensors file"),
        (b"", "not a whole safetensors file"),
    ):
        shard.write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            checkpoint.load(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.load(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="no usable weight_map"):
        checkpoint.load(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="bert"):
        checkpoint.load(folder)


def test_missing_weights_are_named(save: Callable[..., Path], foreign: tuple[Path, Transformer]) -> None:
    folder, _ = foreign
    index = folder / "model.safetensors.index.json"
    weight_map = {k: v for k, v in json.loads(index.read_text())["weight_map"].items() if v.startswith("model-00001")}
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="missing: "):
        checkpoint.load(folder)
