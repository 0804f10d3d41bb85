"""Properties of the source that a linter does not check: unsafe loading, sizes, precise types, simple statements."""

import ast
import re

import pytest
from package_source import ROOT, external_imports, trees

import mmx

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"}
UNSAFE_KEYWORDS = ("trust_remote_code", "allow_pickle")

MAX_LINES_OF_A_FILE = 400
LONG_FILES = {"data/lexicon.py"}  # word lists, not code
MAX_LINES_OF_A_FUNCTION = 60
MAX_PUBLIC_ANY = 10
MAX_TUPLE_ASSIGNMENTS = 5  # per 1,000 lines
MAX_NESTED_COMPREHENSIONS = 3  # per 1,000 lines
HOME_MADE_NAMES = (
    "Sight",
    "LookingStack",
    "LookingBlock",
    "speak_in",
    "Said",
    "Asked",
    "Speaker",
    "StopSign",
    "Borrowed",
    "twins",
    "halving",
    "complaints",
    "spoken",
    "shows_padding",
    "seen_by",
    "by_stream",
    "share_out_again",
    "keep_nucleus",
)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def unsafe_code(tree):
    """Yield (line, name) of everything that can execute code stored in data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE_CALLS and not loads_only_tensors(node):
            yield node.lineno, ast.unparse(node.func)
        elif isinstance(node, ast.keyword) and node.arg in UNSAFE_KEYWORDS and ast.unparse(node.value) != "False":
            yield node.value.lineno, node.arg
        elif isinstance(node, ast.Constant) and node.value in UNSAFE_KEYWORDS:
            yield node.lineno, node.value
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            for name in names & UNSAFE_CALLS:
                yield node.lineno, name


def loads_only_tensors(call):
    keywords = {ast.unparse(keyword) for keyword in call.keywords}
    return ast.unparse(call.func) == "torch.load" and "weights_only=True" in keywords


def nodes():
    for tree in trees().values():
        yield from ast.walk(tree)


def thousands_of_lines():
    return sum(path.read_text(encoding="utf-8").count("\n") for path in ROOT.rglob("*.py")) / 1000


def test_nothing_executes_code_that_came_with_data():
    violations = [f"{m} imports {name}" for m, name in external_imports() if name.split(".")[0] in UNSAFE_MODULES]
    for module, tree in trees().items():
        violations += [f"{module}:{line} uses {name}" for line, name in unsafe_code(tree)]
    assert violations == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(p)",
        "x = yaml.load(f, L)",
        "eval('1')",
        "exec(text)",
        "f(trust_remote_code=True)",
        "g(**{'trust_remote_code': 1})",
        "from torch import load",
        "np.load(p, allow_pickle=True)",
    ],
)
def test_unsafe_code_is_found(code):
    assert list(unsafe_code(ast.parse(code)))


def test_safe_code_is_not_reported():
    assert not list(unsafe_code(ast.parse("model.eval(); yaml.compose(t); load_file(p); re.compile(x)")))
    assert not list(unsafe_code(ast.parse("torch.load(p, weights_only=True)")))


def test_files_and_functions_are_short():
    violations = []
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = lines_of_body(node)
                if length > MAX_LINES_OF_A_FUNCTION:
                    violations.append(f"{module}:{node.lineno} {node.name} has {length} lines")
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        length = len(path.read_text(encoding="utf-8").splitlines())
        if length > MAX_LINES_OF_A_FILE and name not in LONG_FILES:
            violations.append(f"{name} has {length} lines")
    assert violations == []


def lines_of_body(function):
    """Lines without signature and docstring: those of a command are one line for each option."""
    statements = function.body[1:] if ast.get_docstring(function) else function.body
    return function.end_lineno - statements[0].lineno + 1 if statements else 0


def test_every_module_has_a_docstring():
    assert [module for module, tree in trees().items() if not ast.get_docstring(tree)] == []


def test_public_signatures_are_precise():
    """`Any` in the signature of a public function or method."""
    found = []
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                found += [f"{module}:{node.lineno} {node.name}"] * count_any(node)
    assert len(found) <= MAX_PUBLIC_ANY, found


def count_any(function):
    arguments = [*function.args.args, *function.args.kwonlyargs, function.args.vararg, function.args.kwarg]
    annotations = [argument.annotation for argument in arguments if argument is not None]
    annotations.append(function.returns)
    texts = [ast.unparse(annotation) for annotation in annotations if annotation is not None]
    return sum(bool(re.search(r"\bAny\b", text)) for text in texts)


def test_one_statement_a_line():
    found = [node for node in nodes() if is_tuple_assignment(node)]
    assert len(found) / thousands_of_lines() <= MAX_TUPLE_ASSIGNMENTS


def is_tuple_assignment(node):
    """`a, b = x, y`."""
    if not isinstance(node, ast.Assign):
        return False
    return isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def test_comprehensions_are_not_nested():
    found = [node for node in nodes() if is_nested_comprehension(node)]
    assert len(found) / thousands_of_lines() <= MAX_NESTED_COMPREHENSIONS


def is_nested_comprehension(node):
    if not isinstance(node, COMPREHENSIONS):
        return False
    inner = [child for child in ast.walk(node) if child is not node]
    return any(isinstance(child, COMPREHENSIONS) for child in inner)


def test_style_checks_find_violations():
    tree = ast.parse("a, b = x, y\nz = [[i for i in row] for row in rows]\ndef f(x: Any, *, y: list[Any]) -> Any: pass")
    assignment, nested, function = tree.body
    assert is_tuple_assignment(assignment)
    assert is_nested_comprehension(nested.value)
    assert count_any(function) == 3


def test_names_are_standard_terms():
    source = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py"))
    assert [name for name in HOME_MADE_NAMES if re.search(rf"\b{name}\b", source)] == []


def test_the_version_has_three_numbers():
    assert re.fullmatch(r"\d+\.\d+\.\d+", mmx.__version__)
