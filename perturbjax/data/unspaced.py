"""Scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan ...): each character is a word.

    iPhone很好用！ ──► iPhone 很 好 用 ！        หนังดี ──► ห นั ง ดี        a character with the marks on it, everything else as it is

That is BERT's rule for Chinese characters, for the other scripts, too: their words would take a dictionary of each language.
"""

import collections
import re
import unicodedata
from collections.abc import Iterable

BLOCKS = (  # Unicode's, without Chinese characters
    (0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19FF), (0x1A20, 0x1AAF), (0x1B00, 0x1B7F),  # Thai ... Balinese
    (0x3001, 0x312F), (0x31A0, 0x31BF), (0x31F0, 0x31FF), (0xA000, 0xA4CF), (0xA980, 0xA9FF), (0xAA60, 0xAADF),  # kana, Yi, Javanese
    (0xFF01, 0xFF0F), (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF9F),  # wide punctuation, narrow kana
)  # fmt: skip
FAR = ((0x1AFF0, 0x1B16F), (0x20000, 0x3FFFD))  # more kana and Chinese characters: `re` has a table up to 0xFFFF only
CHINESE = ((0x2E80, 0x2FDF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF))
JOINERS = "\u200c\u200d\ufe00-\ufe0f"  # invisible, between characters that belong together

_set = lambda blocks: "".join(f"{chr(low)}-{chr(high)}" for low, high in blocks)
_chars = [chr(code) for low, high in BLOCKS for code in range(low, high + 1)]
_marks = "".join(char for char in _chars if unicodedata.category(char)[0] == "M")
_letters = "".join(char for char in _chars if unicodedata.category(char)[0] == "L")
_own = _set(BLOCKS + CHINESE + FAR)
WORD = re.compile(rf"[{_own}][{_marks}{JOINERS}]*|[^\s{_own}]+")
LETTER = re.compile(f"[{_letters}{_set(CHINESE + FAR)}]")


def cut(text: str) -> list[str]:
    """What stands between white space, the characters of these scripts each by itself.

    >>> cut("iPhone很好用！ ok")
    ['iPhone', '很', '好', '用', '！', 'ok']
    """
    return text.split() if text.isascii() else WORD.findall(text)


def count(texts: Iterable[str]) -> int:
    """How many texts have letters of these scripts."""
    return sum(LETTER.search(text) is not None for text in texts)


def has_spaces(texts: Iterable[str]) -> bool:
    """Whether someone has put spaces between the words of these scripts: what stands between spaces then comes again and again.

    >>> has_spaces(["我 喜欢 电影", "我 不 喜欢 电影"]), has_spaces(["我喜欢电影", "我不喜欢 这部电影"])
    (True, False)
    """
    found = [[word for word in text.split() if LETTER.search(word)] for text in texts if LETTER.search(text)]
    counts = collections.Counter(word for words in found for word in words)
    total = sum(counts.values())
    return total >= 2 * len(found) and sum(n for n in counts.values() if n > 1) >= total / 2
