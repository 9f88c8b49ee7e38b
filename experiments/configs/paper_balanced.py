"""Balanced data as the LPG and LPA papers train: CIFAR-10, WRN-28-10, 200 epochs, 0.1 divided by 10 at 100 and 150.

    python experiments/compare.py --config paper_balanced --data cifar10
    python experiments/compare.py --config paper_balanced --data cifar100 --model resnet110
    python experiments/compare.py --config paper_balanced --smoke                           # the same code on digits, seconds

For a GPU. LPL and ISDA have another recipe: paper_balanced_isda.
"""


def config():
    """The settings, as flags of compare.py."""
    return dict(
        data="cifar10",
        view="none",
        model="wrn28-10",
        epochs=200,
        batch_size=128,
        learning_rate=0.1,
        weight_decay=5e-4,
        schedule="step",
        warmup_epochs=0.0,
        milestones=(100.0, 150.0),
        decay=0.1,
        augment=True,
        methods="ce, ls, mixup, manifold_mixup, isda, sam, noise, lpl(bound=0.3, step_size=0.03), lpg, lpg(bound=varied), lpa, lpa(bound=varied)",
        seeds=3,
        smoke=dict(
            data="digits", view="thin(20)", model="mlp", epochs=2, milestones=(1.0,), batch_size=32, augment=False, seeds=1,
            cost_rounds=2,
        ),
    )  # fmt: skip
