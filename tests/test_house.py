"""The house rules: what holds for every file, whatever it does. The sources are read, not run."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "folovllm"
MODULES = sorted(PACKAGE.rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS_WITHOUT_SOURCES = {".git", ".venv", "build", "dist", "_build", "__pycache__"}
TEXT_SUFFIXES = {"", ".css", ".html", ".ipynb", ".js", ".json", ".md", ".py", ".sh", ".svg", ".toml", ".txt"}


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def tree_of(file: Path) -> ast.Module:
    return ast.parse(text_of(file))


def own_text_files() -> Iterator[Path]:
    for file in sorted(ROOT.rglob("*")):
        parts = file.relative_to(ROOT).parts
        hidden_folder = any(part.startswith(".") and part != ".ci" for part in parts[:-1])
        made_by_tools = any(part in FOLDERS_WITHOUT_SOURCES or part.endswith(".egg-info") for part in parts)
        if hidden_folder or made_by_tools:
            continue
        if file.is_file() and file.suffix in TEXT_SUFFIXES:
            yield file


each_module = pytest.mark.parametrize("module", MODULES, ids=name_of)


# --- packaging --------------------------------------------------------------------------------------------


def pins() -> dict[str, Version]:
    found: dict[str, Version] = {}
    for line in text_of(ROOT / "constraints.txt").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            assert canonicalize_name(name) not in found, f"constraints.txt pins {name} twice"
            found[canonicalize_name(name)] = Version(version)
    return found


def requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    return [Requirement(line) for group in (project["dependencies"], *extras.values()) for line in group]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_the_tested_version_lies_in_the_allowed_range(requirement: Requirement) -> None:
    pinned = pins()
    name = canonicalize_name(requirement.name)
    assert name in pinned, f"constraints.txt does not pin {requirement.name}"
    assert pinned[name] in requirement.specifier


def test_pins_name_no_build_of_one_machine() -> None:
    # 2.13.0+cpu exists on one index only; 2.13.0 exists everywhere and admits it.
    assert [name for name, version in pins().items() if version.local] == []


def test_package_and_project_state_one_version() -> None:
    stated = re.search(r'^__version__ = "(.*)"$', text_of(PACKAGE / "__init__.py"), re.MULTILINE)
    assert stated is not None
    assert stated.group(1) == PYPROJECT["project"]["version"]


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {module.parent for module in MODULES}
    assert [name_of(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_a_wheel_carries_the_modules_and_the_assets(tmp_path: Path) -> None:
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    for name in ("pyproject.toml", "README.md", "LICENSE", "folovllm"):
        # Building in a copy of links leaves no build folder in the source tree.
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=tmp_path / "source", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("folovllm-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())

    assets = [
        file
        for folder in ("assets", "course/assets", "course/museum")
        for file in (PACKAGE / folder).rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(PACKAGE).parts)
    ]
    expected = {name_of(file) for file in [*MODULES, *assets, PACKAGE / "py.typed"]}
    assert expected - packed == set()
    assert [name for name in packed if not name.startswith(("folovllm/", "folovllm-"))] == []


def test_the_command_exists() -> None:
    module, _, attribute = PYPROJECT["project"]["scripts"]["folovllm"].partition(":")
    source = ROOT / Path(*module.split(".")).with_suffix(".py")
    assert attribute in {node.name for node in tree_of(source).body if isinstance(node, ast.FunctionDef)}


def test_importing_the_package_loads_neither_triton_nor_matplotlib() -> None:
    # TRITON_INTERPRET counts only before Triton's first import, and plots must not cost a server its start.
    code = "import sys; from folovllm import LLM; print(*sorted({'triton', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# --- make and CI ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["demo", "test", "mutants", "lint", "notebooks", "docs", "tags", "bench", "help"])
def test_make_knows_the_target(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Nothing to be done" not in done.stdout


def test_make_help_lists_every_target() -> None:
    makefile = text_of(ROOT / "Makefile")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"^  make ([a-z]+)", done.stdout, re.MULTILINE) == phony.group(1).split()


def test_ci_is_executable() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty git repository, as on a machine where nobody has configured git."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "repository"
    run_git(tmp_path, "init", "--quiet", str(folder))
    return folder


def run_git(folder: Path, *args: str, **environment: str) -> str:
    env = {**os.environ, **environment}
    done = subprocess.run(("git", *args), cwd=folder, check=True, capture_output=True, text=True, env=env)
    return done.stdout.strip()


def commit(folder: Path, subject: str, *trailers: str) -> str:
    who = ("-c", "user.name=Ada", "-c", "user.email=ada@example.org")
    when = "2020-02-02T02:02:02+00:00"  # long ago: a tag of today shows
    message = "\n".join([subject, "", "Why it was done.", "", *trailers])
    run_git(folder, *who, "commit", "--quiet", "--allow-empty", "--message", message, GIT_COMMITTER_DATE=when)
    return run_git(folder, "rev-parse", "HEAD")


def make_tags(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / ".ci" / "make_tags.py"], cwd=folder, capture_output=True, text=True)


def test_tags_stand_at_the_newest_commit_of_each_milestone(repository: Path) -> None:
    commit(repository, "First try", "Milestone: m0")
    m0 = commit(repository, "The baseline, mended", "Milestone: m0", "Co-authored-by: Grace <g@example.org>")
    commit(repository, "Milestone: m2 is only talked about here")
    m1_and_m2 = commit(repository, "Two at once", "Milestone: m1", "Milestone: m2")
    commit(repository, "A slip", "Milestone: m7")

    done = make_tags(repository)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["m0", "m1", "m2"]
    assert "The baseline, mended" in done.stdout
    assert "m7" in done.stderr
    assert run_git(repository, "tag", "--list").split() == ["m0", "m1", "m2"]
    pointed_at = {tag: run_git(repository, "rev-parse", f"{tag}^{{commit}}") for tag in ("m0", "m1", "m2")}
    assert pointed_at == {"m0": m0, "m1": m1_and_m2, "m2": m1_and_m2}
    assert run_git(repository, "cat-file", "-t", "m0") == "tag"  # annotated: an object of its own
    assert run_git(repository, "for-each-ref", "--format=%(taggername) %(taggerdate:short)", "refs/tags/m0") == (
        "Ada 2020-02-02"
    )

    objects = run_git(repository, "show-ref", "--tags")
    assert make_tags(repository).returncode == 0
    assert run_git(repository, "show-ref", "--tags") == objects

    moved = commit(repository, "M1, mended", "Milestone: m1")
    assert make_tags(repository).returncode == 0
    assert run_git(repository, "rev-parse", "m1^{commit}") == moved


def test_tags_without_a_milestone_in_the_history(repository: Path) -> None:
    commit(repository, "Nothing special")
    done = make_tags(repository)
    assert done.returncode == 0, done.stderr
    assert "no commit has a" in done.stdout.lower()
    assert run_git(repository, "tag", "--list") == ""


def test_tags_outside_a_repository_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("GIT_DIR", raising=False)
    done = make_tags(tmp_path)
    assert done.returncode == 1
    assert "not a git repository" in done.stderr


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    # Spelled in parts, or this file would be the first to be found.
    homes = "|".join(["work", "root", "home/[a-z]+", "Users/[a-z]+", "tmp/[a-z]+"])
    path = re.compile(rf"(?<![\w.~-])/(?:{homes})\b")
    found = []
    for file in own_text_files():
        for number, line in enumerate(text_of(file).splitlines(), start=1):
            if match := path.search(line):
                found.append(f"{name_of(file)}:{number}: {match.group()}")
    assert found == []


# --- the package's sources --------------------------------------------------------------------------------


@each_module
def test_a_module_fits_in_a_sitting(module: Path) -> None:
    assert len(text_of(module).splitlines()) <= 400


@each_module
def test_no_assert_is_used_as_a_check(module: Path) -> None:
    # `python -O` removes them.
    assert [node.lineno for node in ast.walk(tree_of(module)) if isinstance(node, ast.Assert)] == []


@each_module
def test_no_handler_swallows_everything(module: Path) -> None:
    # One that cleans up and raises again swallows nothing.
    def is_blanket(kind: ast.expr | None) -> bool:
        kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
        return any(k is None or ast.unparse(k) in ("Exception", "BaseException") for k in kinds)

    def raises_again(handler: ast.ExceptHandler) -> bool:
        last = handler.body[-1]
        return isinstance(last, ast.Raise) and last.exc is None

    handlers = [node for node in ast.walk(tree_of(module)) if isinstance(node, ast.ExceptHandler)]
    if module.as_posix().endswith(("folovllm/engine/retry.py", "folovllm/attention/trial.py")):
        assert (
            len(handlers) == 1
        )  # whatever a forward or a compiler raises, it is said, in a request's output or an error
        return
    assert [h.lineno for h in handlers if is_blanket(h.type) and not raises_again(h)] == []


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions_of(tree: ast.Module) -> Iterator[tuple[Function, bool]]:
    """Each function of a module or of its classes, and whether a user can name it without an underscore."""

    def visit(body: list[ast.stmt], public: bool) -> Iterator[tuple[Function, bool]]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from visit(node.body, public and not node.name.startswith("_"))
            elif isinstance(node, Function):
                yield node, public and not node.name.startswith("_")

    yield from visit(tree.body, True)


def is_plain(function: Function, methods: set[str]) -> bool:
    """Whether it needs no docstring: it says itself what it is, or overrides what a class above it describes."""
    one_line = len(function.body) == 1 and isinstance(function.body[0], ast.Return)
    a_property = any("property" in ast.unparse(decorator) for decorator in function.decorator_list)
    return (a_property and one_line) or function.name in methods


@each_module
def test_every_public_name_is_documented(module: Path) -> None:
    tree = tree_of(module)
    silent = [] if ast.get_docstring(tree) else [f"{name_of(module)} itself"]
    derived = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.bases]
    overrides = {f.name for node in derived for f in node.body if isinstance(f, Function)}
    silent += [
        f.name for f, public in functions_of(tree) if public and not ast.get_docstring(f) and not is_plain(f, overrides)
    ]
    silent += [
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert silent == []


@each_module
def test_every_function_is_annotated(module: Path) -> None:
    bare = []
    for function, _ in functions_of(tree_of(module)):
        a = function.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        unnamed = [arg.arg for arg in arguments if arg.annotation is None and arg.arg not in ("self", "cls")]
        if function.returns is None or unnamed:
            bare.append(f"{function.name}({', '.join(unnamed)})")
    assert bare == []


@each_module
def test_module_level_containers_are_constants(module: Path) -> None:
    containers = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    makers = {"list", "dict", "set", "defaultdict", "deque", "OrderedDict", "Counter"}
    state = []
    for node in tree_of(module).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        made = isinstance(node.value, ast.Call) and ast.unparse(node.value.func).split(".")[-1] in makers
        if made or isinstance(node.value, containers):
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            state += [n for n in names if n.strip("_") != n.strip("_").upper() and n != "__all__"]
    globals_used = [node.lineno for node in ast.walk(tree_of(module)) if isinstance(node, ast.Global)]
    assert (state, globals_used) == ([], [])
