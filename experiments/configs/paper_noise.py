"""Noisy labels as the taxonomy paper trains: CIFAR-10, ResNet-20, 300 epochs, 0.1 divided by 10 at 150 and 225.

    python experiments/compare.py --config paper_noise --data cifar10                       # 20 % random
    python experiments/compare.py --config paper_noise --data cifar10 --view "noise(pair, 0.2)"
    python experiments/compare.py --config paper_noise --data cifar100 --model wrn28-10
    python experiments/compare.py --config paper_noise --smoke                              # the same code on digits, seconds

For a GPU. Random noise draws from all classes, the true one included: 20 % of it leave 18 % wrong with ten classes. Methods have the
settings of the paper's searches; the code's own (MixPert with step 3 and a clean share of 0.4) differ, see their docstrings.
"""


def config():
    """The settings, as flags of compare.py."""
    return dict(
        data="cifar10",
        view="noise(symmetric, 0.2, true_class=true)",
        model="resnet20",
        epochs=300,
        batch_size=128,
        learning_rate=0.1,
        weight_decay=5e-4,
        schedule="step",
        warmup_epochs=0.0,
        milestones=(150.0, 225.0),
        decay=0.1,
        augment=True,
        methods="ce, bootstrap, bootstrap(hard), ls, gce, sce, ols, proselflc, dlb, mbls, logpert, mixpert",
        seeds=3,
        smoke=dict(
            data="digits", view="noise(symmetric, 0.2, true_class=true)", model="mlp", epochs=2, milestones=(1.0,), batch_size=32,
            augment=False, seeds=1, cost_rounds=2,
        ),
    )  # fmt: skip
