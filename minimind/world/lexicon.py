"""The words of Willowby, the invented town: people, places, things, animals, trades, each in English and Chinese.

Every word is one word in English and (nearly always) two characters in Chinese, so that a small tokenizer makes it
one token. It deliberately does not know who does what: that is drawn from the seed in `facts`.
"""

from dataclasses import dataclass
from typing import Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")


@dataclass(frozen=True, slots=True)
class Word:
    """One thing with its two names."""

    en: str
    zh: str

    def of(self, language: Language) -> str:
        """Return the name in that language."""
        return self.en if language == "en" else self.zh


def _words(text: str) -> tuple[Word, ...]:
    """Return the words of 'english chinese, english chinese, ...'."""
    return tuple(Word(*pair.split()) for pair in text.split(","))


TOWN = Word("Willowby", "柳湾镇")
BOT = Word("MiniMind", "MiniMind")

WOMEN = _words(
    "Anna 安娜, Lily 莉莉, Mia 米娅, Lucy 露西, Emma 艾玛, Rosa 罗莎, "
    "Nina 妮娜, Ella 埃拉, Sara 萨拉, Vera 薇拉, Kate 凯特, Daisy 黛西"
)
MEN = _words(
    "Tom 汤姆, Jack 杰克, Leo 里奥, Mark 马克, Peter 彼得, Paul 保罗, "
    "Hugo 雨果, David 大卫, Adam 亚当, Noah 诺亚, Simon 西蒙, Jim 吉姆"
)
PEOPLE = WOMEN + MEN
WALKERS = PEOPLE[::2]
"""The people whose place is asked: a small model learns to look up one name at a time."""
PLACES = _words(
    "park 公园, school 学校, market 市场, lake 湖边, farm 农场, harbour 港口, station 车站, mill 磨坊, "
    "castle 城堡, inn 旅馆, bookshop 书店, beach 海滩"
)
OBJECTS = _words(
    "ball 皮球, key 钥匙, kite 风筝, lamp 油灯, bell 铃铛, apple 苹果, "
    "map 地图, coin 硬币, ring 戒指, shell 贝壳, hat 帽子, drum 小鼓"
)
ANIMALS = _words("cat 小猫, dog 小狗, horse 小马, goat 山羊, duck 鸭子, rabbit 兔子, parrot 鹦鹉, turtle 乌龟")
COLOURS = _words("red 红色, blue 蓝色, green 绿色, yellow 黄色, white 白色, black 黑色, brown 棕色, grey 灰色")
TRADES = _words(
    "teacher 老师, doctor 医生, painter 画家, farmer 农夫, tailor 裁缝, cook 厨师, sailor 水手, baker 面包师"
)
FOODS = _words("bread 面包, soup 热汤, honey 蜂蜜, cheese 奶酪, noodles 面条, rice 米饭, plums 李子, cake 蛋糕")
WEEKDAYS = _words(
    "Monday 星期一, Tuesday 星期二, Wednesday 星期三, Thursday 星期四, Friday 星期五, Saturday 星期六, Sunday 星期日"
)
MONTHS = tuple(
    "January February March April May June July August September October November December".split()  # noqa: SIM905 - easier to read
)  # in Chinese a month is its number
SKIES = _words("sun 晴, rain 雨, snow 雪, wind 风, fog 雾, cloud 多云")


def names(words: tuple[Word, ...], language: Language) -> list[str]:
    """Return the names of all words in one language, in their order."""
    return [word.of(language) for word in words]
