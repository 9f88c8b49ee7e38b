"""Noisy labels as the LPG paper has them: CIFAR-10, ResNet-32, 20, 50 and 80 % symmetric noise.

    python experiments/compare.py --config paper_lpg_noise --data cifar10                                   # 50 %
    python experiments/compare.py --config paper_lpg_noise --data cifar10 --view "noise(symmetric, 0.2)"
    python experiments/compare.py --config paper_lpg_noise --data cifar10 --view "noise(symmetric, 0.8)"
    python experiments/compare.py --config paper_lpg_noise --data cifar100
    python experiments/compare.py --config paper_lpg_noise --smoke                          # the same code on digits, seconds

For a GPU. The paper names momentum, weight decay and batch size; epochs and learning rate are "the standard protocols", so ours are those
of its balanced tables (200 epochs, 0.1 divided by 10 at 100 and 150). It does not say whether the true class may be drawn: here not; with
it, noise(symmetric, 0.5, true_class=true). Bounds are its defaults, which it chose on validation sets.
"""


def config():
    """The settings, as flags of compare.py."""
    return dict(
        data="cifar10",
        view="noise(symmetric, 0.5)",
        model="resnet32",
        epochs=200,
        batch_size=128,
        learning_rate=0.1,
        weight_decay=5e-4,
        schedule="step",
        warmup_epochs=0.0,
        milestones=(100.0, 150.0),
        decay=0.1,
        augment=True,
        methods="ce, mixup, gce, sce, clip, noise, sam, lpl, lpg(split=variance), lpg(split=variance, bound=varied), "
        "lpg(split=variance, inference=pgd)",
        seeds=3,
        smoke=dict(
            data="digits", view="noise(symmetric, 0.5)", model="mlp", epochs=2, milestones=(1.0,), batch_size=32, augment=False, seeds=1,
            cost_rounds=2,
        ),
    )  # fmt: skip
