"""Wrong labels on two cores: small_balanced's 10,000 images with 40 % symmetric noise (true class excluded).

    python experiments/compare.py --config small_noise --data CIFAR10.npz
    python experiments/compare.py --config small_noise --data CIFAR10.npz --view "thin(1000)+shrink(16)+noise(pair, 0.3)"
    python experiments/compare.py --config small_noise --data CIFAR10.npz \\
        --view "labels(CIFAR10N.npz, worse_label)+thin(1000)+shrink(16)"     # people's mistakes: CIFAR-N's worst labels
    python experiments/compare.py --config small_noise --smoke                          # the same code on digits, seconds

CIFAR10N.npz: experiments/convert.py makes it of the authors' file.

A protocol of this project (see small_longtail). The test labels are the true ones.
"""


def config():
    """The settings, as flags of compare.py."""
    return dict(
        data="CIFAR10.npz",
        view="thin(1000)+shrink(16)+noise(symmetric, 0.4)",
        model="resnet8",
        epochs=30,
        batch_size=128,
        learning_rate=0.1,
        weight_decay=5e-4,
        warmup_epochs=1.0,
        augment=True,
        test_every=5,
        methods="ce, ls, bootstrap, gce, sce, ols, mbls(margin=5), proselflc, logpert(weight=0.175), mixpert",
        seeds=3,
        smoke=dict(
            data="digits",
            view="noise(symmetric, 0.2)",
            model="mlp",
            epochs=2,
            batch_size=32,
            augment=False,
            seeds=2,
            cost_rounds=2,
        ),
    )
