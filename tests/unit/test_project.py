"""The house is kept: imports run one way, the texts tell the truth, nothing is unpickled."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest
from launch import ROOT

PACKAGE = ROOT / "hf_lsam"

# Top to bottom; each room imports only from rooms below it.
ROOMS = [
    "__init__",
    "cli",
    "ray",
    "trainer",
    "card",
    "loading",
    "loop",
    "session",
    "timm_models",
    "vision",
    "arguments",
    "conflicts",
    "failure_signatures",
    "signals",
    "run",
    "joining",
    "identity",
    "data",
    "metrics",
    "record",
    "simulation",
    "optimizers",
    "worker",
    "budget",
    "memory",
    "server",
    "transport",
    "checkpoint",
    "algorithms",
    "compression",
    "nesterov",
    "anchor",
    "coupling",
    "sam",
    "batchnorm",
    "buffers",
    "generators",
    "landscape",
    "parameters",
    "fields",
    "spread",
    "files",
    "version",
]
# Arithmetic: torch and the standard library alone.
ARITHMETIC = [
    *("algorithms", "anchor", "compression", "coupling", "sam", "batchnorm", "buffers", "generators"),
    *("landscape", "nesterov", "parameters"),
]


def name_of(path: Path) -> str:
    """The module in a file; a package is the module in its `__init__.py`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_of(path: Path) -> str:
    """Where the relative imports of a file begin."""
    return name_of(path.with_name("__init__.py"))


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def modules_in(module: str, names: Sequence[str] = ()) -> set[str]:
    """The modules that `import module` or `from module import names` opens; `module` begins with the package."""
    inside = {name: f"{module}.{name}" for name in names}
    return {inside[name] if inside[name] in MODULES else module for name in names} or {module}


