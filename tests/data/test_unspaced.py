"""perturbjax.data.unspaced: texts in scripts without spaces between words, from the characters to a net that learns them."""

import csv

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perturbjax.data import load, unspaced
from perturbjax.data.text import CHINESE, Words, build_words

LETTERS = {
    "zh": ("好 棒 喜 欢 美 赞 妙 佳", "差 坏 烂 糟 丑 恶 劣 臭", "我 看 了 这 部 电 影 觉 得 很 他 她 们 都 说 的"),
    "ja": ("楽 し い 素 晴 良", "悪 つ ま ら な 駄", "こ の 映 画 は と て も で す ア ニ メ ー"),
    "th": ("ดี สวย เก่ง", "แย่ เลว ร้าย", "หนัง เรื่อง นี้ ฉัน ดู แล้ว คิด ว่า มัน"),
}


def write(path, language, count=120, between=""):
    """Texts of one class or the other, of which only single characters tell; hardly any text comes twice."""
    rng = np.random.default_rng(0)
    words = [part.split() for part in LETTERS[language]]
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for n in range(count):
            text = [*rng.choice(words[2], 8), *rng.choice(words[n % 2], 3)]
            rows.writerow([between.join(rng.permutation(text)), ["good", "bad"][n % 2]])
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("我喜欢 DVD，很好。", "我 喜 欢 DVD ， 很 好 。"),
        ("iPhone13很好用!", "iPhone13 很 好 用 !"),
        ("「ラーメン」を食べた", "「 ラ ー メ ン 」 を 食 べ た"),
        ("ﾃﾚﾋﾞ", "ﾃ ﾚ ﾋ ﾞ"),
        ("หนังดี ok", "ห นั ง ดี ok"),
        ("ပြည်", "ပြ ည်"),
        ("बहुत अच्छा, 정말 좋다", "बहुत अच्छा, 정말 좋다"),  # Hindi and Korean have spaces
        ("don't “stop” – café 😀😀", "don't “stop” – café 😀😀"),
    ],
)
def test_characters_of_scripts_without_spaces_are_words_and_all_else_is_as_it_was(text, words):
    assert unspaced.cut(text) == words.split(" ")


@given(st.text())
def test_nothing_is_lost(text):
    cut = unspaced.cut(text)
    assert "".join(cut) == "".join(text.split()) and all(cut)
    if not unspaced.LETTER.search(text) and not any("\u0e00" <= char for char in text):
        assert cut == text.split()


def test_the_chinese_characters_of_bert_are_among_them():
    for low, high in CHINESE:
        for code in {low, (low + high) // 2, high}:
            assert unspaced.cut(f"a{chr(code)}b") == ["a", chr(code), "b"]


def test_a_vocabulary_of_characters_is_made_where_texts_have_no_spaces():
    words = build_words(["很好看", "不好看", "DVD 好"])
    assert words.characters and words.words == ("<pad>", "<unk>", "好", "看", "dvd", "不", "很")
    assert words.numbers("DVD很差") == [4, 6, 1] and words.text(words.rows(["不好"])[0]) == "不 好"
    spaced = build_words(["我 喜欢 电影", "我 不 喜欢 电影"])  # somebody has cut them into words
    assert not spaced.characters and "电影" in spaced.words
    assert build_words(["我 喜欢 电影", "我 不 喜欢 电影"], characters=True).words[2:] == ("喜", "影", "我", "欢", "电", "不")
    assert build_words(["很好看"], characters=False).words == ("<pad>", "<unk>", "很好看")
    assert not build_words(["a good film", "naïve café"]).characters and not Words(("<pad>", "<unk>")).characters


def test_words_are_the_same_composed_or_not():
    words = build_words(["caf\u00e9"])
    assert words.numbers("Cafe\u0301") == words.numbers("caf\u00e9") == [2]


@pytest.mark.parametrize("language", LETTERS)
def test_their_texts_share_words_with_a_note(tmp_path, language):
    d = load(write(tmp_path / "x.csv", language))
    assert d.tokenizer.characters and d.image_shape[0] >= 11
    assert (d.test_images == d.tokenizer.unknown).sum() == 0  # as one word each, all of the test texts would be unknown
    assert d.notes == (
        "x: 84 of 84 training texts have letters of a script that puts no spaces between words; each of its characters is a word. "
        "For longer words put spaces between them, or give a BERT's vocab.txt (--vocabulary).",
    )


def test_spaces_that_are_there_are_kept_and_either_can_be_asked_for(tmp_path):
    joined, apart = write(tmp_path / "x.csv", "th"), write(tmp_path / "y.csv", "th", between=" ")
    d = load(apart)
    assert not d.tokenizer.characters and "เรื่อง" in d.tokenizer.words and d.image_shape == (11,)
    assert d.notes[0].startswith(
        "y: 84 of 84 training texts have letters of a script that puts no spaces between words; what stands"
    )
    forced = load(apart, vocabulary="characters", vocabulary_size=9)
    assert forced.tokenizer.characters and len(forced.tokenizer.words) == 9
    whole = load(joined, vocabulary="spaces")
    assert whole.image_shape == (1,) and (whole.test_images == 1).mean() > 0.9
    assert "of the test texts' words are unknown: they are in no training text" in whole.notes[-1]


def test_a_vocabulary_of_another_language_is_noted(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "film", "good", "bad")))
    d = load(write(tmp_path / "x.csv", "th"), vocabulary=tmp_path / "vocab.txt")
    assert d.notes == (
        "x: 100% of the test texts' words are unknown: the vocabulary has no pieces for them. Take one of the texts' language.",
    )


def test_texts_that_are_cut_are_noted_unless_their_length_was_asked_for(tmp_path):
    with open(tmp_path / "x.csv", "w") as file:
        file.writelines(["text,label\n", *(f"{'word ' * (30 * n)},{n % 2}\n" for n in range(1, 11))])
    d = load(tmp_path / "x.csv")
    long = sum(len(text.split()) > 200 for text in d.train_texts)
    assert long and d.notes == (
        f"x: {long} of 6 training texts are longer than 200 words, and cut there. --text-length reads more of them.",
    )
    assert load(tmp_path / "x.csv", text_length=50).notes == ()
