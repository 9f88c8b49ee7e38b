"""The long tail as LPL's and logit adjustment's code trains it: its own "ResNet-32", 1,241 epochs, Nesterov, no warm-up.

    python experiments/compare.py --config paper_longtail_lpl --data cifar10
    python experiments/compare.py --config paper_longtail_lpl --smoke                       # the same code on digits, seconds

For a GPU. Weight decay 2e-4: the code adds its 1e-4 twice. For CIFAR-100-LT: --data cifar100 --epochs 1419 --milestones 691 1059 1290.
The code's "ResNet-32" is our la_net, of 47 layers and 0.30 M parameters; --model resnet32 is the usual one. The code only shifts the
pixels, ours normalises them by the channels' means and deviations. LPL's step rule is in lpl_steps: lpl(num_steps=head_tail_steps(...)).
"""


def config():
    """The settings, as flags of compare.py."""
    return dict(
        data="cifar10",
        view="longtail(100)",
        model="la_net",
        epochs=1241,
        batch_size=128,
        learning_rate=0.1,
        nesterov=True,
        weight_decay=2e-4,
        schedule="step",
        warmup_epochs=0.0,
        milestones=(604.0, 926.0, 1128.0),
        decay=0.1,
        augment=True,
        methods="ce, la, lpl(split=frequency, bound=1.5, step_size=0.15), "
        "lpl(split=frequency, bound=varied_by_frequency(0, 2.5), step_size=0.15), "
        "la+lpl(split=frequency, bound=varied_by_frequency(0, 2.5), step_size=0.15)",
        seeds=3,
        smoke=dict(
            data="digits", view="longtail(10)", model="mlp", epochs=2, milestones=(1.0,), batch_size=32, augment=False, seeds=1,
            cost_rounds=2,
        ),
    )  # fmt: skip