def imports(source: str, package: str) -> tuple[set[str], set[str]]:
    """What `source`, a module of `package`, imports anywhere, also for its annotations alone: modules of the house, and
    top-level packages outside it."""
    modules, outside = set(), set()
    for node in ast.walk(ast.parse(source)):
        found = []
        if isinstance(node, ast.Import):
            found = [(alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            found = [(module, [alias.name for alias in node.names])]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            name = node.args[0]
            if isinstance(name, ast.Constant):
                found = [(resolve_name(name.value, package), ())]
            else:  # a name that is made up as the program runs: it may be of any module of the package
                found = [(module, ()) for module in MODULES if module.rpartition(".")[0] == package]
        for module, names in found:
            if module.split(".")[0] == PACKAGE.name:
                modules |= modules_in(module, names)
            else:
                outside.add(module.split(".")[0])
    return modules, outside


@pytest.mark.parametrize("path", [path for module, path in MODULES.items() if module != PACKAGE.name], ids=str)
def test_imports_run_one_way(path):
    room = room_of(name_of(path))
    modules, outside = imports(path.read_text(), package_of(path))
    for other in {*map(room_of, modules)} - {room}:
        assert ROOMS.index(other) > ROOMS.index(room), f"{room} imports {other}, which lies above it"
    if room in ARITHMETIC:
        assert outside <= {*sys.stdlib_module_names, "torch"}, f"{room} imports {outside}"


def circle(sources: Mapping[Path, str]) -> list[str]:
    """Modules that import each other, from the first round to itself; none where imports run one way."""
    graph = {name_of(path): imports(source, package_of(path))[0] - {name_of(path)} for path, source in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_modules_import_each_other_in_a_circle():
    assert circle({path: path.read_text() for path in MODULES.values()}) == []


@pytest.mark.parametrize(
    "back",
    [
        "from .service import Service",
        "from . import service",
        "def f():\n    from .service import Service",
        "if TYPE_CHECKING:\n    from .service import Service",
    ],
)
def test_a_circle_is_seen(back):
    server = PACKAGE / "server"
    way = {server / "service.py": "from .root import Root", server / "root.py": "from .role import Role"}
    assert circle(way) == []
    found = circle({**way, server / "role.py": back})
    assert set(found) == {"hf_lsam.server.service", "hf_lsam.server.root", "hf_lsam.server.role"}


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("import hf_lsam", {"hf_lsam"}),
        ("import hf_lsam as house", {"hf_lsam"}),
        ("import torch, hf_lsam.loop", {"hf_lsam.loop"}),
        ("from hf_lsam import LSAM", {"hf_lsam"}),
        ("from hf_lsam import loop", {"hf_lsam.loop"}),
        ("from hf_lsam.loop import LSAM", {"hf_lsam.loop"}),
        ("from .. import LSAM", {"hf_lsam"}),
        ("from .. import loop", {"hf_lsam.loop"}),
        ("from ..loop import LSAM", {"hf_lsam.loop"}),
        ("from . import exchange", {"hf_lsam.simulation.exchange"}),
        ("from . import Cluster", {"hf_lsam.simulation"}),
        ("def f():\n    from ..loop import LSAM", {"hf_lsam.loop"}),
        ("if TYPE_CHECKING:\n    from ..loop import LSAM", {"hf_lsam.loop"}),
        ("import_module('hf_lsam.loop')", {"hf_lsam.loop"}),
        ("importlib.import_module('..loop', __package__)", {"hf_lsam.loop"}),
        ("__import__('hf_lsam')", {"hf_lsam"}),
        ("import_module(f'.{name}', __name__)", {each for each in MODULES if each.startswith("hf_lsam.simulation.")}),
    ],
)
def test_every_form_of_an_import_is_seen(source, modules):
    assert imports(source, "hf_lsam.simulation") == (modules, {"torch"} if "torch" in source else set())


def test_every_room_is_listed():
    assert set(map(room_of, MODULES)) == set(ROOMS)


def run_without(hidden: Sequence[str], script: str) -> None:
    """Runs `script` in a process of its own, in which the packages `hidden` cannot be imported."""
    hide = f"import sys\nfor name in {list(hidden)!r}: sys.modules[name] = None\n"
    subprocess.run([sys.executable, "-W", "ignore", "-c", hide + script], check=True, cwd=ROOT)


@pytest.mark.parametrize("module", ["algorithms", "simulation", "server.core", "worker", "optimizers"])
def test_the_method_needs_torch_alone(module):
    beside_torch = ("transformers", "accelerate", "peft", "datasets", "safetensors", "psutil", "click", "rich", "tqdm")
    run_without(beside_torch, f"import hf_lsam.{module}")


def test_the_package_needs_neither_datasets_nor_evaluate_and_the_server_no_transformers():
    run_without(
        ("datasets", "evaluate", "matplotlib"),
        "import hf_lsam.server.lifetime\n"
        "assert 'transformers' not in sys.modules and 'accelerate' not in sys.modules\n"
        "from hf_lsam import LSAMArguments, LSAMConfig, LSAMTrainer, LSAMTrainerMixin, NesterovAdamW\n",
    )


def test_nothing_is_unpickled():
    for path in MODULES.values():
        source = path.read_text()
        assert not re.search(
            r"\bpickle\b|torch\.load\(|\bmarshal\b|(?<!\.)\beval\(|(?<!\.)\bexec\(|recv_object", source
        ), path


def test_the_tree_in_the_documentation_is_the_folder():
    tree = (ROOT / "docs/tree.md").read_text().split("<!-- tree -->")[1]
    listed, folders = set(), []
    for line in tree.splitlines():
        match = re.match(r"^( *)([\w.\-]+/?)(\s{2,}.*)?$", line)
        if not match or not match.group(2).strip():
            continue
        depth = len(match.group(1)) // 2
        folders[depth:] = [match.group(2)]
        listed.add("".join(folders).rstrip("/"))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {path.split("/")[0] for path in tracked}
    package = {path for path in tracked if path.startswith("hf_lsam/") and not path.endswith("__init__.py")}
    pages = {path for path in tracked if path.startswith(("docs/", "scripts/")) and not path.endswith("__init__.py")}
    folders = {str(Path(path).parent) for path in package | pages}
    assert listed == top | package | pages | folders


TEXTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *ROOT.glob("docs/*.md"),
    ROOT / "recipes/README.md",
    *ROOT.glob("recipes/*/README.md"),
    *ROOT.glob("scripts/**/README.md"),
    ROOT / "benchmarks/README.md",
    ROOT / "model_cards/README.md",
]
FOLDERS = "hf_lsam|scripts|recipes|tests|benchmarks|model_cards|docs"


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_text_names_a_path_that_is_not_there(page):
    text = page.read_text()
    paths = re.findall(rf"`((?:{FOLDERS})/[\w./\-]+)`", text)
    paths += re.findall(r"(?<![\w./])((?:scripts|recipes)/[\w./\-]+\.(?:py|sh|yaml|md))", text)  # in commands
    for path in paths:
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for path in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / path).exists(), f"{page.name} links to {path}"


