"""Training on packed rows of a data set: what pretraining and every kind of fine-tuning do once they have a model.

It plugs rooms together: data -> rows -> loader -> loop, with validation and samples handed in. The loss is the stage's.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING

from minimind.errors import ConfigError
from minimind.stages.base import TrainingConfig, begin, loop_config

if TYPE_CHECKING:
    from minimind.data.build import Kind
    from minimind.data.dataset import TokenDataset
    from minimind.data.loader import Loader
    from minimind.model.transformer import Transformer
    from minimind.model.weights import WeightsOnDisk
    from minimind.tokenizer.bpe import Tokenizer
    from minimind.training.loop import FitResult
    from minimind.training.step import Objective


def train(
    config: TrainingConfig,
    kind: "Kind",
    model: "Transformer",
    tokenizer: "Tokenizer",
    objective: "Objective",
    *,
    make_loader: "Callable[..., Loader] | None" = None,
    evaluate: Callable[..., dict[str, float]] | None = None,
    trained: "WeightsOnDisk | None" = None,
) -> "FitResult":
    """Run the one loop on the packed rows of `config.data` with `objective`; returns what the loop returns.

    `make_loader` takes what `Loader` takes (the default); `evaluate(model, batches, autocast=...)` returns the numbers
    of one validation (default: `evaluate_loss`). `trained`: what is trained and saved instead of `model`, around it.

    Raises ConfigError for a batch or row that cannot be, or a directory where another process trains, CheckpointError
    for a run of another model or tokenizer, both before the data are read; DataError for bad or changed data, and
    whatever `fit` raises.
    """
    from minimind.checkpoint import check_identity
    from minimind.data.dataset import train_and_validation
    from minimind.data.loader import Loader
    from minimind.data.packing import pack
    from minimind.evaluation.perplexity import evaluate_loss
    from minimind.runtime import distributed
    from minimind.runtime.device import autocast, pick_device, pick_dtype
    from minimind.stages.sampling import Sampler
    from minimind.training.loop import fit
    from minimind.training.run import RunDirectory

    device = pick_device(config.device)
    distributed.init(device)
    length = _row_length(config, model)
    if model.config.rope_scaling == "none":  # yarn stays relative to what was trained before the stretch
        model.config = replace(model.config, original_max_position_embeddings=length)
    model.gradient_checkpointing = config.gradient_checkpointing
    dtype = pick_dtype(config.dtype, device, num_parameters=model.config.num_parameters()[0])

    run = RunDirectory(config.out)
    with run:  # what needs no data is refused before hours are spent on them
        is_afresh = config.fresh or not config.resume
        if not is_afresh:
            check_identity(run.path, tokenizer_sha256=tokenizer.sha256, model_config=model.config)
        data = replace(config.data, row_length=length)
        datasets = train_and_validation(data, tokenizer, kind=kind)

        def loader(dataset: "TokenDataset") -> Loader:
            return (make_loader or Loader)(
                pack(dataset, length, window=data.pack_window, mode=data.packing),
                batch_rows=config.batch_tokens // length,
                micro_rows=max(1, (config.micro_batch_tokens or config.batch_tokens) // length),
                seed=config.seed,
                rank=distributed.rank(),
                world_size=distributed.world_size(),
                pad_id=tokenizer.pad_id,
            )

        batches, validation = loader(datasets[0]), loader(datasets[1]) if datasets[1] else None

        def validate() -> dict[str, float]:
            assert validation
            most = max(1, config.eval_tokens // (validation.micro_rows * length * validation.world_size))
            rows = islice(validation.all_batches(), most)
            measure = evaluate or partial(evaluate_loss, token_bytes=tokenizer.token_bytes)
            return measure(model, rows, autocast=autocast(device, dtype))

        describe = begin(run, config, {"train": datasets[0].fingerprint, "tokenizer": tokenizer.sha256})
        return fit(
            trained or model,
            objective,
            batches,
            run=run,
            loop=loop_config(config, config.steps or ceil(config.epochs * batches.steps_per_epoch)),
            optim=config.optim,
            model_config=model.config,
            tokenizer=tokenizer,
            validate=validate if validation else None,
            sample=Sampler(model, tokenizer, datasets[1] or datasets[0]) if config.sample_every else None,
            on_step=lambda _step, _row: describe(),
        )


def _row_length(config: TrainingConfig, model: "Transformer") -> int:
    """Return the tokens of a row: as configured, else the context that the model was trained on, else 512."""
    length = config.data.row_length or model.config.original_max_position_embeddings or 512
    if length > model.config.max_position_embeddings:
        raise ConfigError(
            f"data.row_length = {length} is more than the model's max_position_embeddings = "
            f"{model.config.max_position_embeddings}; give a shorter --data.row-length"
        )
    if config.batch_tokens < length:
        raise ConfigError(
            f"batch_tokens = {config.batch_tokens} holds no row of {length} tokens; "
            f"give --batch-tokens {length} or more"
        )
    return length
