"""Tables and plots of README.md and benchmarks/README.md, from benchmarks/results/*.json alone.

    python -m benchmarks.report          # fills the documents' blocks and draws the plots

What is between `[[[cog` and `[[[end]]]` in the documents is the output of the functions imported here; CI runs `cog --check`.
"""

# ruff: noqa: F401  what is imported serves the documents
import ast
import re

import cogapp

from benchmarks.attention.tables import (
    CPU,
    H100,
    attention_findings,
    attention_kernels,
    attention_masks,
    attention_packing,
    attention_parity,
    attention_share,
    attention_steps,
    plot_attention,
)
from benchmarks.demo import demo_output, demo_summary, plot_demo, sweep
from benchmarks.guide_claims.tables import claims, claims_short
from benchmarks.harness import ROOT
from benchmarks.inference import inference
from benchmarks.kill_resume import survival
from benchmarks.loading import loading
from benchmarks.peers.tables import peers, peers_short, plot_peers, targets
from benchmarks.plan import plan_fits, plan_measured, plot_plan
from benchmarks.tables import table
from benchmarks.train_step import ladder, tokens, train_step

DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "benchmarks" / "GUIDE_CLAIMS.md")
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
    plot_demo()
    plot_attention("h100")
    plot_peers("h100")
    plot_plan("h100")
    if status := cogapp.Cog().main(["cog", *COG_FLAGS, "-r", *map(str, DOCUMENTS)]):
        raise SystemExit(status)


if __name__ == "__main__":
    main()
