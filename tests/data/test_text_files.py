"""perturbjax.data.text_files, and what the rest of `data` makes of texts: every form of file, every unusable one, views."""

import csv
import dataclasses
import gzip
import json
import lzma
import re

import numpy as np
import pytest
from PIL import Image

from perturbjax.data import apply_views, check, drop_duplicates, leave_out, load, longtail, noise, shrink, thin, validation
from perturbjax.data.text import build_words, pack, unpack

TEXTS = [f"text number {n} is {'good' if n % 2 else 'bad'} , says \u201c{n % 5}\u201d" for n in range(40)]
LABELS = [n % 2 for n in range(40)]
NAMES = [("neg", "pos")[label] for label in LABELS]


def write_csv(path, rows, header=("text", "label"), opener=open):
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_jsonl(path, rows, opener=open, names=("text", "label", "split")):
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(dict(zip(names, row))) + "\n" for row in rows)
    return path


def write_npz(path, save=np.savez, **arrays):
    save(path, **arrays)
    return path


def texts_of(dataset):
    """Text -> class name, of all parts."""
    of = lambda texts, labels: {text: dataset.class_names[label] for text, label in zip(texts, labels, strict=True)}
    return of(dataset.train_texts, dataset.train_labels) | of(dataset.test_texts, dataset.test_labels)


