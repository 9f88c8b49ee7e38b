"""The contract is asked of plug-ins too: README's example and the skeletons of docs/add_a_method.md keep it, and one that doesn't is found."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CONTRACT = ["tests/test_contract.py", "tests/test_optax_links.py"]


def blocks(page):
    return {
        name: block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        for name in re.findall(r"@pj\.method\([^@]*?\)(?:  # fmt: skip)?\ndef (\w+)\(", block, re.DOTALL)
    }


METHODS = blocks("README.md") | blocks("docs/add_a_method.md")


def asked(tmp_path, name, text, chosen):
    """The contract's tests of one method in a process of its own: the finished process."""
    (tmp_path / f"{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--plugin", str(tmp_path / f"{name}.py"), *CONTRACT]
    return subprocess.run([*command, "-k", f"{name} and ({chosen})"], cwd=ROOT, capture_output=True, text=True)


def test_the_pages_have_a_method_of_both_kinds():
    assert set(METHODS) == {"my_margin", "rarity", "shrunk"}


def test_readme_s_example_keeps_the_contract_s_quick_part(tmp_path):
    done = asked(tmp_path, "my_margin", METHODS["my_margin"], "conventions or bit_for_bit or knows_nothing or table")
    assert done.returncode == 0 and re.search(r"\b4 passed", done.stdout), done.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_an_example_keeps_the_whole_contract(name, tmp_path):
    done = asked(tmp_path, name, METHODS[name], "_")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-2000:]


def test_a_margin_that_hides_that_it_reads_the_label_is_found(tmp_path):
    done = asked(tmp_path, "my_margin", METHODS["my_margin"].replace(", reads_labels=True", ""), "knows_nothing")
    assert done.returncode == 1 and "1 failed" in done.stdout


@pytest.mark.slow
def test_a_link_that_asks_for_gradients_without_counting_them_is_found(tmp_path):
    silent = METHODS["shrunk"].replace("return there, state.after_step()", "return there, state")
    done = asked(tmp_path, "shrunk", silent, "asks_for")
    assert done.returncode == 1 and "1 failed" in done.stdout
