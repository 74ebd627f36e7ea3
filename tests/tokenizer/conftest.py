"""One small vocabulary for all tokenizer tests."""

import pytest

from minimind.tokenizer.bpe import Tokenizer
from minimind.tokenizer.train import train

ENGLISH = [
    "The red ball is in the garden. Who has the ball now?",
    "Don't stop, it's 12 o'clock.\n\nTen past nine: 9:10.",
]
CHINESE = ["红色的球在花园里。现在谁有球？", "今天天气怎么样？今天是晴天，气温二十三度。\n明天见。"]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train((ENGLISH + CHINESE) * 20, 400)