FORMS = {
    "csv": lambda path: write_csv(path / "mine.csv", zip(TEXTS, NAMES)),
    "csv.gz": lambda path: write_csv(path / "mine.csv.gz", zip(TEXTS, NAMES), ("Review", "Sentiment"), gzip.open),
    "jsonl": lambda path: write_jsonl(path / "mine.jsonl", zip(TEXTS, NAMES)),
    "jsonl.xz": lambda path: write_jsonl(path / "mine.jsonl.xz", zip(TEXTS, NAMES), lzma.open, ("content", "class")),
    "npz": lambda path: write_npz(path / "mine.npz", text=np.array(TEXTS), labels=np.array(LABELS), class_names=["neg", "pos"]),
    "npz, packed": lambda path: write_npz(
        path / "mine.npz", np.savez_compressed, **dict(zip(("text", "text_offsets"), pack(TEXTS))), labels=np.array(LABELS),
        class_names=np.array(["neg", "pos"]), ratings=np.arange(40),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_single_file_is_split_by_class(tmp_path, form):
    d = load(FORMS[form](tmp_path))
    assert repr(d) == "mine: 28 training and 12 test texts of 8 words, 2 classes of 14 to 14"
    assert texts_of(d) == dict(zip(TEXTS, NAMES)) and d.class_names == ("neg", "pos") and d.kind == "texts" and d.notes == ()
    assert d.train_images.dtype == np.int32 and d.train_images.shape == (28, 8) and d.image_shape == (8,)
    assert d.source_size == 40 and len(np.unique(d.train_index)) == 28
    if "npz" in form:  # the numbers of the rows are those of the source
        assert [TEXTS[n] for n in d.train_index] == d.train_texts.tolist()
    assert d.tokenizer.text(d.train_images[0]) == d.train_texts[0]
    known = {word for text in d.train_texts for word in text.split()}
    assert set(d.tokenizer.words) == known | {"<pad>", "<unk>"}  # of the training texts alone
    unseen = [[word not in known for word in text.split()] for text in d.test_texts]
    np.testing.assert_array_equal(d.test_images == 1, unseen)


def test_the_npz_of_the_data_pack(tmp_path):
    arrays = {}
    for part, rows in (("train", slice(0, 30)), ("test", slice(30, 40))):
        arrays[f"{part}_text"], arrays[f"{part}_text_offsets"] = pack(TEXTS[rows])
        arrays[f"{part}_labels"] = np.array(LABELS[rows], np.int32)
    d = load(write_npz(tmp_path / "MR.npz", **arrays, class_names=np.array(["negative", "positive"]), train_ids=np.arange(30)))
    assert d.name == "MR" and d.train_texts.tolist() == TEXTS[:30] and d.test_texts.tolist() == TEXTS[30:]
    np.testing.assert_array_equal(d.train_labels, LABELS[:30])
    np.testing.assert_array_equal(d.train_index, np.arange(30))
    assert d.source_size == 30 and d.class_names == ("negative", "positive")


def test_an_npz_may_have_a_validation_set_and_positions(tmp_path):
    arrays = {f"{part}_text": np.array(TEXTS[rows]) for part, rows in PARTS.items()}
    arrays |= {f"{part}_labels": np.array(LABELS[rows]) for part, rows in PARTS.items()}
    d = load(write_npz(tmp_path / "x.npz", **arrays, train_index=np.arange(20) + 100))
    assert len(d.validation_labels) == len(d.validation_images) == len(d.validation_texts) == 10 and d.source_size is None
    np.testing.assert_array_equal(d.train_index, np.arange(20) + 100)


PARTS = {"train": slice(0, 20), "validation": slice(20, 30), "test": slice(30, 40)}


def test_a_column_may_say_the_split(tmp_path):
    rows = [(text, name, split) for split, part in PARTS.items() for text, name in zip(TEXTS[part], NAMES[part])]
    for path in (
        write_csv(tmp_path / "a.csv", rows, ("text", "label", "split")),
        write_jsonl(tmp_path / "a.jsonl", rows[::-1]),
    ):
        d = load(path)
        assert (len(d.train_labels), len(d.validation_labels), len(d.test_labels)) == (20, 10, 10)
        assert set(d.train_texts) == set(TEXTS[:20]) and set(d.validation_texts) == set(TEXTS[20:30])
    with pytest.raises(ValueError, match=re.escape("needs a split of train, test or validation in every row")):
        load(write_csv(tmp_path / "b.csv", [("a", "b", "dev")], ("text", "label", "split")))


def test_a_folder_of_files_by_split(tmp_path):
    write_jsonl(tmp_path / "train.jsonl.xz", zip(TEXTS[:30], LABELS[:30]), lzma.open)
    write_csv(tmp_path / "test.csv", zip(TEXTS[30:], LABELS[30:]))
    d = load(tmp_path)
    assert d.train_texts.tolist() == TEXTS[:30] and d.test_texts.tolist() == TEXTS[30:] and d.class_names == ("0", "1")
    np.testing.assert_array_equal(d.test_labels, LABELS[30:])
    write_jsonl(tmp_path / "test.jsonl", zip(TEXTS[30:], LABELS[30:]))
    with pytest.raises(ValueError, match="needs one file for each part in .*, got test.csv and test.jsonl. Remove one"):
        load(tmp_path)


def test_a_table_beside_images_is_no_folder_of_texts(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for n in range(4):
            Image.fromarray(np.full([4, 4], n, np.uint8)).save(tmp_path / "train" / name / f"{n}.png")
    write_csv(tmp_path / "train.csv", [("0.png", "a")], ("id", "label"))
    (tmp_path / "test.tsv").write_text("about")
    assert load(tmp_path).kind == "images"


def test_a_folder_with_a_file_for_each_class(tmp_path):
    for label, name in enumerate(("neg", "pos")):
        own = [text for text, of in zip(TEXTS, LABELS) if of == label]
        (tmp_path / f"{name}.txt").write_bytes("\r\n\n".join(own).encode() + b"\n")
    (tmp_path / "README.txt").write_text("about")
    d = load(tmp_path)
    assert texts_of(d) == dict(zip(TEXTS, NAMES)) and d.name == tmp_path.name
    assert d.notes == (f"{d.name}: 1 file (README.txt) ignored.",)


def test_a_folder_with_a_file_for_each_class_in_each_part(tmp_path):
    for part, rows in {"train": slice(0, 30), "test": slice(30, 40)}.items():
        (tmp_path / part).mkdir()
        for label, name in enumerate(("neg", "pos")):
            own = [text for text, of in zip(TEXTS[rows], LABELS[rows]) if of == label]
            (tmp_path / part / f"{name}.txt").write_text("\n".join(own), encoding="utf-8")
    d = load(tmp_path)
    assert (
        set(d.train_texts) == set(TEXTS[:30])
        and set(d.test_texts) == set(TEXTS[30:])
        and texts_of(d) == dict(zip(TEXTS, NAMES))
    )
    (tmp_path / "test" / "neutral.txt").write_text("so so")
    with pytest.raises(
        ValueError, match=r"needs the test texts of .* in the training texts' classes \(neg, pos\), got 'neutral'"
    ):
        load(tmp_path)


def test_the_files_of_movie_reviews_as_they_come(tmp_path):
    (tmp_path / "rt-polarity.neg").write_bytes("na\u00efve .\n".encode("latin-1") * 3)
    (tmp_path / "rt-polarity.pos").write_text("fine .\n" * 3)
    d = load(tmp_path)
    assert d.class_names == ("neg", "pos") and set(d.train_texts) == {"na\u00efve .", "fine ."}
    assert d.notes == (f"{d.name}: 1 file (rt-polarity.neg) read as Latin-1, not being UTF-8.",)


def test_whole_numbers_as_labels_are_in_order_of_their_value(tmp_path):
    d = load(write_jsonl(tmp_path / "stars.jsonl", [(f"t{n}", [10, 2.0, 9][n % 3]) for n in range(30)]))
    assert d.class_names == ("2", "9", "10")


def test_texts_without_a_word_are_counted(tmp_path):
    d = load(write_csv(tmp_path / "x.csv", [("", "a"), ("   ", "b"), *(("w", "ab"[n % 2]) for n in range(20))]))
    assert d.notes == ("x: 2 texts have no word.",)
    assert (d.train_images[:, 0] != 0).all() and (d.test_images[:, 0] != 0).all()


def test_length_and_vocabulary_can_be_set(tmp_path):
    path = FORMS["csv"](tmp_path)
    d = load(path, text_length=3, vocabulary_size=6, min_count=2)
    assert d.image_shape == (3,) and len(d.tokenizer.words) == 6
    assert d.train_texts.tolist() == load(path).train_texts.tolist()  # whole
    words = build_words(["good bad"])
    assert load(path, vocabulary=words).tokenizer is words
    (tmp_path / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "text", "good", "bad")))
    rows = load(path, vocabulary=tmp_path / "vocab.txt", text_length=9).train_images
    assert rows.shape[1] == 9 and (rows[:, 0] == 2).all() and (rows == 3).any(1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(text_length=0), "load needs text_length as a whole number of at least 1, got 0. Leave it out"),
        (dict(text_length=True), "got True"),
        (dict(vocabulary_size=2), "vocabulary_size as a whole number of at least 3, got 2"),
        (dict(min_count=1.5), "min_count as a whole number"),
        (dict(vocabulary="vocab.txt", vocabulary_size=9), "only where the training texts make the vocabulary, got them beside 'vocab.txt'"),
        (dict(image_size=32), "load needs images for image_size, got texts in"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(tmp_path, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(FORMS["csv"](tmp_path), **settings)


def test_images_take_no_settings_of_texts(tmp_path):
    with pytest.raises(ValueError, match="load needs texts for text_length and vocabulary, got 'digits'. Leave these out"):
        load("digits", text_length=5)
    images, labels = np.zeros([9, 4, 4], np.uint8), np.arange(9) % 2
    with pytest.raises(ValueError, match="load needs texts for text_length and vocabulary, got images in"):
        load(write_npz(tmp_path / "x.npz", images=images, labels=labels), text_length=5)


BAD = {
    "no header": ("x.csv", "3,good\n", "needs a text in every row .*named text or .*columns 3, good .separated by commas, in UTF-8.. Rename"),
    "empty": ("x.csv", "", "got an empty file"),
    "no label": ("x.csv", "text,stars\na,1\n", "needs a label in every row"),
    "short row": ("x.csv", "text,label\na,1\nb\n", "needs 2 columns in every row of .*got 1 in row 2. Put texts with commas"),
    "long row": ("x.csv", "text,label\na, b,1\n", "got 3 in row 1"),
    "empty label": ("x.csv", "text,label\na,1\nb, \n", r"a label .*got none in 1 row \(2\) \(''\). Drop the rows without one .row 1 has the first"),
    "no labels": ("x.csv", "text,label\na,1\nb, \nc,nan\nd,NaN\ne,2\n", r"got none in 3 rows \(2, 3, 4\) \('', 'NaN', 'nan'\)"),
    "header only": ("x.csv", "text,label\n", "needs training texts in x, got none"),
    "one class": ("x.csv", "text,label\na,1\nb,1\n", "at least 2 classes of x, got 1"),
    "a class of the test set": ("x.csv", "text,label,split\na,1,train\nb,0,train\nc,2,test\n", "got '2', of which there is no training"),
    "no object": ("x.jsonl", '{"text": "a", "label": 1}\n[1]\n', r"needs one JSON object a line .*got '\[1\]' in line 2. Write json.dumps"),
    "no json": ("x.jsonl", "text\n", "got 'text"),
    "no key": ("x.jsonl", '{"label": 1}\n', "got the keys label in line 1. Rename the one that holds it to 'text'"),
    "null": ("x.jsonl", '{"text": null, "label": 1}\n', "needs text in every row of .*, got None in row 1"),
    "a fraction": ("x.jsonl", '{"text": "a", "label": 0.5}\n', "got 0.5 in row 1. Cut numbers into classes"),
    "not a number": ("x.jsonl", '{"text": "a", "label": NaN}\n{"text": "a", "label": null}\n', r"got none in 2 rows \(1, 2\)"),
    "several": ("x.jsonl", '{"text": "a", "label": ["x", "y"]}\n', r"got \['x', 'y'\] in row 1. Several classes a sample is not what"),
    "nothing": ("x.jsonl", "\n\n", "needs training texts in x, got none"),
}  # fmt: skip


ONE_CLASS = {
    "case": (["good", "Good", "bad"], r"needs one way of writing each class of x, got 'good' \(4 texts, .* row 1\) and 'Good' \(4 texts, .* row 2\)"),
    "a number": (["1", "0", "1.0"], r"got '1' \(4 texts, the first in row 1\) and '1.0' \(4 texts, the first in row 3\). Write one of them"),
    "spaces": (["very good", "very  good", "bad"], "got 'very good' .* and 'very  good'"),
    "two pairs": (["A", "a", "b", "B"], "'A' .* and 'a' .*; 'b' .* and 'B'"),
}  # fmt: skip


@pytest.mark.parametrize(("names", "message"), ONE_CLASS.values(), ids=ONE_CLASS)
def test_labels_that_seem_to_be_one_class_are_named(tmp_path, names, message):
    rows = [(f"text {n}", names[n % len(names)]) for n in range(4 * len(names))]
    with pytest.raises(ValueError, match=message):
        load(write_csv(tmp_path / "x.csv", rows))
    parted = [
        (*row, "train" if n % len(names) != 1 else "test") for n, row in enumerate(rows)
    ]  # one of them in the test set only
    with pytest.raises(ValueError, match="one way of writing each class of x, got"):
        load(write_jsonl(tmp_path / "x.jsonl", parted))


def test_rare_classes_that_may_be_missing_labels_are_noted(tmp_path):
    usual = [(f"text {n}", ("good", "bad", "none")[n % 3]) for n in range(60)]  # "none" is as common as the others: a class
    d = load(write_csv(tmp_path / "x.csv", [*usual, *[("so so", "NA")] * 2, ("what", "null")]))
    assert {"bad", "good", "none", "NA", "null"} == set(d.class_names)
    note = "x: 'NA' (2 texts) and 'null' (1 text) stand as classes. Drop those rows if they say that there is no label."
    assert note in d.notes and load(write_csv(tmp_path / "y.csv", usual)).notes == ()


def test_files_of_one_class_under_two_names_are_named(tmp_path):
    (tmp_path / "pos.txt").write_text("fine\n" * 4)
    (tmp_path / "Pos.txt").write_text("good\n" * 4)
    (tmp_path / "neg.txt").write_text("bad\n" * 4)
    with pytest.raises(ValueError, match=r"got 'Pos' \(4 texts\) and 'pos' \(4 texts\). Write"):
        load(tmp_path)


def test_composed_and_decomposed_labels_are_one_class(tmp_path):
    rows = [(f"text {n}", ["caf\u00e9", "cafe\u0301", " bar "][n % 3]) for n in range(30)]
    d = load(write_csv(tmp_path / "x.csv", rows))
    assert d.class_names == ("bar", "caf\u00e9") and sorted(np.bincount([*d.train_labels, *d.test_labels])) == [10, 20]
    assert d.notes == ("x: labels that only differ in how their accents are stored are one class (caf\u00e9).",)


ROWS = [(f'{"je l’ai vu" if n % 2 else "bon"}, été ; n° {n} "x"', ["non", "oui"][n % 2]) for n in range(40)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_and_encodings_are_found(tmp_path, delimiter, encoding):
    with open(tmp_path / "x.csv", "w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([("Label", "Text"), *((label, text) for text, label in ROWS)])
    d = load(tmp_path / "x.csv")
    assert texts_of(d) == dict(ROWS)
    named = {",": (), ";": ("semicolons",), "\t": ("tabs",), "|": ("bars",)}[delimiter]
    read = () if encoding.startswith("utf-8") else (f"x.csv: read as {encoding.upper()}.",)
    assert d.notes == tuple(f"x.csv: columns are separated by {name}." for name in named) + read


def test_a_spreadsheet_may_say_its_delimiter(tmp_path):
    (tmp_path / "x.csv").write_text("sep=^\ntext^label\n" + "".join(f"a, b; {n}^{n % 2}\n" for n in range(20)))
    assert set(texts_of(load(tmp_path / "x.csv"))) == {f"a, b; {n}" for n in range(20)}


def test_a_tsv_may_use_quotes_as_characters_or_around_its_texts(tmp_path):
    lines = [f'"{n} was good , he said\t{n % 2}\n' for n in range(20)] + [f'it was "{n}"\t{n % 2}\n' for n in range(20)]
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "".join(lines))
    d = load(tmp_path)
    assert set(texts_of(d)) == {line.split("\t")[0] for line in lines} and d.notes == ()
    with open(tmp_path / "y.tsv", "w", newline="") as file:
        rows = [(("tab\there", "line\nhere")[n % 2] + f' "{n}"', str(n % 2)) for n in range(20)]
        csv.writer(file, delimiter="\t").writerows([("text", "label"), *rows])
    assert texts_of(load(tmp_path / "y.tsv")) == dict(rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "text;stars\na;1\n",
            r"needs a label in every row of .*got the columns text, stars \(separated by semicolons, in UTF-8\)",
        ),
        ("sentence one\tstars\na\t1\nb\t2\n", r"got the columns sentence one, stars \(separated by tabs, in UTF-8\)"),
        ("text;label\na;1;2\n", "needs 2 columns in every row of .*got 3 in row 1. Put texts with semicolons, quotes"),
    ],
)
def test_errors_name_the_delimiter_and_the_encoding(tmp_path, content, message):
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text(content, encoding="utf-16")
    with pytest.raises(ValueError, match=message.replace("UTF-8", "UTF-16")):
        load(tmp_path / "x.csv")


FOREIGN = {
    "gb18030": "我喜欢这部电影，非常好看",
    "cp1251": "Очень хороший фильм",
    "cp874": "หนังเรื่องนี้สนุกมาก",
    "cp949": "정말 재미있는 영화였다",
    "cp932": "この映画はとても良かった",
    "euc_jp": "この映画はとても良かった",
}


@pytest.mark.parametrize("encoding", FOREIGN)
def test_other_encodings_are_shown_and_never_taken_for_latin(tmp_path, encoding):
    content = "text,label\n" + f"{FOREIGN[encoding]},1\n" * 9
    (tmp_path / "x.csv").write_bytes(content.encode(encoding))
    with pytest.raises(ValueError) as error:
        load(tmp_path / "x.csv")
    assert f"({encoding})" in str(error.value) and FOREIGN[encoding][:8] in str(error.value)
    assert not {"latin", "1252"} & set(str(error.value).replace("cp", " ").split()) and f"read_text({encoding!r})" in str(
        error.value
    )
    for name in ("neg", "pos"):
        (tmp_path / f"{name}.txt").write_bytes((FOREIGN[encoding] + "\n").encode(encoding) * 5)
    (tmp_path / "x.csv").unlink()
    with pytest.raises(ValueError, match=rf"needs text in UTF-8, got .*neg.txt.*\({encoding}\)"):
        load(tmp_path)


def test_chinese_in_utf_16_is_found_without_a_mark(tmp_path):
    """Its characters have zeros in their bytes, too (U+4E00), and a long text has few line breaks."""
    rows = [("一部很好看的电影" * 20 + str(n), "一" if n % 2 else "二") for n in range(20)]
    for encoding in ("utf-16-le", "utf-16-be"):
        with open(tmp_path / "x.csv", "w", encoding=encoding, newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
        assert texts_of(load(tmp_path / "x.csv")) == dict(rows)


def test_one_line_in_another_encoding_is_named(tmp_path):
    lines = ["text,label", *(f"d\u00e9j\u00e0 vu {n},{n % 2}" for n in range(20))]
    content = "\n".join(lines).encode().replace("d\u00e9j\u00e0 vu 7".encode(), "na\u00efve 7".encode("latin-1"))
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"x.csv'. Line 9 may say 'naïve 7,1' \(cp1252\) or .*; all before it is UTF-8. Mend that line"
    ):
        load(tmp_path / "x.csv")


def test_files_by_class_may_be_in_utf_16(tmp_path):
    for name in ("neg", "pos"):
        (tmp_path / f"{name}.txt").write_text(f"{name} été\n" * 5, encoding="utf-16")
    d = load(tmp_path)
    assert set(d.train_texts) == {"neg été", "pos été"}
    assert d.notes == ("neg.txt: read as UTF-16.", "pos.txt: read as UTF-16.")


def test_a_workbook_is_no_csv(tmp_path):
    np.savez(tmp_path / "x", a=np.arange(300))
    (tmp_path / "x.npz").rename(tmp_path / "x.csv")
    with pytest.raises(
        ValueError, match="That is a zip archive or an Excel workbook. Unpack it, or save the sheet as CSV UTF-8"
    ):
        load(tmp_path / "x.csv")


@pytest.mark.parametrize(("file", "content", "message"), BAD.values(), ids=BAD)
def test_files_that_cannot_be_used(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / file)


def test_other_encodings_and_damaged_files_are_named(tmp_path):
    (tmp_path / "x.csv").write_bytes("text,label\nna\u00efve,1\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"needs text in UTF-8, got .*x.csv.*'naïve,1' \(cp1252\) or .*read_text\('cp1252'\), 'utf-8'"
    ):
        load(tmp_path / "x.csv")
    whole = FORMS["jsonl.xz"](tmp_path).read_bytes()
    for damaged in (whole[:-40], b"no xz", whole[:60] + bytes([whole[60] ^ 255]) + whole[61:]):
        (tmp_path / "x.jsonl.xz").write_bytes(damaged)
        with pytest.raises(ValueError, match="needs a whole file, got .*x.jsonl.xz"):
            load(tmp_path / "x.jsonl.xz")
    with pytest.raises(FileNotFoundError, match=re.escape(f"Did you mean load({str(tmp_path / 'x.csv')!r})?")):
        load(tmp_path / "y.csv")
    (tmp_path / "neg.txt").write_text("a")
    (tmp_path / "pos.txt").write_text("\n \n")
    (tmp_path / "x.csv").unlink(), (tmp_path / "x.jsonl.xz").unlink(), (tmp_path / "mine.jsonl.xz").unlink()
    with pytest.raises(ValueError, match="needs a text in every class, got an empty file .*pos.txt"):
        load(tmp_path)


def test_an_npz_of_texts_needs_its_keys(tmp_path):
    with pytest.raises(
        ValueError, match=re.escape("train_text, train_labels, test_text, test_labels; or text, labels, got labels, texts")
    ):
        load(write_npz(tmp_path / "x.npz", texts=np.array(["a"]), labels=np.zeros(1, int)))
    with pytest.raises(ValueError, match=r"one for each of the 40 .*, got 39"):
        load(write_npz(tmp_path / "x.npz", text=np.array(TEXTS), labels=np.array(LABELS[1:])))
    with pytest.raises(ValueError, match=r"labels of x in 0..1, got 7 at position 3 \(1 such labels\)"):
        wrong = np.where(np.arange(40) == 3, 7, LABELS)
        load(write_npz(tmp_path / "x.npz", text=np.array(TEXTS), labels=wrong, class_names=np.array(["neg", "pos"])))


@pytest.fixture
def texts(tmp_path):
    return load(FORMS["npz"](tmp_path))


def test_check_looks_at_tokens(texts):
    changed = lambda **changes: check(dataclasses.replace(texts, **changes))
    assert changed().train_images is not None
    size = len(texts.tokenizer.words)
    rows = texts.train_images
    for tokens, message in (
        (rows.astype(float), r"as integers \[N, L\], since there is a tokenizer, got float64 \[28, 8\]. Write tokenizer.rows"),
        (rows[..., None], r"got int32 \[28, 8, 1\]"),
        (rows + size, f"in 0..{size - 1}, the tokenizer's words, got "),
        (rows - 9, "got -"),
        (
            rows * (np.arange(28) != 5)[:, None],
            r"a word in every row of train_images of mine, got none in row 5 \(1 such rows\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            changed(train_images=tokens)
    with pytest.raises(ValueError, match="needs test_images of mine like the training images"):
        changed(test_images=texts.test_images[:, :3])
    with pytest.raises(ValueError, match="check needs train_texts of mine for each of the 28 rows of tokens, got 27"):
        changed(train_texts=texts.train_texts[1:])
    with pytest.raises(ValueError, match="channel_stats needs images, got mine, which has texts"):
        texts.channel_stats()


def test_views_keep_texts_beside_their_tokens(texts):
    views = [validation(0.25), longtail(2), thin(6), noise("pair", 0.25)]
    d = check(apply_views(texts, views, 3))
    for part in ("train", "test", "validation"):
        rows = getattr(d, part + "_images")
        np.testing.assert_array_equal(rows, d.tokenizer.rows(getattr(d, part + "_texts"), 8))
    assert len(d.train_texts) == len(d.train_labels) == 6 + 5 and len(d.validation_texts) == len(d.validation_labels)
    with pytest.raises(ValueError, match="shrink needs images, got mine, which has texts. Load fewer words: text_length=100"):
        apply_views(texts, [shrink(4)], 0)


def test_leaving_a_domain_out_takes_its_texts_along(texts):
    with_domains = dataclasses.replace(
        texts, train_domains=np.arange(28) % 2, test_domains=np.arange(12) % 2, domain_names=("a", "b")
    )
    d = check(apply_views(check(with_domains), [leave_out("b")], 0))
    for part in ("train", "test", "validation"):
        np.testing.assert_array_equal(getattr(d, part + "_images"), d.tokenizer.rows(getattr(d, part + "_texts"), 8))
    assert len(d.test_texts) == 14 + 6


def test_duplicates_are_dropped(texts):
    twice = dataclasses.replace(
        texts,
        train_images=np.concatenate([texts.train_images, texts.test_images[:2]]),
        train_texts=np.concatenate([texts.train_texts, texts.test_texts[:2]]),
        train_labels=np.concatenate([texts.train_labels, texts.test_labels[:2]]),
        true_labels=None, train_index=None, source_size=None,
    )  # fmt: skip
    d = apply_views(check(twice), [drop_duplicates()], 0)
    assert d.train_texts.tolist() == texts.train_texts.tolist() and "2 training texts that are in the test" in d.notes[-1]


def test_onesided_noise_takes_from_the_second_class_only(texts):
    rng = np.random.default_rng(0)
    many = dataclasses.replace(texts, train_images=np.ones([1000, 8], np.int32), train_texts=None, true_labels=None, train_index=None,
                               train_labels=rng.integers(0, 2, 1000).astype(np.int32), source_size=None)  # fmt: skip
    positive = many.train_labels == 1
    d = apply_views(many, [noise("onesided", 0.2)], 0)
    assert (
        d.flipped.sum() == round(0.2 * positive.sum()) and (d.train_labels[d.flipped] == 0).all() and positive[d.flipped].all()
    )
    assert d.views == ("noise(kind=onesided, rate=0.2) seed=(0, 0)",)
    less = apply_views(many, [noise("onesided", 0.1)], 0)
    assert (d.flipped | ~less.flipped).all()  # nested
    with pytest.raises(ValueError, match="noise needs two classes for kind 'onesided', got 10 in digits"):
        apply_views(load("digits"), [noise("onesided", 0.1)], 0)


@pytest.mark.parametrize("kind", ["symmetric", "onesided"])
def test_the_first_samples_are_flipped_if_asked_for(texts, kind):
    d = apply_views(texts, [noise(kind, 0.25, first=True)], 0)
    can = np.flatnonzero(texts.train_labels == 1) if kind == "onesided" else np.arange(28)
    np.testing.assert_array_equal(np.flatnonzero(d.flipped), can[: round(0.25 * len(can))])
    assert d.views == (f"noise(kind={kind}, rate=0.25, first=True) seed=(0, 0)",)
    again = apply_views(texts, [noise(kind, 0.25, first=True)], 1)
    np.testing.assert_array_equal(again.flipped, d.flipped)


def test_drawn_noise_is_as_before():
    d = apply_views(load("digits"), [noise("symmetric", 0.2)], 0)
    assert d.subset_hash == SYMMETRIC and d.views == ("noise(kind=symmetric, rate=0.2) seed=(0, 0)",)


SYMMETRIC = "2c20383a99c2"


def test_texts_can_be_written_as_the_pack_writes_them(texts, tmp_path):
    text, offsets = pack(texts.train_texts)
    d = load(write_npz(tmp_path / "clean.npz", text=text, text_offsets=offsets, labels=texts.train_labels))
    assert {*d.train_texts, *d.test_texts} == {*texts.train_texts}
    assert unpack("text", text, offsets).tolist() == texts.train_texts.tolist()