def test_what_is_on_no_index_is_not_installed_from_one():
    for path in [*MODULES.values(), *ROOT.glob("recipes/**/*.py"), *ROOT.glob("scripts/**/*.py"), *TEXTS]:
        assert not re.search(r"pip install (-U )?'?hf-lsam", path.read_text()), path


def test_the_readme_links_to_every_page_and_the_site_lists_it():
    readme, site = (ROOT / "README.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    pages = {page.name for page in ROOT.glob("docs/*.md")}
    assert pages == set(re.findall(r"- (\w+\.md)$", site, re.MULTILINE))
    assert pages - {"index.md", "api.md"} == set(re.findall(r"\]\(docs/(\w+\.md)\)", readme))


def test_the_api_reference_shows_every_member_that_it_lists():
    """mkdocstrings passes over what a class inherits, without a warning, unless told of it."""
    text = (ROOT / "docs/api.md").read_text()
    for name, options in re.findall(r"^::: ([\w.]+)\n((?:  .*\n)*)", text, re.MULTILINE):
        module, _, kind = name.rpartition(".")
        lists = {key: set(names.split(", ")) for key, names in re.findall(r"(\w+): \[(.+)\]", options)}
        for node in ast.parse(MODULES[module].read_text()).body if module in MODULES else ():
            if isinstance(node, ast.ClassDef) and node.name == kind:
                own = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
                assert lists.get("members", set()) - own == lists.get("inherited_members", set()), name


def test_the_makefile_has_every_command_that_a_text_names():
    known = set(re.findall(r"^([\w\-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [*TEXTS, ROOT / ".ci/run"]:
        text = page.read_text()
        named = re.findall(r"(?:^|`)make ([a-z\-]+)", text, re.MULTILINE)
        assert set(named) <= known, f"{page.name} names make {set(named) - known}"


def test_the_defaults_in_how_it_works_are_those_of_the_arguments():
    from hf_lsam.arguments import SYNC_STEPS, LSAMArguments

    defaults = {field.name: field.default for field in dataclasses.fields(LSAMArguments)}
    table = (ROOT / "docs/how_it_works.md").read_text().split("| symbol in the paper |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
    checked = set()
    for _, names, values in rows:
        names = re.findall(r"`(\w+)`", names)
        if names == ["sync_steps"]:
            assert values == f"{SYNC_STEPS[0]} for up to two workers, {SYNC_STEPS[1]} for more"
            assert defaults["sync_steps"] is None
        else:
            numbers = [value.strip() for value in values.split(",")][: len(names)]
            assert [float(number) for number in numbers] == [defaults[name] for name in names]
            for name, value in re.findall(r'`(\w+)="(\w+)"`', values):
                assert defaults[name] == value
        checked.update(names)
    assert len(checked) == 7


def test_the_versions_that_the_project_admits_were_tried_and_the_page_says_so():
    from scripts.tools import try_versions

    tried = json.loads(try_versions.RESULTS.read_text())
    assert tried["lowest"]["asked"] == ", ".join(try_versions.requirements("lowest"))
    assert all(test["passed"] for result in tried.values() for test in result["tests"].values())
    page = try_versions.PAGE.read_text().split("<!-- versions:begin -->\n")[1].split("\n<!-- versions:end -->")[0]
    assert page == try_versions.table(tried)
