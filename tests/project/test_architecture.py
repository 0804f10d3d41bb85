"""Who may import whom: down only. Each failure prints the sentence of the rule that broke, and where."""

import ast
import re
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import mmx

ROOT = Path(mmx.__file__).parent

# From the ground up; a room may import its own floor and those below.
FLOORS = [
    [
        "errors",
        "complaints",
        "config",
        "settings",
        "features",
        "memory",
        "attention",
        "layers",
        "packing",
        "files",
        "shards",
        "images",
        "sounds",
        "tokenizer",
        "prompts",
    ],
    ["encoders", "projection", "distance", "looking", "question_encoder", "decoder", "cache"],
    ["sources"],
    ["sharing"],
    ["model"],
    ["checkpoint", "generation", "inspection", "importers"],
    ["bulk", "pipeline", "data"],
    ["training", "evaluation", "faithfulness", "bench", "studies"],
    ["cli", "output", "journal", "demo", "testing", "scaffold", "__main__"],
]
ISLANDS = ["metrics"]
FRONT_DOOR = "__init__"
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
ENCODER_WING, DECODER_WING = {"encoders"}, {"projection", "distance", "looking", "question_encoder", "decoder", "cache"}

GUESTS = {  # heavy package -> the rooms it may enter
    "accelerate": {"training"},
    "peft": {"training"},
    "gradio": {"demo"},
    "matplotlib": {"inspection"},
    "typer": {"cli"},
    "transformers": {"tokenizer", "encoders", "importers", "bench"},
}
WITHOUT_TORCH = ["errors", "complaints", "config", "settings", "prompts", "metrics"]
TORCH = {"torch", "torchvision", "timm", "transformers", "accelerate", "safetensors.torch"}
DRAWERS = {"utils", "util", "common", "core", "helpers", "helper", "misc"}
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"}
REMOTE = ("trust_remote_code", "allow_pickle")
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 450, 80


@cache
def modules():
    """Dotted name -> syntax tree of every module."""
    trees = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return trees


def room(module):
    """mmx.training.loop -> training."""
    return module.split(".")[1]


def imported(module, tree):
    """Dotted names a module imports, inside functions too; `from mmx.a import b` is mmx.a.b where there is one."""
    known = modules()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = any(other.startswith(module + ".") for other in known) or module == "mmx.__init__"
                parts = module.split(".") if is_package and module != "mmx.__init__" else module.split(".")[:-1]
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                yield resolved(f"{base}.{alias.name}", base)


def resolved(name, base):
    """The module that a name of the front door, or of a package, stands for."""
    if base == "mmx" and name.removeprefix("mmx.") in mmx._ADDRESSES:
        return mmx._ADDRESSES[name.removeprefix("mmx.")]
    return name if name in modules() else base


@cache
def arrows():
    """(importing module, imported module) within mmx; `import mmx` and its version are the front door, on no floor."""
    found = []
    for module, tree in modules().items():
        for name in imported(module, tree):
            if name.startswith("mmx."):
                found.append((module, name))
    return found


def guests():
    """(module, package outside mmx that it imports)."""
    for module, tree in modules().items():
        for name in imported(module, tree):
            if name.split(".")[0] != "mmx":
                yield module, name


def rule(sentence, broken):
    """Fail with the sentence of the rule and every place that breaks it."""
    broken = sorted(set(broken))
    assert not broken, "\n  ".join([sentence, *broken])


def test_the_reader_of_imports_reads():
    """Without arrows all rules would hold."""
    assert ("mmx.models.decoder", "mmx.memory") in arrows()
    assert ("mmx.cli.measure", "mmx.training.loop") in arrows(), "an import inside a function"
    assert ("mmx.evaluation.metrics.captions", "mmx.evaluation.metrics.ptb_tokenizer") in arrows(), "a relative import"
    assert ("mmx.training.distributed", "accelerate") in set(guests())
    assert len(modules()) > 30
    with pytest.raises(AssertionError, match=r"A rule\s+here"):
        rule("A rule", ["here"])


