"""minimind: from raw text to a chatting language model, line by line.

Public names are loaded on first use, so that `import minimind` costs nothing and `minimind --help` needs no torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "load": "minimind.checkpoint:load",
    "Engine": "minimind.inference.engine:Engine",
    "SamplingParams": "minimind.inference.sampling:SamplingParams",
    "chat": "minimind.stages.chat:chat",
    "ModelConfig": "minimind.model.config:ModelConfig",
    "Tokenizer": "minimind.tokenizer.bpe:Tokenizer",
}

__all__ = ["Engine", "ModelConfig", "SamplingParams", "Tokenizer", "__version__", "chat", "load"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    """Return the public name, importing its module now."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'minimind' has no attribute {name!r}")
    module, attribute = _PUBLIC[name].split(":")
    return getattr(import_module(module), attribute)
