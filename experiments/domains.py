"""Domain generalization: trains on all domains but one, tests on that one, for every domain; DomainBed's protocol and table.

    python experiments/domains.py --data PACS.npz --steps 1000                                    # eight methods, three seeds
    python experiments/domains.py --data PACS.npz --methods "erm, coral, dann, rsc, swad, lpa" --seeds 1 --steps 50 --out DIR
    python experiments/domains.py --data PACS.npz --methods "erm, lpa(bound=0.1), lpa+swad" --held-out sketch photo
    python experiments/domains.py --data FOLDER --image-size 224 --model resnet20                 # FOLDER/domain/class/image

Every domain is split 80/20 by class, the split drawn with the seed. Training takes --batch-size samples of the 80 % of each training
domain in every step; the 20 % of the training domains choose the step (best mean accuracy over them: training-domain validation), and
the accuracy there on the 80 % of the left-out domain is reported (and balanced accuracy and macro F1), which nothing was chosen by.
SWAD's weights are averaged over the window that the validation losses give instead. Unlike DomainBed's, the 20 % are not augmented, nets
start from random weights (unless --weights gives others), and there is one setting per method, no random search: numbers compare methods
here, not with published ones.

Writes domains.json and table.md to --out and prints the table. A run that is finished is not trained again: the same command, also with
more methods, seeds or left-out domains, trains what is missing.
"""

import itertools
import time

from rich.console import Console

from experiments import shared
from experiments.leaveout.plan import (
    DomainsSettings,
    Job,
    check_classes,
    check_flags,
    check_methods,
    held_out_domains,
    load_pooled,
    parse_methods,
    run_identity,
)
from experiments.leaveout.table import markdown, print_results, results_of, uneven_domains
from experiments.leaveout.training import run_all
from perturbjax.data.domains import domain_batches, missing_classes, split_domains
from perturbjax.training.checkpoint import dump_json


def main(argv: list[str]) -> None:
    """Runs all methods on all left-out domains."""
    settings = shared.first_flags(argv, DomainsSettings, __doc__, script="domains.py", one_process=True)
    check_flags(settings)
    methods, notes = parse_methods(settings)
    dataset = load_pooled(settings)
    check_classes(settings, dataset)
    held = held_out_domains(settings, dataset)
    for domain, seed in itertools.product(held, range(settings.seeds)):
        next(domain_batches(split_domains(dataset, domain, seed=seed).train, settings.batch_size, seed=0))
    check_methods(settings, dataset, methods)
    identity = run_identity(settings, dataset)
    with shared.prepare_out(settings.out, "domains", settings.view, identity) as folder:
        console = Console()
        shared.print_notes(dataset, console, settings, folder.path, steps=settings.steps)
        shared.print_classifiers(settings, methods, console)
        for note in [*missing_classes(dataset), *uneven_domains(dataset, held), *notes]:
            console.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)
        jobs = [
            Job(typed, *what, domain, seed)
            for typed, what in methods.items()
            for domain in held
            for seed in range(settings.seeds)
        ]
        started = time.perf_counter()
        done = run_all(settings, dataset, jobs, folder.path, identity, console)
        results = results_of(settings, dataset, held, done.records)
        dump_json(folder.path / "domains.json", results)
        (folder.path / "table.md").write_text(markdown(results))
        print_results(results, console)
        took = time.perf_counter() - started
        console.print(
            f"{took:.0f} s: {done.trained} of {len(jobs)} runs trained, {done.compiled} compiled steps. "
            f"Wrote {folder.path / 'domains.json'} and {folder.path / 'table.md'}",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
        shared.raise_diverged(done.diverged)


if __name__ == "__main__":
    shared.start(main)
