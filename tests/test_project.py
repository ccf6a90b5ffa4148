"""The house is kept: imports run one way, the texts tell the truth, nothing is unpickled."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_lsam"

# Top to bottom; each room imports only from rooms below it.
ROOMS = [
    "cli",
    "trainer",
    "card",
    "loading",
    "loop",
    "vision",
    "arguments",
    "callbacks",
    "run",
    "identity",
    "data",
    "figures",
    "record",
    "simulation",
    "optimizers",
    "worker",
    "rates",
    "server",
    "transport",
    "checkpoint",
    "algorithms",
    "anchor",
    "coupling",
    "sam",
    "batchnorm",
    "landscape",
    "parameters",
]
# Arithmetic: torch and the standard library alone.
ARITHMETIC = ["algorithms", "anchor", "coupling", "sam", "batchnorm", "landscape", "parameters"]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, inside the package) for every import that is made when the module runs."""
    tree = ast.parse(path.read_text())
    only_types = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for node in ast.walk(branch)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in only_types:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((node.module, False))
        elif isinstance(node, ast.ImportFrom):
            folder = path.parent if node.level == 1 else path.parents[node.level - 1]
            module = ".".join(filter(None, [*folder.relative_to(PACKAGE).parts, node.module]))
            found += [(name, True) for name in ([module] if module else [alias.name for alias in node.names])]
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", [m for m in MODULES if m.parent != PACKAGE or m.stem != "__init__"], ids=str)
def test_imports_run_one_way(path):
    room = room_of(path)
    for module, inside in imports(path):
        if inside and module.split(".")[0] != room:
            below = ROOMS.index(module.split(".")[0])
            assert below > ROOMS.index(room), f"{room} imports {module}, which lies above it"
        if room in ARITHMETIC and not inside:
            assert module.split(".")[0] in {*sys.stdlib_module_names, "torch"}, f"{room} imports {module}"


def test_every_room_is_listed():
    rooms = {room_of(path) for path in MODULES} - {"__init__"}
    assert rooms == set(ROOMS)


def test_the_package_needs_neither_datasets_nor_evaluate_and_the_server_no_transformers():
    script = (
        "import sys\n"
        "for name in ('datasets', 'evaluate', 'matplotlib', 'yaml_blocked'): sys.modules[name] = None\n"
        "import hf_lsam.server.lifetime\n"
        "assert 'transformers' not in sys.modules and 'accelerate' not in sys.modules\n"
        "from hf_lsam import LSAMArguments, LSAMConfig, LSAMTrainer, LSAMTrainerMixin\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


def test_nothing_is_unpickled():
    for path in MODULES:
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


def test_the_readme_links_to_every_page_and_the_site_lists_it():
    readme, site = (ROOT / "README.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    pages = {page.name for page in ROOT.glob("docs/*.md")}
    assert pages == set(re.findall(r"- (\w+\.md)$", site, re.MULTILINE))
    assert pages - {"index.md", "api.md"} == set(re.findall(r"\]\(docs/(\w+\.md)\)", readme))


def test_the_makefile_has_every_command_that_a_text_names():
    known = set(re.findall(r"^([\w\-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [*TEXTS, ROOT / ".ci/run"]:
        text = page.read_text()
        named = re.findall(r"(?:^|`)make ([a-z\-]+)", text, re.MULTILINE)
        assert set(named) <= known, f"{page.name} names make {set(named) - known}"


def test_the_defaults_in_how_it_works_are_those_of_the_arguments():
    from hf_lsam.arguments import EXCHANGES, SYNC_STEPS, LSAMArguments

    defaults = {field.name: field.default for field in dataclasses.fields(LSAMArguments)}
    table = (ROOT / "docs/how_it_works.md").read_text().split("| symbol in the paper |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
    checked = set()
    for _, names, values in rows:
        names = re.findall(r"`(\w+)`", names)
        if names == ["sync_steps"]:
            assert values == f"so that a run has about {EXCHANGES} exchanges, {SYNC_STEPS[0]} to {SYNC_STEPS[1]}"
            assert defaults["sync_steps"] is None
        else:
            numbers = [value.strip() for value in values.split(",")][: len(names)]
            assert [float(number) for number in numbers] == [defaults[name] for name in names]
            for name, value in re.findall(r'`(\w+)="(\w+)"`', values):
                assert defaults[name] == value
        checked.update(names)
    assert len(checked) == 7
