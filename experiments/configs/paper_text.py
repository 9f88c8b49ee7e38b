"""Noisy labels of texts as the taxonomy paper trains: IMDB, BiLSTM with attention and 300-dimensional GloVe vectors, 6 epochs.

    python experiments/compare.py --config paper_text --data IMDB.npz --vectors glove.6B.300d.txt
    python experiments/compare.py --config paper_text --data IMDB.npz --vectors glove.6B.300d.txt --view "noise(onesided, 0.1)"
    python experiments/compare.py --config paper_text --data IMDB.npz --model bert-base --learning-rate 2e-5 \\
        --weights model.safetensors --vocabulary vocab.txt
    python experiments/compare.py --config paper_text --smoke                               # the same code on 64 made-up sentences

For a GPU. The paper flips the first 10 %: noise(symmetric, 0.1, first=true); ours are drawn.
"""

import pathlib


def config():
    """The settings, as flags of compare.py."""
    return dict(
        data="IMDB.npz",
        view="noise(symmetric, 0.1)",
        model="bilstm",
        text_length=200,
        epochs=6,
        batch_size=64,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=0.01,
        schedule="constant",
        warmup_epochs=0.0,
        methods="ce, ls, mbls, logpert(weight=0.75), mixpert(eps1=0.1, eps2=0.01)",
        seeds=3,
        smoke=dict(
            data=TINY, view="noise(symmetric, 0.2)", width=4, text_length=8, epochs=2, batch_size=8, seeds=1, cost_rounds=2,
            learning_rate=0.01,
        ),
    )  # fmt: skip


TINY = str(pathlib.Path(__file__).with_name("tiny_texts.csv"))
