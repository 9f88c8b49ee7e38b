"""Texts on two cores: movie reviews (MR, fold 0: 9,595 training and 1,067 test sentences), BiLSTM with attention, without word vectors.

    python experiments/convert.py mr rt-polaritydata/ MR.npz        # of the authors' two files
    python experiments/compare.py --config small_text --data MR.npz
    python experiments/compare.py --config small_text --data MR.npz --view "noise(onesided, 0.1)"
    python experiments/compare.py --config small_text --data MR.npz --vectors glove.6B.300d.txt
    python experiments/compare.py --config small_text --smoke                           # the same code on 64 made-up sentences

A protocol of this project (see small_longtail). The taxonomy paper's own is on IMDB, 200 words, with GloVe vectors.
"""

import pathlib


def config():
    """The settings, as flags of compare.py."""
    return dict(
        data="MR.npz",
        view="noise(symmetric, 0.1)",
        model="bilstm",
        epochs=6,
        batch_size=64,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=0.01,
        schedule="constant",
        warmup_epochs=0.0,
        methods="ce, ls, bootstrap, logpert(weight=0.75), mixpert(eps1=0.1, eps2=0.01)",
        seeds=3,
        smoke=dict(
            data=TINY, view="noise(symmetric, 0.2)", width=4, text_length=8, epochs=2, batch_size=8, seeds=2, cost_rounds=2,
            learning_rate=0.01,
        ),
    )  # fmt: skip


TINY = str(pathlib.Path(__file__).with_name("tiny_texts.csv"))
