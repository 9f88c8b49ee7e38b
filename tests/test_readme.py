"""README.md and docs tell the truth: the table is the taxonomy's, commands can be parsed, the first two bash blocks are the two commands."""

import pathlib
import re
import shlex

import pytest
import tyro

from experiments import audit, bench, compare, domains, explain, figures, gpu_check, landscape, shared, sweep, train
from experiments.shared.flags import config_flags
from perturbjax import spec, taxonomy
from perturbjax.analysis.attack import parse_attacks
from perturbjax.data import VIEWS

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = {
    "audit.py": audit.AuditSettings,
    "compare.py": compare.CompareSettings,
    "train.py": train.TrainSettings,
    "bench.py": bench.BenchSettings,
    "domains.py": domains.DomainsSettings,
    "explain.py": explain.ExplainSettings,
    "landscape.py": landscape.LandscapeSettings,
    "sweep.py": sweep.SweepSettings,
}
PLACEHOLDERS = {"VIEW": "none", "RATIO": "50", "BOUND": "0.5", "AS ABOVE": "none", "EPOCHS": "30", " C ": " 10 "}


def commands() -> list[str]:
    """Every command of ours in a console block or an indented line of README and docs, on one line, placeholders filled in."""
    found = []
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = re.sub(r"\\\n\s*", "", file.read_text())
        lines = [line for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
        lines += re.findall(r"^    (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
        found += [line for line in lines if re.search(r"python experiments/\w+\.py", line) and "my_margin" not in line]
    for placeholder, value in PLACEHOLDERS.items():
        found = [line.replace(placeholder, value) for line in found]
    return list(dict.fromkeys(found))


def test_the_table_is_the_one_that_the_taxonomy_prints():
    assert taxonomy.markdown(taxonomy.table()) in README


def test_the_first_two_bash_blocks_are_the_main_job_and_the_tests():
    main_job, tests = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)[:2]
    assert main_job.startswith("python3 -m venv .venv && ") and main_job.endswith("experiments/compare.py")
    assert tests.startswith("python3 -m venv .venv && ") and "pytest" in tests and "\n" not in main_job + tests


@pytest.mark.parametrize("line", commands())
def test_every_command_has_flags_methods_and_views_that_exist(line):
    words = shlex.split(line, comments=True)
    place = next(i for i, word in enumerate(words) if word.startswith("experiments/"))
    script, flags = pathlib.Path(words[place]).name, words[place + 1 :]
    if script == "gpu_check.py":
        gpu_check.parse(flags)
        return
    if script == "figures.py":
        tyro.extras.subcommand_cli_from_dict(figures.FIGURES, args=flags, config=(tyro.conf.OmitArgPrefixes,))
        return
    config = shared.value_of(flags, "--config", remove=True)
    if "--list" in flags:
        return
    smoke = [flags.pop(flags.index("--smoke"))] if "--smoke" in flags else []
    defaults = config_flags(config[-1], script, smoke=bool(smoke)) if config else {}
    parsed = tyro.cli(SCRIPTS[script], args=flags, default=SCRIPTS[script](**defaults), config=(tyro.conf.OmitArgPrefixes,))
    assert shared.parse_methods(getattr(parsed, "methods", None) or parsed.method)
    if script == "sweep.py":
        assert sweep.expand(parsed)
    if getattr(parsed, "attack", "none") != "none":
        assert parse_attacks(parsed.attack)
    if parsed.recipe is not None:
        shared.flags_of_recipe(parsed.recipe, parsed.epochs)
    if parsed.view != "none":
        spec.resolve(spec.parse_chain(parsed.view), VIEWS)


def test_a_gpu_s_jax_is_installed_into_the_environment_of_the_commands_in_their_version():
    """Or the first command moves jax away from the plugin's version."""
    [line] = [line for line in README.splitlines() if "jax[cuda13]" in line]
    assert line.startswith("python3 -m venv .venv && .venv/bin/pip install ") and line.endswith(" -c tests/constraints.txt")
    pinned = (pathlib.Path(__file__).parent / "constraints.txt").read_text()
    assert len(set(re.findall(r"^jax(?:lib)?==(.*)$", pinned, re.MULTILINE))) == 1
