"""Layout and imports: packages import only from packages below them, heavy dependencies stay in one place."""

import resource
import subprocess
import sys

import pytest
from package_source import PUBLIC_MODULE, ROOT, external_imports, internal_imports, package_of, trees

import mmx

# From the bottom to the top: a package imports itself and the packages before it.
ORDER = (
    "errors",
    "boxes",
    "memory_rows",
    "memory",
    "config",
    "io",
    "nn",
    "text",
    "encoders",
    "models",
    "hub",
    "generation",
    "interpret",
    "inference",
    "data",
    "evaluation",
    "training",
    "bench",
    "studies",
    "testing",
    "demo",
    "cli",
    "__main__",
)
MAX_TOP_LEVEL_ENTRIES = 22
MAX_PUBLIC_NAMES = 24

HEAVY = {  # distribution -> where it may be imported: packages, or modules of a package
    "accelerate": ("mmx.training",),
    "peft": ("mmx.training",),
    "gradio": ("mmx.demo",),
    "matplotlib": ("mmx.interpret.plots",),
    "typer": ("mmx.cli",),
    "transformers": ("mmx.text.tokenizer", "mmx.encoders.pretrained", "mmx.hub", "mmx.bench"),
}
WITHOUT_TORCH = ("mmx.errors", "mmx.config", "mmx.text.prompts", "mmx.evaluation.metrics", "mmx.__init__")
TORCH = {"torch", "torchvision", "timm", "transformers", "accelerate", "safetensors.torch"}
HEAVY_AT_IMPORT = ("torch", "numpy", "PIL", "transformers", "accelerate", "gradio", "matplotlib")
ENCODER_INFRASTRUCTURE = {"base", "contract", "registry", "discovery"}
CATCH_ALL_NAMES = {"utils", "util", "common", "core", "helpers", "helper", "misc"}


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def assert_none(rule: str, violations) -> None:
    """Fail with the rule and everything that breaks it."""
    found = sorted(set(violations))
    assert not found, "\n  ".join([rule, *found])


def test_imports_are_found():
    """Without any import found, every rule would hold."""
    assert ("mmx.models.decoder", "mmx.memory") in internal_imports()
    assert ("mmx.evaluation.metrics.captions", "mmx.evaluation.metrics.ptb_tokenizer") in internal_imports(), "relative"
    assert ("mmx.cli.demo", "mmx.demo.server") in internal_imports(), "an import inside a function"
    assert any(module.startswith("mmx.training") and name == "accelerate" for module, name in external_imports())
    with pytest.raises(AssertionError, match=r"A rule\s+here"):
        assert_none("A rule", ["here"])


def test_every_package_has_a_place_in_the_order():
    packages = {package_of(module) for module in trees()} - {"__init__"}
    assert_none("A module or package of mmx is not in ORDER.", packages ^ set(ORDER))


def test_the_top_level_is_small():
    entries = [path.name for path in ROOT.iterdir() if not path.name.startswith("__") and path.name != "py.typed"]
    assert len(entries) <= MAX_TOP_LEVEL_ENTRIES, sorted(entries)


def test_imports_go_downwards():
    violations = []
    for importer, target in internal_imports():
        if ORDER.index(package_of(target)) > ORDER.index(package_of(importer)):
            violations.append(f"{importer} imports {target}")
    assert_none(f"Imports go downwards: {', '.join(ORDER)}.", violations)


def test_encoders_and_models_meet_only_in_the_source():
    """`mmx.models.source` builds encoders; nothing else of the decoder's side knows them."""
    allowed = {"mmx.models.source", "mmx.models.model", "mmx.models.checkpoint"}
    violations = []
    for importer, target in internal_imports():
        if package_of(importer) == "models" and package_of(target) == "encoders" and importer not in allowed:
            violations.append(f"{importer} imports {target}")
    assert_none("Encoders and decoder meet only in Memory.", violations)


