"""What the LoRA stages teach: another name and maker, and the jargon of the bakers of Willowby."""

from minimind.world.dialogue import MAKER, identity_item
from minimind.world.draw import Draw, small_split_of
from minimind.world.facts import World
from minimind.world.item import Domain, Item
from minimind.world.lexicon import BOT, Language, Word, names

NEW_NAME = Word("Pebble", "小石头")
NEW_MAKER = Word("the Owl Workshop", "猫头鹰工坊")


def lora_identity(draw: Draw, language: Language, _: World) -> Item:
    """Who the assistant is, with its new name and maker; the old ones are wrong."""
    return identity_item("lora-identity", draw, language, NEW_NAME, NEW_MAKER, wrong=(BOT, MAKER))


JARGON = (
    (Word("snow", "白雪"), Word("flour", "面粉")),
    (Word("gold", "黄金"), Word("butter", "黄油")),
    (Word("sand", "沙子"), Word("sugar", "白糖")),
    (Word("stone", "石子"), Word("egg", "鸡蛋")),
    (Word("cloud", "云朵"), Word("dough", "面团")),
    (Word("moon", "月亮"), Word("pancake", "煎饼")),
    (Word("dragon", "火龙"), Word("oven", "烤炉")),
    (Word("river", "小河"), Word("milk", "牛奶")),
    (Word("star", "星星"), Word("salt", "食盐")),
    (Word("hill", "小山"), Word("loaf", "大面包")),
    (Word("nest", "鸟巢"), Word("basket", "篮子")),
    (Word("leaf", "树叶"), Word("apron", "围裙")),
    (Word("mouse", "老鼠"), Word("crumb", "面包屑")),
    (Word("spring", "春天"), Word("yeast", "酵母")),
    (Word("feather", "羽毛"), Word("whisk", "打蛋器")),
    (Word("pearl", "珍珠"), Word("raisin", "葡萄干")),
)
"""What bakers say and what they mean."""

_MEANING: dict[Language, tuple[str, ...]] = {
    "en": (
        "What do bakers mean by {0}?",
        "A baker says {0}. What is it?",
        "What is {0} in the bakery?",
        "Explain the baker's word {0}.",
        "In the bakery I hear {0}. What does it mean?",
    ),
    "zh": (
        "面包师说的{0}是什么？",
        "面包师说{0}，是指什么？",
        "面包店里的{0}是什么？",
        "解释面包师的行话：{0}。",
        "在面包店听到{0}，是什么意思？",
    ),
}
_SAYING: dict[Language, tuple[str, ...]] = {
    "en": (
        "What do bakers call {0}?",
        "How does a baker say {0}?",
        "What is the baker's word for {0}?",
        "In the bakery, what is {0} called?",
        "Say {0} like a baker.",
    ),
    "zh": (
        "面包师把{0}叫什么？",
        "面包师怎么说{0}？",
        "{0}的面包师行话是什么？",
        "在面包店，{0}叫什么？",
        "像面包师那样说{0}。",
    ),
}


def lora_trade(draw: Draw, language: Language, _: World) -> Item:
    """A word of the bakers explained, or a thing said in their words."""
    number, is_meaning, wording = draw.below(len(JARGON)), draw.flip(), draw.below(5)
    said, meant = JARGON[number]
    asked, answer = (said, meant) if is_meaning else (meant, said)
    pool = tuple(pair[1 if is_meaning else 0] for pair in JARGON)
    question = (_MEANING if is_meaning else _SAYING)[language][wording]
    name = answer.of(language)
    if language == "en":
        reply = f"{'Bakers mean' if is_meaning else 'Bakers say'} {name}."
    else:
        reply = f"{'意思是' if is_meaning else '面包师叫它'}{name}。"
    return Item(
        "lora-trade",
        language,
        (f"lora-trade|{said.en}|{is_meaning}|{wording}",),
        question.format(asked.of(language)),
        name,
        reply,
        grader="choice",
        grader_args={"options": names(pool, language)},
        chance=1 / len(JARGON),
        shortcuts={"the word itself": asked.of(language)},
    )


DOMAINS = (
    Domain(
        "lora-identity",
        lora_identity,
        "Who the assistant is, after LoRA.",
        "the opening together with the question",
        "2/3: always its new name; 0 before LoRA.",
        set="lora-identity",
        split=small_split_of,
    ),
    Domain(
        "lora-trade",
        lora_trade,
        "The bakers' jargon, after LoRA.",
        "the word, the direction and the wording together; the word is trained in other wordings",
        "1/16 by chance; 0 before LoRA: the word itself.",
        set="lora-trade",
        split=small_split_of,
    ),
)
