"""The list of mutants fits the code and the tests as they are now; whether they die, `python tests/faults/mutants.py` tells."""

import ast
import re

import pytest

from tests.faults.mutants import MUTANTS, ROOT, applied

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_mutant_applies_and_its_test_exists(mutant):
    broken = applied(mutant, ROOT)  # raises if an old text does not stand there exactly once
    assert broken != (ROOT / mutant.file).read_text()
    compile(broken, mutant.file, "exec")
    path, _, test = mutant.test.partition("::")
    name = test.partition("[")[0]
    functions = [node for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)]
    assert re.fullmatch(r"test_\w+", name) and name in {function.name for function in functions}


def test_no_two_mutants_are_the_same():
    names, edits = [mutant.name for mutant in MUTANTS], [(mutant.file, mutant.edits) for mutant in MUTANTS]
    assert len(set(names)) == len(names) and len(set(edits)) == len(edits) >= 20