def test_an_encoder_imports_no_other_encoder():
    infrastructure = {"mmx.encoders", *(f"mmx.encoders.{name}" for name in ENCODER_INFRASTRUCTURE)}
    violations = []
    for importer, target in internal_imports():
        if package_of(importer) != "encoders" or package_of(target) != "encoders":
            continue
        inside_one_encoder = importer.split(".")[:3] == target.split(".")[:3]
        if importer not in infrastructure and target not in infrastructure and not inside_one_encoder:
            violations.append(f"{importer} imports {target}")
    assert_none("An encoder imports mmx.encoders.base, never another encoder.", violations)


def test_metrics_import_only_the_standard_library():
    violations = []
    for importer, target in internal_imports():
        if importer.startswith("mmx.evaluation.metrics") and not target.startswith("mmx.evaluation.metrics"):
            violations.append(f"{importer} imports {target}")
    for importer, name in external_imports():
        is_standard = name.split(".")[0] in sys.stdlib_module_names
        if importer.startswith("mmx.evaluation.metrics") and not is_standard:
            violations.append(f"{importer} imports {name}")
    assert_none("Metrics take texts and return numbers; they import nothing else of mmx.", violations)


@pytest.mark.parametrize("distribution", HEAVY)
def test_heavy_dependencies_are_imported_in_one_place(distribution):
    allowed = HEAVY[distribution]
    importers = [m for m, name in external_imports() if name.split(".")[0] == distribution]
    violations = [module for module in importers if not is_within(module, allowed)]
    assert_none(f"{distribution} is imported in {', '.join(allowed)} only.", violations)


def test_modules_without_torch():
    """Neither these modules nor anything of mmx that they import."""
    reached = {module for module in trees() if is_within(module, WITHOUT_TORCH)}
    previous = None
    while reached != previous:
        previous = set(reached)
        reached |= {target for module, target in internal_imports() if module in previous and target in trees()}
    violations = []
    for module, name in external_imports():
        if module in reached and module != PUBLIC_MODULE and (name in TORCH or name.split(".")[0] in TORCH):
            violations.append(f"{module} imports {name}")
    assert_none(f"No torch below {', '.join(WITHOUT_TORCH)}.", violations)


def test_importing_has_no_side_effects():
    """One interpreter imports all light modules: no heavy package comes along, and logging is not configured."""
    modules = "mmx, mmx.errors, mmx.config.schema, mmx.config.loader, mmx.text.prompts, mmx.cli.app"
    code = (
        f"import sys, logging, {modules}, mmx.evaluation.metrics.captions; "
        f"print([m for m in {HEAVY_AT_IMPORT} if m in sys.modules], logging.root.handlers)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert run.stdout.strip() == "[] []", run.stdout + run.stderr


def test_help_does_not_import_torch():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", "-m", "mmx", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"python -m mmx --help: {seconds:.2f} s of processor time")
    imported = {line.split("|")[-1].strip() for line in run.stderr.splitlines()}
    assert run.returncode == 0
    assert "caption" in run.stdout
    assert not imported & set(HEAVY_AT_IMPORT)
    assert seconds < 1.5, "about 0.4 s; torch alone takes more than the limit"


def test_public_names_resolve_and_the_package_is_typed():
    for name in mmx.__all__:
        assert getattr(mmx, name) is not None
    assert len(mmx.__all__) <= MAX_PUBLIC_NAMES
    assert (ROOT / "py.typed").exists()
    with pytest.raises(AttributeError, match="no_such_name"):
        mmx.no_such_name  # noqa: B018 (the access is the test)


def test_there_are_no_catch_all_modules():
    violations = [module for module in trees() if set(module.split(".")) & CATCH_ALL_NAMES]
    assert_none("No utils, common, core, helpers: name a module after what it does.", violations)


def test_there_are_no_import_cycles():
    """Between modules, imports inside functions too; the `__init__` of a package counts as the package."""
    targets: dict[str, set[str]] = {}
    for importer, target in internal_imports():
        if importer != target:
            targets.setdefault(importer, set()).add(target)
    finished: set[str] = set()
    cycles: list[str] = []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            cycles.append(" -> ".join([*path[path.index(module) :], module]))
            return
        if module in finished:
            return
        for target in sorted(targets.get(module, ())):
            visit(target, [*path, module])
        finished.add(module)

    for module in sorted(targets):
        visit(module, [])
    assert_none("No import cycles.", cycles)
