"""README.md tells the truth: its table is the taxonomy's, its commands can be parsed, its first two bash blocks are the two commands."""

import dataclasses
import pathlib
import re
import shlex

import pytest
import tyro

from experiments import audit, bench, compare, domains, explain, landscape, shared, sweep, train
from perturbjax import spec, taxonomy
from perturbjax.data import VIEWS

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
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
LINES = [line for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def test_the_table_is_the_one_that_the_taxonomy_prints():
    assert taxonomy.markdown(taxonomy.table()) in README


def test_the_first_two_bash_blocks_are_the_main_job_and_the_tests():
    main_job, tests = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)[:2]
    assert main_job.startswith("python3 -m venv .venv && ") and main_job.endswith("experiments/compare.py")
    assert tests.startswith("python3 -m venv .venv && ") and "pytest" in tests and "\n" not in main_job + tests


@pytest.mark.parametrize("line", [line for line in LINES if "experiments/" in line and "my_margin" not in line])
def test_every_command_has_flags_methods_and_views_that_exist(line):
    _, script, *flags = shlex.split(line)
    settings = SCRIPTS[pathlib.Path(script).name]
    shared.value_of(flags, "--config", remove=True)
    if "--list" in flags:
        return
    parsed = tyro.cli(settings, args=flags, config=(tyro.conf.OmitArgPrefixes,))
    assert dataclasses.is_dataclass(parsed)
    assert shared.parse_methods(getattr(parsed, "methods", None) or parsed.method)
    if parsed.view != "none":
        spec.resolve(spec.parse_chain(parsed.view), VIEWS)


def test_a_gpu_s_jax_is_installed_into_the_environment_of_the_commands_in_their_version():
    """Or the first command moves jax away from the plugin's version."""
    [line] = [line for line in README.splitlines() if "jax[cuda13]" in line]
    assert line.startswith("python3 -m venv .venv && .venv/bin/pip install ") and line.endswith(" -c tests/constraints.txt")
    pinned = (pathlib.Path(__file__).parent / "constraints.txt").read_text()
    assert len(set(re.findall(r"^jax(?:lib)?==(.*)$", pinned, re.MULTILINE))) == 1
