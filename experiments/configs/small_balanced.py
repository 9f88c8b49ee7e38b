"""Balanced data on two cores: 1,000 images a class of CIFAR-10, averaged down to 16x16, ResNet-8; whole test set.

    python experiments/compare.py --config small_balanced --data CIFAR10.npz
    python experiments/compare.py --config small_balanced --smoke                       # the same code on digits, seconds

A protocol of this project (see small_longtail).
"""


def config():
    """The settings, as flags of compare.py."""
    return dict(
        data="CIFAR10.npz",
        view="thin(1000)+shrink(16)",
        model="resnet8",
        epochs=30,
        batch_size=128,
        learning_rate=0.1,
        weight_decay=5e-4,
        warmup_epochs=1.0,
        augment=True,
        test_every=5,
        methods="ce, ls, mixup, isda, lpl(bound=0.3, step_size=0.03), lpg, lpa, sam",
        seeds=3,
        smoke=dict(data="digits", view="thin(20)", model="mlp", epochs=2, batch_size=32, augment=False, seeds=2, cost_rounds=2),
    )
