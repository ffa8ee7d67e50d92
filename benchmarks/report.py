"""Tables and plots of README.md and benchmarks/README.md, from benchmarks/results/*.json alone.

    python -m benchmarks.report          # fills the documents' blocks and draws the plots

What is between `[[[cog` and `[[[end]]]` in the documents is what functions of the modules imported here return; CI runs
`cog --check`.
"""

# ruff: noqa: F401  what is imported serves the documents
import ast
import re

import cogapp

from benchmarks import (
    demo,
    end_to_end,
    families,
    families_speed,
    inference,
    kill_resume,
    loading,
    plan,
    several_gpus,
    tokenizing,
    train_step,
)
from benchmarks.attention import tables as attention
from benchmarks.guide_claims import tables as guide_claims
from benchmarks.harness import ROOT
from benchmarks.peers import tables as peers
from benchmarks.tables import table

DOCUMENTS = tuple(
    ROOT / name
    for name in ("README.md", "benchmarks/README.md", "benchmarks/GUIDE_CLAIMS.md", "docs/several_gpus.md", "docs/models.md")
)
COG_FLAGS = ("-I", str(ROOT), "-p", "from benchmarks.report import *")


def code_map() -> str:
    """The folders of qlora/ and their modules, in the words of their docstrings."""
    package = ROOT / "qlora"
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    rows = []
    for folder in re.findall(r"^(\w+)/ ", text, re.MULTILINE):
        purpose = ast.get_docstring(ast.parse((package / folder / "__init__.py").read_text())) or ""
        modules = sorted(path.stem for path in (package / folder).glob("*.py") if path.stem != "__init__")
        links = ", ".join(f"[{name}](qlora/{folder}/{name}.py)" for name in modules)
        rows.append([f"`{folder}/`", " ".join(purpose.split()), links])
    return table(["folder", "what for", "modules"], rows)


def main() -> None:
    """Fill the documents and draw the plots."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "qlora"  # the same ids each time it is drawn
    demo.plot()
    attention.plot("h100")
    peers.plot("h100")
    plan.plot("h100")
    end_to_end.plot("end_to_end_h200_*.json")
    if status := cogapp.Cog().main(["cog", *COG_FLAGS, "-r", *map(str, DOCUMENTS)]):
        raise SystemExit(status)


if __name__ == "__main__":
    main()
