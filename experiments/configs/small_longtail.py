"""Long tail on two cores: CIFAR-10-LT at ratio 100 (12,406 images), averaged down to 16x16, ResNet-8; whole test set.

    python experiments/compare.py --config small_longtail --data CIFAR10.npz            # 6 methods x 3 seeds
    python experiments/compare.py --config small_longtail --data CIFAR10.npz --methods "ce, la+lpl" --seeds 5
    python experiments/compare.py --config small_longtail --smoke                       # the same code on digits, seconds

A protocol of this project, small enough for a laptop: it says which method helps by how much at this scale, and its numbers are
not to be laid beside the papers' (ResNet-32 at 32x32, 200 epochs). A run of plain training takes about a minute and a half.
"""


def config():
    """The settings, as flags of compare.py."""
    return dict(
        data="CIFAR10.npz",
        view="longtail(100)+shrink(16)",
        model="resnet8",
        epochs=30,
        batch_size=128,
        learning_rate=0.1,
        weight_decay=5e-4,
        warmup_epochs=1.0,
        augment=True,
        test_every=5,
        methods="ce, la, lpl(split=frequency, bound=varied_by_frequency(0, 2.5)), lpg(split=frequency), lpa(split=frequency), sam",
        seeds=3,
        smoke=SMOKE,
    )


SMOKE = dict(data="digits", view="longtail(10)", model="mlp", epochs=2, batch_size=32, augment=False, seeds=2, cost_rounds=2)
