"""SGD against SAM, PUGD and RTS: CIFAR-10 with PUGD's recipe, 100 epochs, batch 100, 0.1 by cosine.

    python experiments/compare.py --config paper_rts --data cifar10
    python experiments/compare.py --config paper_rts --data cifar100
    python experiments/compare.py --config paper_rts --data cifar10 --methods "ce" --epochs 200   # as many gradients as PUGD takes
    python experiments/compare.py --config paper_rts --smoke                                # the same code on digits, seconds

For a GPU. The RTS draft names data (CIFAR, Tiny ImageNet) and rivals and has no experiments of its own yet, so the recipe is that of
PUGD's code, with ResNet-32 for its UPANet; there the learning rate changes by epochs, here by steps. The draft's three means one by one:
a radius that falls, perturbation in the second half or at every second step only, and less of the plain gradient. An update of PUGD has
length 1, so its weight decay and learning rate mean something else than SGD's: search them. For the same reason the steps that a timing
leaves out take the unit gradient, not the plain one, and `ngd`, which takes it always, is what timings are compared with. Accuracy belongs
beside the gradient evaluations of the table, not only beside epochs.
"""


def config():
    """The settings, as flags of compare.py."""
    return dict(
        data="cifar10",
        view="none",
        model="resnet32",
        epochs=100,
        batch_size=100,
        learning_rate=0.1,
        weight_decay=5e-4,
        schedule="cosine",
        warmup_epochs=0.0,
        augment=True,
        methods="ce, ngd, sam, asam, pugd, rts(radius=cosine), rts(timing=last, inactive=unit), "
        "rts(timing=every, inactive=unit), rts(scale=0.5), rts(radius=cosine, timing=last, scale=0.5, inactive=unit)",
        seeds=3,
        smoke=dict(data="digits", view="thin(20)", model="mlp", epochs=2, batch_size=32, augment=False, seeds=1, cost_rounds=2),
    )
