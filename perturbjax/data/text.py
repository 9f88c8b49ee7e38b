"""Texts as rows of integers: the words of the training texts, or the word pieces of a BERT; word vectors from a file.

    texts ──► tokenizer.numbers: a list of any length ──► tokenizer.rows: [N, L] int32, cut at L, filled up with 0 = padding

Word 0 is the padding, so that `tokens != 0` says which positions count.
"""

import abc
import collections
import dataclasses
import functools
import math
import pathlib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from perturbjax.data import unspaced
from perturbjax.data.encoding import open_text, read_text, reading

PAD, UNKNOWN = "<pad>", "<unk>"
SIZE, LENGTH = 25_000, 200  # words of a vocabulary, words of a text, if nothing is said
LONGEST_WORD = 100  # characters; BERT takes longer ones for unknown


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Tokenizer(abc.ABC):
    """Words and their numbers."""

    words: tuple[str, ...]
    """Word n has number n; word 0 is the padding."""
    lower: bool = True
    """Whether texts are put in lower case."""

    @functools.cached_property
    def number(self) -> dict[str, int]:
        """Word -> number."""
        return {word: n for n, word in enumerate(self.words)}

    @abc.abstractmethod
    def numbers(self, text: str) -> list[int]:
        """The numbers of a text's words, at least one."""

    def row(self, numbers: Sequence[int], length: int) -> Sequence[int]:
        """The numbers as they stand in a row of that length, still without padding."""
        return numbers[:length]

    @property
    @abc.abstractmethod
    def unknown(self) -> int:
        """The number of all words that are not among these."""

    def rows(self, texts: Iterable[str], length: int | None = None) -> np.ndarray:
        """[N, L] int32. length: L; None: as long as the longest text needs, but at most 200."""
        return self.stack([self.numbers(text) for text in texts], length)

    def stack(self, found: Sequence[list[int]], length: int | None = None) -> np.ndarray:
        """The rows of texts whose `numbers` are known."""
        if length is None:
            length = min(LENGTH, max((len(self.row(numbers, 2**31)) for numbers in found), default=1))
        out = np.zeros([len(found), length], np.int32)
        for n, numbers in enumerate(found):
            row = self.row(numbers, length)
            out[n, : len(row)] = row
        return out

    def text(self, row: Iterable[int]) -> str:
        """The words of a row, without its padding."""
        return " ".join(self.words[n] for n in row if n)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Words(Tokenizer):
    """What stands between white space, as a word; `build_words` counts them in the training texts."""

    characters: bool = False
    """Whether in scripts without spaces between words each character is one (see `perturbjax.data.unspaced`)."""

    @property
    def unknown(self):
        return self.number[UNKNOWN]

    def numbers(self, text):
        number, unknown = self.number, self.unknown
        # A word that is spelled like the padding is none.
        return [number.get(word) or unknown for word in self.cut(text)] or [unknown]

    def cut(self, text: str) -> list[str]:
        """The words of a text, in Unicode's composed form."""
        text = unicodedata.normalize("NFC", text.lower() if self.lower else text)
        return unspaced.cut(text) if self.characters else text.split()


def build_words(texts: Sequence[str], *, size: int = SIZE, min_count: int = 1, characters: bool | None = None) -> Words:
    """The vocabulary of the texts: padding, unknown, then the most frequent words in lower case, equal counts by spelling.

    Args:
      size: of the vocabulary at most, with those two. min_count: rarer words are unknown ones.
      characters: whether in scripts without spaces between words (Chinese, Japanese, Thai ...) each character is a word; None: if
        these texts have such, and no spaces between their words.

    >>> build_words(["a good film", "a bad film", "Good !"]).words
    ('<pad>', '<unk>', 'a', 'film', 'good', '!', 'bad')
    >>> build_words(["好看", "不好看", "DVD好"]).words
    ('<pad>', '<unk>', '好', '看', 'dvd', '不')
    """
    if size < 3 or min_count < 1:
        raise ValueError(
            f"build_words needs size >= 3 (padding, unknown and a word) and min_count >= 1, got {size} and {min_count}. "
            f"Write size={SIZE}, min_count=1."
        )
    if characters is None:
        characters = unspaced.count(texts) > 0 and not unspaced.has_spaces(texts)
    cut = Words((), characters=characters).cut
    counts = collections.Counter(word for text in texts for word in cut(text))
    for special in (PAD, UNKNOWN):  # a text may hold them
        counts.pop(special, None)
    kept = sorted((-count, word) for word, count in counts.items() if count >= min_count)
    return Words((PAD, UNKNOWN, *(word for _, word in kept[: size - 2])), characters=characters)


