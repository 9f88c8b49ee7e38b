"""Which tests run in one process; the Python blocks of README and docs as tests, those of one file sharing their names, as a reader expects."""

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

pytest_collect_file = Sybil(parsers=[PythonCodeBlockParser()], patterns=["README.md", "docs/*.md"]).pytest()


@pytest.hookimpl(tryfirst=True)  # before xdist writes the groups into the names
def pytest_collection_modifyitems(items):
    """Tests of one file run in one process, which compiles what they share once; the contract's, of all methods, by method."""
    for item in items:
        file, _, _ = item.nodeid.partition("::")
        by_method = file.endswith("test_contract.py") and hasattr(item, "callspec")
        item.add_marker(pytest.mark.xdist_group(item.callspec.id if by_method else file))
