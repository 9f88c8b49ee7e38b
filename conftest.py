"""Which tests run in one process, and on whose methods; the Python blocks of README and docs as tests, those of one file sharing their
names, as a reader expects."""

import os
import pathlib

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from xdist.scheduler import LoadScopeScheduling

pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=["README.md", "docs/*.md"]).pytest()


def pytest_addoption(parser):
    parser.addoption(
        "--plugin", action="append", default=[], dest="methods_of", metavar="FILE",
        help="Python file with methods of your own, which the contract's tests then ask too (docs/add_a_method.md)",
    )  # fmt: skip


def pytest_configure(config):
    """By the environment (tests/methods.py): what tests are parametrised by is known when their files are imported."""
    files = [str(pathlib.Path(file).resolve()) for file in config.getoption("methods_of")]
    if files:
        os.environ["PERTURBJAX_TESTED_PLUGINS"] = os.pathsep.join(files)


class Scheduler(LoadScopeScheduling):
    """Tests of one file run in one process, which compiles what they share once; the contract's, of all methods, by method."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, test = nodeid.partition("::")
        method = test.partition("[")[2]
        return method if file.endswith("test_contract.py") and method else file


@pytest.hookimpl(optionalhook=True)  # without -n there is nothing to schedule
def pytest_xdist_make_scheduler(config, log):
    """Instead of --dist=loadgroup, whose marks xdist 3.8 loses under pytest 9.2."""
    return Scheduler(config, log)