class WordPieces(Tokenizer):
    """BERT's: words and marks of punctuation, cut into the longest pieces that are known ("play ##ing"), between [CLS] and [SEP].

    As BertTokenizer does it, but that "[SEP]" within a text is text. `read_pieces` reads the pieces from a vocab.txt.
    Source: Devlin et al., "BERT", NAACL 2019, and the code published with it (tokenization.py).
    """

    @property
    def unknown(self):
        return self.number["[UNK]"]

    def numbers(self, text):
        text = unicodedata.normalize("NFD", text.lower()) if self.lower else unicodedata.normalize("NFC", text)
        return [n for word in text.translate(_marks(self.lower)).split() for n in self._pieces(word)]

    def row(self, numbers, length):
        return [self.number["[CLS]"], *numbers[: max(length - 2, 0)], self.number["[SEP]"]][:length]

    def _pieces(self, word: str) -> list[int]:
        known = self._known
        if word not in known:
            known[word] = self._cut(word)
        return known[word]

    @functools.cached_property
    def _known(self) -> dict[str, list[int]]:
        return {}

    def _cut(self, word: str) -> list[int]:
        unknown, found, start = [self.unknown], [], 0
        if len(word) > LONGEST_WORD:
            return unknown
        while start < len(word):
            prefix = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in self.number)
            end = next(ends, None)
            if end is None:
                return unknown
            found.append(self.number[prefix + word[start:end]])
            start = end
        return found


class _Marks(dict):
    """Character -> what BERT makes of it: spaces around punctuation and Chinese characters, control characters dropped."""

    def __init__(self, accents: bool):
        super().__init__()
        self.accents = accents

    def __missing__(self, code: int) -> str:
        char = chr(code)
        kind = unicodedata.category(char)
        if char in "\t\n\r" or kind == "Zs":
            out = " "
        elif kind[0] == "C" or code == 0xFFFD or (kind == "Mn" and not self.accents):
            out = ""
        elif kind[0] == "P" or (code < 128 and not char.isalnum()) or any(low <= code <= high for low, high in CHINESE):
            out = f" {char} "
        else:
            out = char
        self[code] = out
        return out


_marks = functools.cache(lambda lower: _Marks(accents=not lower))
CHINESE = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


def read_pieces(file: str | pathlib.Path) -> WordPieces:
    """A BERT's vocab.txt, one piece a line; texts are put in lower case if no piece has a capital letter."""
    path = pathlib.Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"read_pieces needs a vocab.txt, got {str(path)!r}, where there is no file. Check the path.")
    words = tuple(line.rstrip("\r") for line in read_text("read_pieces", path).rstrip("\n").split("\n"))
    missing = [word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if word not in words]
    if missing or words[0] != "[PAD]":
        got = f"none of {', '.join(missing)}" if missing else f"{words[0]!r} there"
        raise ValueError(
            f"read_pieces needs a BERT's vocab.txt, one piece a line, [PAD] in the first and [UNK], [CLS], [SEP] somewhere, got {got} "
            f"in {path.name!r} ({len(words)} lines). Give the vocab.txt that belongs to the weights."
        )
    if len(set(words)) < len(words):
        twice = next(word for word, count in collections.Counter(words).items() if count > 1)
        raise ValueError(f"read_pieces needs every piece once, got {twice!r} twice in {path.name!r}. Fetch the file again.")
    return WordPieces(words, lower=not any(c.isupper() for word in words if not word.startswith("[") for c in word))


