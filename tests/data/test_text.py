"""perturbjax.data.text: words, word pieces against the published rules, word vectors, texts as arrays."""

import gzip
import lzma
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perturbjax.data.text import build_words, pack, read_pieces, read_vectors, unpack, vector_size

PIECES = "[PAD] [unused0] [UNK] [CLS] [SEP] want ##want ##ed wa un runn ##ing , low ##er new ##est ! ' $ 中 文 naive cafe . # ##s".split()


@pytest.fixture
def vocab(tmp_path):
    def write(words=tuple(PIECES), end="\n"):
        path = tmp_path / "vocab.txt"
        path.write_bytes((end.join(words) + end).encode())
        return path

    return write


def test_words_are_numbered_by_how_often_they_occur_then_by_spelling():
    words = build_words(["b b c a", "A c B", "z"])
    assert words.words == ("<pad>", "<unk>", "b", "a", "c", "z") and words.lower
    assert words.numbers("B  z\tq\n") == [2, 5, 1]
    assert build_words(["b b c a", "A c B", "z"], size=4).words == ("<pad>", "<unk>", "b", "a")
    assert build_words(["b b c a", "A c B", "z"], min_count=2).words == ("<pad>", "<unk>", "b", "a", "c")


def test_rows_are_cut_and_filled_up():
    words = build_words(["a b c d"])
    texts = ["a b c d", "b", "", " \n", "d q"]
    np.testing.assert_array_equal(words.rows(texts), [[2, 3, 4, 5], [3, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [5, 1, 0, 0]])
    np.testing.assert_array_equal(words.rows(texts, 2), [[2, 3], [3, 0], [1, 0], [1, 0], [5, 1]])
    assert words.rows(texts).dtype == np.int32 and words.rows(texts, 7).shape == (5, 7)
    assert words.rows(["a " * 500]).shape == (1, 200)  # at most 200 words, if nothing is said
    assert [words.text(row) for row in words.rows(texts, 3)] == ["a b c", "b", "<unk>", "<unk>", "d <unk>"]


def test_a_word_spelled_like_the_padding_is_unknown():
    words = build_words(["<pad> <unk> a <pad>"])
    assert words.words == ("<pad>", "<unk>", "a")
    assert words.numbers("a <pad> <unk>") == [2, 1, 1]


@given(st.lists(st.text(max_size=30), min_size=1, max_size=5))
def test_no_row_is_all_padding(texts):
    assert (build_words(texts).rows(texts)[:, 0] != 0).all()


@pytest.mark.parametrize("settings", [dict(size=2), dict(min_count=0)])
def test_a_vocabulary_needs_room(settings):
    with pytest.raises(ValueError, match=r"build_words needs size >= 3 .*Write size=25000, min_count=1"):
        build_words(["a"], **settings)


def test_word_pieces_of_the_paper_and_of_its_code(vocab):
    pieces = read_pieces(vocab())
    cut = lambda text: [PIECES[n] for n in pieces.numbers(text)]
    assert pieces.lower
    # tokenization_test.py of google-research/bert
    assert cut("UNwant\u00e9d,running") == ["un", "##want", "##ed", ",", "runn", "##ing"]
    assert cut("unwantedX running") == ["[UNK]", "runn", "##ing"]
    assert cut("") == []
    # its basic tokenizer: accents, Chinese characters, control characters, marks of ASCII that Unicode has for symbols
    assert cut(" \tNa\u00efve  caf\u00e9 ! \n ") == ["naive", "cafe", "!"]
    assert cut("new中文est") == ["new", "中", "文", "[UNK]"]
    assert cut("low\x00er\ufffd\u200b new\u00a0new\u3000new") == ["low", "##er", "new", "new", "new"]
    assert cut("$new'") == ["$", "new", "'"]
    assert cut("want" * 25) == ["want"] + ["##want"] * 24 and cut("want" * 26) == ["[UNK]"]  # 100 characters, 104


def test_rows_of_word_pieces_have_their_frame(vocab):
    pieces = read_pieces(vocab())
    rows = pieces.rows(["new low .", "", "new new new new", "[SEP] [PAD]"], 5)
    named = [[PIECES[n] for n in row] for row in rows]
    assert named[0] == ["[CLS]", "new", "low", ".", "[SEP]"]
    assert named[1] == ["[CLS]", "[SEP]", "[PAD]", "[PAD]", "[PAD]"]
    assert named[2] == ["[CLS]", "new", "new", "new", "[SEP]"]
    assert named[3] == ["[CLS]", "[UNK]", "[UNK]", "[UNK]", "[SEP]"]  # a text's own "[SEP]" is text: [, sep, ]
    assert pieces.rows(["new low", "new"]).shape == (2, 4)
    assert pieces.rows(["new low"], 1).tolist() == [[PIECES.index("[CLS]")]]


def test_pieces_with_capitals_keep_the_case(vocab):
    cased = read_pieces(vocab(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "New", "new", "caf\u00e9"]))
    assert not cased.lower and cased.numbers("New new cafe\u0301 NEW") == [4, 5, 6, 1]
    assert read_pieces(vocab(end="\r\n")).words == tuple(PIECES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["[UNK]", "[PAD]", "[CLS]", "[SEP]"], "[PAD] in the first and [UNK], [CLS], [SEP] somewhere, got '[UNK]' there in"),
        (["[PAD]", "a"], "got none of [UNK], [CLS], [SEP] in 'vocab.txt' (2 lines)"),
        ([*PIECES, "new"], "needs every piece once, got 'new' twice"),
    ],
)
def test_files_that_are_no_vocabulary(vocab, words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_pieces(vocab(words))


def test_a_vocabulary_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="needs a vocab.txt, got '.*nothing.txt', where there is no file"):
        read_pieces(tmp_path / "nothing.txt")
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="read_pieces needs text in UTF-8, got 'x.txt'"):
        read_pieces(tmp_path / "x.txt")


