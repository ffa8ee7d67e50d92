"""The house rules that a machine can check."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = sorted((ROOT / "qlora").rglob("*.py"))
LOOP = ROOT / "train_loop.py"
PRODUCT = [LOOP, *ROOMS]
TREES = {
    path: ast.parse(path.read_text())
    for path in [*PRODUCT, *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
}


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(TREES[path]) if isinstance(node, ast.FunctionDef)]


def depth(node: ast.AST) -> int:
    blocks = (ast.For, ast.While, ast.If, ast.With, ast.Try)
    return max((depth(child) + isinstance(child, blocks) for child in ast.iter_child_nodes(node)), default=0)


def code_and_comments(path: Path) -> tuple[int, int]:
    """Lines of code, and lines that are comments; docstrings and blank lines are neither."""
    owners = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)]
    texts = [node.body[0] for node in owners if ast.get_docstring(node)]
    documented = {number for text in texts for number in range(text.lineno, text.end_lineno + 1)}
    lines = [line.strip() for number, line in enumerate(path.read_text().splitlines(), 1) if number not in documented]
    comments = sum(line.startswith("#") for line in lines)
    return sum(map(bool, lines)) - comments, comments


def test_the_loop_is_one_story():
    code, comments = code_and_comments(LOOP)
    assert code <= 200 and comments >= 0.3 * code, (code, comments)
    names = [node.name for node in TREES[LOOP].body if isinstance(node, ast.FunctionDef)]
    assert names == ["lr_multiplier", "train_step", "train", "finish", "main"]
    banners = re.findall(r"^ +# -- (\w+) --$", LOOP.read_text(), re.MULTILINE)
    assert banners == ["batch", "step", "log", "save", "evaluate"]


# Their parameters are those of transformers' AttentionInterface, or of a kernel.
OTHERS_PARAMETERS = {"_eager", "_flash_attention_2", "_varlen", "_dequantize"}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_takes_more_than_six_parameters(path):
    for function in functions(path):
        names = [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
        taken = [name for name in names if name not in ("self", "cls")]
        assert len(taken) <= 6 or function.name in OTHERS_PARAMETERS, f"{function.name}: {taken}"


def test_no_forward_is_replaced():
    for path in PRODUCT:
        assert not re.search(r"\.forward = ", path.read_text()), path.name


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_fit_a_screen_and_nest_little(path):
    for function in functions(path):
        length = function.end_lineno - function.lineno + 1
        assert length <= (120 if function.name == "train" else 60), f"{function.name}: {length} lines"
        assert depth(function) <= 4, function.name


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_public_is_documented(path):
    assert ast.get_docstring(TREES[path])
    public = [node for node in TREES[path].body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"]
    for node in [*public, *(method for owner in public if isinstance(owner, ast.ClassDef) for method in owner.body)]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_not_done_here(path):
    text = path.read_text()
    for pattern in (
        r"\bglobal\b",
        r"\bnonlocal\b",
        r"except Exception",
        r"except:",
        r"\bTODO\b",
        r"\bFIXME\b",
        r"pickle",
        r"bind_all|--host",  # TensorBoard stays on this machine
        r"(?<!safetensors\.)torch\.(save|load)\(",
    ):
        code = "\n".join(line.split("#")[0] for line in text.splitlines())
        assert not re.search(pattern, re.sub(r'""".*?"""', "", code, flags=re.DOTALL)), pattern
    for function in functions(path):
        rest = function.args.kwarg  # `_` where transformers' AttentionInterface passes more than is asked for
        wraps = function.name in {
            "forward",
            "__call__",
            "_run",
            "_keep_products",
            "_keep_attention",
            "decode",
        }  # a layer of transformers or PEFT, or an operator of torch, whose arguments are its own
        assert rest is None or rest.arg == "_" or wraps, f"{function.name} passes **kwargs through"
    words = {node.id for node in ast.walk(TREES[path]) if isinstance(node, ast.Name)}
    assert not {word for word in words if re.search(r"callback|hook|registry|Manager|Factory", word)}


def test_every_wait_for_the_device_in_the_loop_says_so():
    lines = [line for path in (LOOP, ROOT / "qlora" / "run" / "log.py") for line in path.read_text().splitlines()]
    waits = [line for line in lines if re.search(r"\.(item|tolist|cpu|numpy|flush)\(|synchronize\(", line)]
    waits = [line for line in waits if not re.search(r"(self\.flush|metrics_file\.flush|board\.flush)\(", line)]
    assert len(waits) == 3 and all("# sync" in line for line in waits)


# A module may import from its own folder and from those before it; cli.py and __main__.py import lazily and are exempt.
ORDER = (
    "terminal",
    "errors",
    "cache",
    "checksum",
    "validation",
    "config",
    "distributed",
    "data",
    "model",
    "speed",
    "eval",
    "run",
    "report",
    "labs",
    "commands",
)


def imported_modules(path: Path) -> set[str]:
    """Dotted names of what a file imports from this repository, wherever in the file."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if (ROOT / f"{name.replace('.', '/')}.py").exists() else node.module)
    return {name for name in found if name.split(".")[0] in ("qlora", "train_loop", "benchmarks", "tests")}