def test_every_room_has_a_floor():
    rooms = {room(module) for module in modules()} - {FRONT_DOOR}
    rule("Every module of mmx stands on a floor of the design.", rooms - set(FLOOR) - set(ISLANDS))


def test_imports_go_down_only():
    broken = []
    for importer, target in arrows():
        here, there = room(importer), room(target)
        if here in FLOOR and there in FLOOR and FLOOR[there] > FLOOR[here]:
            broken.append(f"{importer} imports {target}")
    rule("Who may import whom: down only.", broken)


def test_the_front_door_imports_nothing_and_leads_to_what_exists():
    rule("The front door resolves its names lazily.", [t for m, t in arrows() if m == "mmx.__init__"])
    targets = set(mmx._ADDRESSES.values())
    rule("Every name of the front door leads to a module.", targets - set(modules()))
    for name, address in mmx._ADDRESSES.items():
        named = {getattr(node, "name", None) for node in ast.walk(modules()[address])}  # functions, classes, imports
        assert name in named, f"mmx.{name} leads to {address}, which has none"
    assert len(mmx._ADDRESSES) <= 13, "the front door has at most about a dozen names"


def test_the_wings_meet_only_above():
    broken = []
    for importer, target in arrows():
        here, there = room(importer), room(target)
        if (here in ENCODER_WING and there in DECODER_WING) or (here in DECODER_WING and there in ENCODER_WING):
            broken.append(f"{importer} imports {target}")
    rule(
        "The wings (encoders | projection, decoder, cache) never import each other; they meet in sources and model.",
        broken,
    )


def test_an_encoder_imports_no_other_encoder():
    own = {f"mmx.encoders{part}" for part in ("", ".base", ".contract", ".registry", ".survey")}
    rule(
        "An encoder file imports encoders/base and the ground floor, never another encoder.",
        [
            f"{importer} imports {target}"
            for importer, target in arrows()
            if room(importer) == "encoders" and room(target) == "encoders" and target != "mmx.encoders.base"
            if importer not in own or target not in own
            if not target.startswith(importer + ".")  # an encoder may be a package
        ],
    )


def test_metrics_are_an_island():
    rule(
        "metrics imports nothing of mmx and no torch: text in, number out.",
        [f"{m} imports {t}" for m, t in arrows() if room(m) == "metrics" and room(t) != "metrics"]
        + [
            f"{m} imports {t}"
            for m, t in guests()
            if room(m) == "metrics" and t.split(".")[0] not in sys.stdlib_module_names
        ],
    )


@pytest.mark.parametrize("guest", GUESTS)
def test_heavy_guests_have_one_room(guest):
    rooms = GUESTS[guest]
    rule(
        f"{guest} is imported in {', '.join(sorted(rooms))} only.",
        [f"{m} imports {t}" for m, t in guests() if t.split(".")[0] == guest and room(m) not in rooms],
    )


def test_no_torch_where_none_is_needed():
    """Whatever these rooms import of mmx is without torch as well."""
    reached = {m for m in modules() if room(m) in WITHOUT_TORCH or m == "mmx.__init__"}
    grown = True
    while grown:
        further = {t for m, t in arrows() if m in reached} - reached
        reached, grown = reached | further, bool(further)
    rule(
        "metrics, errors, config, settings, prompts and the front door import no torch.",
        [f"{m} imports {t}" for m, t in guests() if m in reached and (t in TORCH or t.split(".")[0] in TORCH)],
    )


@pytest.mark.parametrize(
    "module",
    [
        "mmx",
        "mmx.errors",
        "mmx.config.schema",
        "mmx.config.loader",
        "mmx.text.prompts",
        "mmx.evaluation.metrics.captions",
        "mmx.cli",
    ],
)
def test_importing_does_no_work_and_brings_no_torch(module):
    heavy = "[m for m in ('torch','numpy','PIL','transformers','accelerate','gradio','matplotlib') if m in sys.modules]"
    code = f"import sys, {module}, logging; print({heavy}, logging.root.handlers)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert run.stdout.strip() == "[] []", (
        f"import {module} brings heavy guests, or sets up logging: {run.stdout}{run.stderr}"
    )