def test_word_pieces_are_those_of_transformers(vocab):
    transformers = pytest.importorskip("transformers")
    ours, theirs = read_pieces(vocab()), transformers.BertTokenizer(vocab())
    texts = ["UNwant\u00e9d, running! New-low \u00a3 $ ' . # \u4e2d", "  ", "Low ers\u00adnew\u2028new", "\u00c5lower want's"]
    for text in texts:
        assert ours.rows([text], 30)[0].tolist() == theirs(text, padding="max_length", max_length=30)["input_ids"]


@pytest.mark.parametrize(("suffix", "opener"), [(".txt", open), (".txt.gz", gzip.open), (".txt.xz", lzma.open)])
def test_vectors_of_the_words_that_have_one(tmp_path, suffix, opener):
    path = tmp_path / f"glove{suffix}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("the 0.5 -1 2e-1\ncaf\u00e9 1 2 3\n. . . 7 7 7\nnone 9 9 9\n")
    vectors, found = read_vectors(path, ["<pad>", "caf\u00e9", "the", ".", "q"])
    np.testing.assert_array_equal(vectors, np.array([[0] * 3, [1, 2, 3], [0.5, -1, 0.2], [0] * 3, [0] * 3], np.float32))
    np.testing.assert_array_equal(found, [False, True, True, False, False])  # ". . ." is another word than "."
    assert vectors.dtype == np.float32 and vector_size(path) == 3


def test_a_first_line_with_the_sizes_is_skipped(tmp_path):
    path = tmp_path / "w2v.txt"
    path.write_text("3 2\r\nthe 1 2\r\n3 5 6 \r\n")
    np.testing.assert_array_equal(read_vectors(path, ["3", "the"])[0], [[5, 6], [1, 2]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("the a b\n", "needs a word and its numbers between single spaces in every line (GloVe's form), got 'the a b'"),
        ("", "(GloVe's form), got ''"),
        ("the 1 2\na 1\n", "needs 2 numbers after the word in every line, got 'a 1' in line 2 of 'v.txt'"),
        ("the 1 2\na 1 x\n", "got 'a 1 x' in line 2"),
        ("the 1 2\na 1 nan\n", "needs finite numbers, got 'a 1 nan' in line 2"),
        ("dog 1 2\n", "needs vectors of some of the 2 words, got none in 'v.txt'"),
    ],
)
def test_files_that_hold_no_vectors(tmp_path, content, message):
    (tmp_path / "v.txt").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_vectors(tmp_path / "v.txt", ["the", "a"])
    with pytest.raises(FileNotFoundError, match="needs a file of word vectors"):
        read_vectors(tmp_path / "w.txt", ["the"])


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=6))
def test_packed_texts_come_back(texts):
    assert unpack("text", *pack(texts)).tolist() == texts


BYTES, OFFSETS = pack(["ab", "\u00e9"])


@pytest.mark.parametrize(
    ("values", "offsets", "message"),
    [
        (BYTES, None, "needs text_offsets as N + 1 integers that rise from 0 to the 4 bytes of text, got none"),
        (BYTES, OFFSETS[1:], "got int64 [2]. Write np.cumsum"),
        (BYTES, OFFSETS[::-1], "that rise from 0"),
        (BYTES, OFFSETS * 1.0, "got float64 [3]"),
        (BYTES, np.array([0, 3, 4]), "needs text in UTF-8"),
        (np.zeros([2, 2], np.uint8), None, "needs text as strings [N], or as UTF-8 bytes with text_offsets, got uint8 [2, 2]"),
        (np.zeros(3), None, "got float64 [3]. Write text=np.array(texts)"),
    ],
)
def test_arrays_that_are_no_texts(values, offsets, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        unpack("text", values, offsets)
