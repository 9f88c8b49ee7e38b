"""The papers' long tail with LDAM's recipe: CIFAR-10-LT at ratio 100, ResNet-32, 200 epochs, on 32x32.

    python experiments/compare.py --config paper_longtail --data cifar10                    # ratio 100
    python experiments/compare.py --config paper_longtail --data cifar10 --view "longtail(10)"
    python experiments/compare.py --config paper_longtail --data cifar100
    python experiments/compare.py --config paper_longtail --data cifar10 --methods "ce, ldam, ldam(drw=true)"   # cosine classifier
    python experiments/compare.py --config paper_longtail --smoke                           # the same code on digits, seconds

Of `ce, ldam` the classifier is a part of the difference, as in LDAM's code: plain cross entropy has a linear one, LDAM a cosine one
without bias. --head cosine gives all of them the same (ISDA needs a linear one).

For a GPU. LPL's own rates are lower and its training six times as long: paper_longtail_lpl.
"""


def config():
    """The settings, as flags of compare.py."""
    return dict(
        data="cifar10",
        view="longtail(100)",
        model="resnet32",
        recipe="ldam",
        methods="ce, la, isda, lpl(split=frequency, bound=1.5), lpl(split=frequency, bound=varied_by_frequency(0, 2.5)), "
        "la+lpl(split=frequency, bound=varied_by_frequency(0, 2.5)), lpg(split=frequency), lpa(split=frequency), sam",
        seeds=3,
        smoke=dict(
            data="digits", view="longtail(10)", model="mlp", epochs=2, batch_size=32, augment=False, seeds=1, cost_rounds=2
        ),
    )
