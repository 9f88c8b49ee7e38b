"""Balanced data as ISDA's and LPL's code trains: CIFAR-10, WRN-28-10 with dropout 0.3, 240 epochs, Nesterov.

    python experiments/compare.py --config paper_balanced_isda --data cifar10
    python experiments/compare.py --config paper_balanced_isda --data cifar100
    python experiments/compare.py --config paper_balanced_isda --smoke                      # the same code on digits, seconds

For a GPU. For ResNet-32 and 110: --model resnet32 --shortcut B --epochs 160 --milestones 80 120 --decay 0.1 --weight-decay 1e-4. The
code pads by reflection, ours with zeros, and draws those two nets' kernels by fan-out, ours by fan-in.
"""


def config():
    """The settings, as flags of compare.py."""
    return dict(
        data="cifar10",
        view="none",
        model="wrn28-10",
        dropout=0.3,
        epochs=240,
        batch_size=128,
        learning_rate=0.1,
        nesterov=True,
        weight_decay=5e-4,
        schedule="step",
        warmup_epochs=0.0,
        milestones=(60.0, 120.0, 160.0, 200.0),
        decay=0.2,
        augment=True,
        methods="ce, focal, isda, gce, center, disturb, lpl(bound=0.1, step_size=0.005), lpl(bound=varied(0.1, 0.1), step_size=0.005)",
        seeds=3,
        smoke=dict(
            data="digits", view="thin(20)", model="mlp", dropout=None, epochs=2, milestones=(1.0,), batch_size=32, augment=False,
            seeds=1, cost_rounds=2,
        ),
    )  # fmt: skip