def test_imports_point_one_way():
    for path in ROOMS:
        own = path.relative_to(ROOT / "qlora").with_suffix("").parts
        if own[0] in ("__init__", "__main__", "cli"):
            continue
        for name in imported_modules(path):
            first, *rest = name.split(".")
            assert first == "qlora" and rest and rest[0] in ORDER, f"{path.name} imports {name}"
            assert ORDER.index(rest[0]) <= ORDER.index(own[0]), (
                f"{path.relative_to(ROOT)} imports {name}, which is to its right"
            )


def test_no_module_imports_itself_in_a_circle():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOMS}
    edges = {name: imported_modules(path) & names.keys() for name, path in names.items()}
    open_, done = [], set()

    def visit(name: str) -> None:
        assert name not in open_, f"circle: {' -> '.join([*open_[open_.index(name) :], name])}"
        if name not in done:
            open_.append(name)
            for other in sorted(edges[name]):
                visit(other)
            done.add(open_.pop())

    for name in edges:
        visit(name)


def test_the_step_exists_once():
    steps = [path for path in TREES if (ROOT / "tests") not in path.parents and "optimizer.step()" in path.read_text()]
    assert steps == [LOOP]


def test_the_map_names_every_folder():
    text = ast.get_docstring(TREES[ROOT / "qlora" / "__init__.py"])
    folders = {path.parent.name for path in ROOMS if path.parent.name != "qlora"}
    assert set(re.findall(r"^(\w+)/ ", text, re.MULTILINE)) == folders
    assert set(re.findall(r"(\w+\.py)\b", text)) >= {p.name for p in ROOMS if p.parent.name == "qlora"} - {"__init__.py"}


@pytest.mark.parametrize(
    "path",
    [path for path in PRODUCT if path.name in {"train_loop.py", "loss.py", "batch.py"}],
    ids=lambda p: p.name,
)
def test_lines_that_make_tensors_end_with_their_shape(path):
    makers = (
        r"(last_hidden_state|torch\.full\(|torch\.cat\(|torch\.nonzero\(|\.flatten\(|logsumexp\(|\.logits\(.*\)\.float\(\))"
    )
    for line in path.read_text().splitlines():
        if re.search(makers, line) and "=" in line.split("(")[0]:
            assert re.search(r"#.*\[[\w*+ ,.]+\]", line), line


def test_every_test_asserts_something():
    for path in sorted({*(ROOT / "tests").rglob("test_*.py")} - {*(ROOT / "tests" / "faults").iterdir()}):
        for function in functions(path):
            if function.name.startswith("test_"):
                assert re.search(r"\bassert\b|pytest\.raises|assert_close|check_first_gradients", ast.unparse(function)), (
                    f"{path.name}: {function.name}"
                )


OLD_NAMES = re.compile(
    r"\b(held_out|skeleton|explained|out_of_memory_told|count_not_finite|obstacle|fitted|begin_state|step_batches|"
    r"MOST|HOW|OURS_|LEFTOVER|COLDEST|TURNED|RECITED|peak_memory_gib|gpu_gib)\b"
)
BRITISH = re.compile(
    r"\w*(?:quantis|tokenis|initialis|optimis(?!tic)|normalis|memoris|utilis|summaris|colour|behaviour|neighbour|favour|licence|"
    r"labelled|modelling|afterwards|per cent\b|\bgrey\b|\bcentre\b)\w*",
    re.IGNORECASE,
)


def test_names_and_spelling_are_those_of_the_design():
    own = ROOT / "tests" / "test_conventions.py"
    for path in [*ROOMS, LOOP]:
        if path.name != "schema.py":  # it reads the old keys
            assert not (found := OLD_NAMES.findall(path.read_text())), f"{path.relative_to(ROOT)}: {found}"
    for path in [*TREES, *ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.rglob("templates/*.jinja")]:
        if path != own:
            assert not (found := BRITISH.findall(path.read_text())), f"{path.relative_to(ROOT)}: {found}"


def test_train_loop_imports_no_command():
    assert not {name for name in imported_modules(LOOP) if name.startswith(("qlora.commands", "benchmarks", "tests"))}
    assert not any(isinstance(node, ast.ImportFrom) and node.level for tree in TREES.values() for node in ast.walk(tree))
