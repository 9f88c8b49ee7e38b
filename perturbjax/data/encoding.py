"""Text files as people have them: UTF-8 with and without a mark at the start, UTF-16 and UTF-32, packed or not; others by name.

A mark, or a zero in every other byte, says for sure which of UTF-8, -16 and -32 a file is in, so it is read. What else it might be can
only be guessed: that is an error, which shows what the text would say.
"""

import codecs
import gzip
import lzma
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import TextIO

OPENERS: dict[str, Callable] = {".gz": gzip.open, ".xz": lzma.open}
MARKS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""What separates columns of a table, and what it is called."""
LOOKED_AT, GUESSED = 2**28, 2**20  # bytes looked at for what is not UTF-8, and for a guess from there on
EXCERPT = 12  # characters before and after those that are not UTF-8
KANA, JAPANESE = re.compile("[\u3041-\u30ff]"), 0.1  # of the characters beyond ASCII at least are kana, which others have not
WESTERN = 0.25  # of the characters at most are beyond ASCII in languages that one reads in Latin-1 and its likes


def encoding_of(data: bytes) -> str:
    """The encoding by the file's first bytes: "utf-8-sig" (with or without a mark), "utf-16", "utf-16-le", "utf-32", ..."""
    for mark, name in MARKS:
        if data.startswith(mark):
            return name
    zeros = [byte == 0 for byte in data[:4]]  # two characters of a heading, or of any text in Latin letters
    if zeros in ([False, True] * 2, [True, False] * 2):
        return "utf-16-le" if zeros[1] else "utf-16-be"
    return "utf-8-sig"


def open_text(path: pathlib.Path) -> TextIO:
    """The file as text, unpacked if it is .gz or .xz, in the encoding that its first bytes tell."""
    opener = OPENERS.get(path.suffix, open)
    with opener(path, "rb") as stream:
        try:
            head = stream.read(4)
        except (EOFError, lzma.LZMAError, OSError):
            head = b""  # `reading` says what is the matter
    return opener(path, "rt", encoding=encoding_of(head), newline="")


def reading(path: pathlib.Path, stream: Iterable[str]) -> Iterable[str]:
    """The same lines; a damaged file or another encoding becomes an error that names the file."""
    try:
        yield from stream
    except UnicodeError as error:
        with OPENERS.get(path.suffix, open)(path, "rb") as raw:
            raise ValueError(f"load needs text in UTF-8, got {str(path)!r}. {foreign(raw.read(LOOKED_AT), path)}") from error
    except (EOFError, lzma.LZMAError, OSError) as error:
        raise ValueError(f"load needs a whole file, got {str(path)!r} ({error}). Copy it again.") from error


def read_text(function: str, path: pathlib.Path) -> str:
    """The whole of a file. Raises ValueError for text that is neither UTF-8 nor has a mark."""
    data = path.read_bytes()
    try:
        return data.decode(encoding_of(data))
    except UnicodeError as error:
        raise ValueError(f"{function} needs text in UTF-8, got {path.name!r}. {foreign(data, path)}") from error


def is_western(data: bytes) -> bool:
    """Whether so few bytes are beyond ASCII that the text is in Latin-1 or one of its likes, rather than in another script."""
    visible = len(data) - sum(data.count(space) for space in (b" ", b"\n", b"\r", b"\t"))
    return sum(byte > 127 for byte in data) <= WESTERN * visible


def is_japanese(data: bytes, encoding: str) -> bool:
    """Whether the text, read so, has kana: short ones are taken for Korean by what goes by statistics alone."""
    beyond = [char for char in data.decode(encoding, errors="replace") if not char.isascii()]
    return len(KANA.findall("".join(beyond))) >= JAPANESE * len(beyond) > 0


def foreign(data: bytes, path: pathlib.Path) -> str:
    """What to do with text that is not UTF-8: which encodings it may be in, what it says in each, and the line that converts it."""
    if data.startswith(b"PK\x03\x04"):
        return "That is a zip archive or an Excel workbook. Unpack it, or save the sheet as CSV UTF-8."
    bad = _first_bad(data)
    line, start = data.count(b"\n", 0, bad) + 1, data.rfind(b"\n", 0, bad) + 1
    mixed = not data[:start].isascii() and not data.startswith(tuple(mark for mark, _ in MARKS))
    rest = data[start : start + GUESSED].splitlines()[0] if mixed else data[start : start + GUESSED]
    names = candidates(rest if mixed else data[:GUESSED] if bad < GUESSED / 2 else rest)
    if not names:
        return f"Line {line} is in no encoding that is known. Save it as UTF-8."
    says = f"Line {line} may say {' or '.join(f'{excerpt(rest, name)!r} ({name})' for name in names)}"
    if mixed:
        return f"{says}; all before it is UTF-8. Mend that line, or save it all as UTF-8."
    if path.suffix in OPENERS:
        return f"{says}. Unpack the file and save it as UTF-8."
    fix = f"pathlib.Path('new{path.suffix}').write_text(pathlib.Path({path.name!r}).read_text({names[0]!r}), 'utf-8')"
    return f"{says}. Convert it by the right one: {fix}."


def candidates(data: bytes) -> list[str]:
    """Up to three encodings that the text may be in, the likeliest first."""
    import charset_normalizer  # slow to import, and for errors only

    found = [match.encoding for match in charset_normalizer.from_bytes(data)]
    sure = ["cp1252"] if is_western(data) else [name for name in ("cp932", "euc_jp") if is_japanese(data, name)]
    return list(dict.fromkeys(sure + found))[:3]


def excerpt(data: bytes, encoding: str) -> str:
    """Some characters around the first ones that are not ASCII, in that encoding."""
    lines = data.decode(encoding, errors="replace").splitlines()
    text = next((line for line in lines if not line.isascii()), "").strip()
    first = next((n for n, char in enumerate(text) if ord(char) > 127), 0)
    return text[max(0, first - EXCERPT) : first + EXCERPT]


def _first_bad(data: bytes) -> int:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0
