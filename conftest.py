"""Which tests run in one process; the Python blocks of README and docs as tests, those of one file sharing their names, as a reader expects."""

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from xdist.scheduler import LoadScopeScheduling

pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=["README.md", "docs/*.md"]).pytest()


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
