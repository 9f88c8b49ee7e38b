"""Texts on two cores: movie reviews (MR, fold 0: 9,595 training and 1,067 test sentences), BiLSTM with attention, without word vectors.

    python ../shared/data/load.py to-npz mr MR.npz
    python experiments/compare.py --config small_text --data MR.npz
    python experiments/compare.py --config small_text --data MR.npz --view "noise(onesided, 0.1)"
    python experiments/compare.py --config small_text --data MR.npz --vectors glove.6B.300d.txt
    python experiments/compare.py --config small_text --smoke                           # the same code on digits, seconds

A protocol of this project (see small_longtail). The taxonomy paper's own is on IMDB, 200 words, with GloVe vectors.
"""


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
        methods="ce, ls, bootstrap",
        seeds=3,
        smoke=dict(
            data="digits",
            view="noise(symmetric, 0.2)",
            model="mlp",
            epochs=2,
            batch_size=32,
            seeds=2,
            cost_rounds=2,
            learning_rate=0.01,
        ),
    )
