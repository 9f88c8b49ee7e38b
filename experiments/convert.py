"""Published data that no script reads as it is, as .npz files for --data and for the view labels(FILE, KEY).

    python experiments/convert.py mr FOLDER MR.npz                   # rt-polarity.neg and .pos of "sentence polarity dataset v1.0"
    python experiments/convert.py cifar-n CIFAR-10_human.npy CIFAR10N.npz

mr: Pang and Lee, ACL 2005; every tenth sentence, those of number i with i mod 10 = 0, is for testing (`--fold` takes another tenth).
cifar-n: Wei et al., ICLR 2022, labels that people gave the training images of CIFAR-10, from the authors' repository
UCSC-REAL/cifar-10-100n, as a dictionary saved by numpy; keys aggre_label, worse_label, random_label1 to 3 and clean_label.

What comes out is compared with the SHA-256 of what the numbers in docs/results were measured on.
"""

import argparse
import hashlib
import pathlib
import sys

import numpy as np

SUMS = {
    "rt-polarity.neg": "4ace77d558c3714723843f1d65b60c01e3417b208180f0728808d76ad0eeeaca",
    "rt-polarity.pos": "2da124ec187a9d5a29c9f04e91c540e02baed5af8868f550a26bd6fd4dbf8bf0",
    "worse_label": "11a306ed336e3bc81aaac36322ddf12de379d0df1883aa43e10ba562a98f6b2a",  # as uint8
}


def check_sum(what: str, data: bytes) -> None:
    """Raises ValueError for other bytes than those that were measured on."""
    found = hashlib.sha256(data).hexdigest()
    if found != SUMS[what]:
        raise ValueError(f"convert needs {what} with SHA-256 {SUMS[what]}, got {found}. Fetch it again from its authors.")


def mr(folder: pathlib.Path, fold: int = 0) -> dict[str, np.ndarray]:
    """The sentences, negative ones first, as arrays train_text, train_labels, test_text, test_labels, class_names."""
    texts, labels = [], []
    for label, part in enumerate(("neg", "pos")):
        data = (folder / f"rt-polarity.{part}").read_bytes()
        check_sum(f"rt-polarity.{part}", data)
        lines = [line.strip(" \r") for line in data.decode("latin-1").split("\n") if line]
        texts += lines
        labels += [label] * len(lines)
    text, given, out = np.array(texts), np.array(labels, np.int32), np.arange(len(texts)) % 10 == fold
    return {
        "train_text": text[~out], "train_labels": given[~out], "test_text": text[out], "test_labels": given[out],
        "class_names": np.array(["negative", "positive"]),
    }  # fmt: skip


def cifar_n(file: pathlib.Path) -> dict[str, np.ndarray]:
    """The sets of labels, uint8 [50000] each, by the authors' names. Unpickles the file: take it from its authors only."""
    found = np.load(file, allow_pickle=True).item()
    labels = {key: np.asarray(value).astype(np.uint8) for key, value in found.items()}
    check_sum("worse_label", labels["worse_label"].tobytes())
    return labels


def main(argv: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("mr", "cifar-n"))
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--fold", type=int, choices=range(10), default=0)
    asked = parser.parse_args(argv)
    np.savez(asked.out, **(mr(asked.source, asked.fold) if asked.what == "mr" else cifar_n(asked.source)))
    print(f"Wrote {asked.out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