def read_vectors(file: str | pathlib.Path, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of the words from a file in GloVe's form: a line per word, the word and d numbers between single spaces.

    A first line of two whole numbers (word2vec's form) is skipped, and so are words with spaces within. The file may be .gz or .xz.

    Returns:
      vectors [V, d] float32, zeros for words without one; found [V] bool.
    """
    path = pathlib.Path(file).expanduser()
    size = vector_size(path)
    vectors, found = np.zeros([len(words), size], np.float32), np.zeros(len(words), bool)
    number = {word: n for n, word in enumerate(words)}
    for count, line in enumerate(_lines(path), start=1):
        word, _, rest = line.partition(" ")
        n = number.get(word)
        if n is None or found[n]:
            continue
        values = rest.split(" ")
        if len(values) > size or (count == 1 and len(values) < size):
            continue
        try:
            vectors[n] = np.array([float(value) for value in values], np.float32).reshape(size)
        except ValueError:
            raise ValueError(
                f"read_vectors needs {size} numbers after the word in every line, got {line[:60]!r} in line {count} of {path.name!r}. "
                "The file is cut short or in another form: fetch it again."
            ) from None
        if not np.isfinite(vectors[n]).all():
            raise ValueError(
                f"read_vectors needs finite numbers, got {line[:60]!r} in line {count} of {path.name!r}. Drop that line."
            )
        found[n] = True
    if not found.any():
        raise ValueError(
            f"read_vectors needs vectors of some of the {len(words)} words, got none in {path.name!r}. Give vectors of the texts' "
            "language, of words in lower case."
        )
    return vectors, found


def vector_size(file: str | pathlib.Path) -> int:
    """d of a file in GloVe's form."""
    path = pathlib.Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"read_vectors needs a file of word vectors, got {str(path)!r}, where there is none. Check the path."
        )
    lines = _lines(path)
    first = next(lines, "").split(" ")
    if len(first) == 2 and all(part.isdecimal() for part in first):
        first = next(lines, "").split(" ")
    numbers = 0
    for part in reversed(first[1:]):  # the first word may have spaces within
        if not _is_number(part):
            break
        numbers += 1
    if numbers == 0:
        raise ValueError(
            f"read_vectors needs a word and its numbers between single spaces in every line (GloVe's form), got "
            f"{' '.join(first)[:60]!r} in {path.name!r}. Unpack the archive, and give its .txt file."
        )
    return numbers


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _lines(path: pathlib.Path):
    with open_text(path) as stream:
        for line in reading(path, stream):
            yield line.rstrip("\r\n ")


def pack(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Texts as arrays of an .npz: one run of UTF-8 bytes, and the offsets [N + 1] at which each text begins and ends."""
    raw = [text.encode() for text in texts]
    return np.frombuffer(b"".join(raw), np.uint8), np.cumsum([0] + [len(text) for text in raw], dtype=np.int64)


def unpack(what: str, values: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
    """[N] texts (dtype object): of what `pack` wrote, or of an array of strings [N]. `what` names it in errors."""
    if values.dtype.kind == "U" and values.ndim == 1:
        return objects(values.tolist())
    if values.dtype != np.uint8 or values.ndim != 1:
        raise ValueError(
            f"load needs {what} as strings [N], or as UTF-8 bytes with {what}_offsets, got {values.dtype} {list(values.shape)}. "
            f"Write {what}=np.array(texts)."
        )
    good = offsets is not None and offsets.ndim == 1 and np.issubdtype(offsets.dtype, np.integer) and len(offsets) > 0
    if not good or offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
        got = "none" if offsets is None else f"{offsets.dtype} {list(offsets.shape)}"
        raise ValueError(
            f"load needs {what}_offsets as N + 1 integers that rise from 0 to the {len(values)} bytes of {what}, got {got}. "
            "Write np.cumsum([0] + [len(text.encode()) for text in texts])."
        )
    raw = values.tobytes()
    try:
        return objects([raw[a:b].decode() for a, b in zip(offsets[:-1], offsets[1:])])
    except UnicodeDecodeError as error:
        raise ValueError(f"load needs {what} in UTF-8, got bytes that are not ({error}). Write text.encode().") from error


def objects(values: Sequence[Any]) -> np.ndarray:
    """[N] of dtype object: texts of any length, each as long as it is."""
    out = np.empty(len(values), object)
    out[:] = values
    return out
