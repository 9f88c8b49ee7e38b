"""Domain generalization on two cores: PACS, averaged down to 32x32, ResNet-8, trained from scratch; each domain left out in turn.

    python experiments/domains.py --config small_domains --data PACS --image-size 64              # 9 methods x 4 domains x 3 seeds
    python experiments/domains.py --config small_domains --smoke --data PACS --image-size 64      # the same code, minutes

PACS (Li et al., ICCV 2017) is a folder PACS/DOMAIN/CLASS/picture.

A protocol of this project (see small_longtail). ERM's split, selection and optimiser are DomainBed's (80/20 in every domain,
training-domain validation, Adam); its nets are pretrained on ImageNet and ten to thirty points better.
"""


def config():
    """The settings, as flags of domains.py."""
    return dict(
        script="domains.py",
        data="PACS.npz",
        view="shrink(32)",
        model="resnet8",
        steps=300,
        batch_size=32,
        augment=True,
        methods="erm, coral, dann, domain_mixup, manifold_mixup, rsc, swad, lpa, cuat(groups=domain)",
        seeds=3,
        smoke=dict(view="thin(20)+shrink(16)", model="cnn", steps=10, evaluate_every=5, batch_size=8, seeds=1),
    )
