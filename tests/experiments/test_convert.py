"""Published data becomes the .npz that the numbers were measured on, or an error that names the checksum."""

import hashlib
import pathlib

import numpy as np
import pytest

from experiments import convert
from perturbjax.data import load

DATA = pathlib.Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def sentences(tmp_path, monkeypatch):
    for part, lines in (("neg", [f"bad \xe9 {i} \n" for i in range(15)]), ("pos", [f"good {i}\r\n" for i in range(8)])):
        data = "".join(lines).encode("latin-1")
        (tmp_path / f"rt-polarity.{part}").write_bytes(data)
        monkeypatch.setitem(convert.SUMS, f"rt-polarity.{part}", hashlib.sha256(data).hexdigest())
    return tmp_path


def test_sentences_are_read_and_every_tenth_is_for_testing(sentences, capsys):
    convert.main(["mr", str(sentences), str(sentences / "MR.npz")])
    d = load(str(sentences / "MR.npz"))
    assert list(d.test_texts) == ["bad \xe9 0", "bad \xe9 10", "good 5"] and d.test_labels.tolist() == [0, 0, 1]
    assert len(d.train_labels) == 20 and tuple(d.class_names) == ("negative", "positive")
    convert.main(["mr", str(sentences), str(sentences / "other.npz"), "--fold", "3"])
    assert list(load(str(sentences / "other.npz")).test_texts) == ["bad \xe9 3", "bad \xe9 13", "good 8"][:2]


def test_other_bytes_are_refused(tmp_path):
    for part in ("neg", "pos"):
        (tmp_path / f"rt-polarity.{part}").write_bytes(b"something else\n")
    with pytest.raises(ValueError, match=r"convert needs rt-polarity.neg with SHA-256 4ace77.*, got .*Fetch it again"):
        convert.mr(tmp_path)
    np.save(tmp_path / "human.npy", {"worse_label": np.zeros(5, np.int64)})
    with pytest.raises(ValueError, match="convert needs worse_label with SHA-256 11a306"):
        convert.cifar_n(tmp_path / "human.npy")


def test_people_s_labels(tmp_path, monkeypatch):
    given = {"worse_label": np.array([3, 1, 2]), "clean_label": np.array([3, 1, 1])}
    monkeypatch.setitem(convert.SUMS, "worse_label", hashlib.sha256(bytes([3, 1, 2])).hexdigest())
    np.save(tmp_path / "human.npy", given)
    convert.main(["cifar-n", str(tmp_path / "human.npy"), str(tmp_path / "out.npz")])
    found = np.load(tmp_path / "out.npz")
    assert set(found) == set(given) and all((found[key] == given[key]).all() and found[key].dtype == np.uint8 for key in given)


def test_the_published_sentences(tmp_path):
    if not (DATA / "mr").is_dir():
        pytest.skip("no data pack beside the repository")
    found = convert.mr(DATA / "mr")
    assert found["train_text"].shape == (9595,) and found["test_text"].shape == (1067,)
    assert np.bincount(found["train_labels"]).tolist() == [4797, 4798]