def test_help_is_instant():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, "-m", "mmx", "--help"], capture_output=True, text=True, cwd=ROOT.parent)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"python -m mmx --help: {seconds:.2f} s of processor time")
    assert run.returncode == 0, run.stderr
    assert "caption" in run.stdout
    assert seconds < 1.5, "a third of a second, were nothing else to be done; torch alone takes more than this"


def test_there_are_no_drawers():
    rule(
        "No utils, common, core, helpers: a helper lives beside its only user, or earns a name.",
        [m for m in modules() if set(m.split(".")) & DRAWERS],
    )


def test_there_are_no_import_cycles():
    """Between modules, imports inside functions too; a package's __init__ stands for the package."""
    targets = {}
    for importer, target in arrows():
        if importer != target:
            targets.setdefault(importer, set()).add(target)

    def cycle(module, trail):
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in safe:
            return None
        for target in sorted(targets.get(module, ())):
            found = cycle(target, [*trail, module])
            if found:
                return found
        safe.add(module)
        return None

    safe = set()
    found = [cycle(module, []) for module in sorted(targets)]
    rule("Import cycles: none.", [" -> ".join(trail) for trail in found if trail])


def unsafe(tree):
    """What in a syntax tree could run code that came with data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE_CALLS and not tensors_alone(node):
            yield node.lineno, ast.unparse(node.func)
        elif isinstance(node, ast.keyword) and node.arg in REMOTE and ast.unparse(node.value) != "False":
            yield node.value.lineno, node.arg
        elif isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "allow_pickle"):
            yield node.lineno, node.value
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from ((node.lineno, name) for name in names & UNSAFE_CALLS)


def tensors_alone(call):
    """torch.load that builds nothing but tensors."""
    told = {ast.unparse(keyword) for keyword in call.keywords}
    return ast.unparse(call.func) == "torch.load" and "weights_only=True" in told


def test_nothing_runs_code_that_came_with_data():
    broken = [f"{m} imports {t}" for m, t in guests() if t.split(".")[0] in UNSAFE_MODULES]
    for module, tree in modules().items():
        broken += [f"{module}:{line} uses {what}" for line, what in unsafe(tree)]
    rule("No pickle, torch.load, yaml.load, eval or trust_remote_code in the package.", broken)


@pytest.mark.parametrize(
    "code",
    ["torch.load(p)", "x = yaml.load(f, L)", "eval('1')", "f(trust_remote_code=True)", "g(**{'trust_remote_code': 1})",
     "from torch import load", "np.load(p, allow_pickle=True)", "exec(text)"],
)  # fmt: skip
def test_the_search_for_unsafe_code_finds_it(code):
    assert list(unsafe(ast.parse(code)))
    assert not list(unsafe(ast.parse("model.eval(); yaml.compose(t); load_file(p); re.compile(x)")))


def test_files_and_functions_stay_of_a_size_to_live_in():
    broken = []
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > MOST_LINES_OF_A_FUNCTION:
                    broken.append(f"{module}:{node.lineno} {node.name} has {length} lines")
    for path in ROOT.rglob("*.py"):
        length = len(path.read_text(encoding="utf-8").splitlines())
        if length > MOST_LINES_OF_A_FILE:
            broken.append(f"{path.relative_to(ROOT)} has {length} lines")
    rule(f"A function has at most {MOST_LINES_OF_A_FUNCTION} lines, a file at most {MOST_LINES_OF_A_FILE}.", broken)


def test_every_module_says_what_it_is():
    silent = [module for module, tree in modules().items() if not ast.get_docstring(tree)]
    rule("Every module begins with a sentence on what it is.", silent)


def test_the_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+", mmx.__version__)
