"""The structure: the engine knows nothing of the course, its packages depend on each other one way, with vLLM's names.

Imports are read from the sources, whatever they stand under, except TYPE_CHECKING: what is only a type is no
dependency. What is imported through others counts, too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "folovllm"
COURSE = "folovllm.course"


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}
ENGINE = [name for name in FILES if name != COURSE and not name.startswith(f"{COURSE}.")]


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements at any depth, without those for type checkers alone."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse)
            continue
        yield node
        for field in ("body", "orelse", "finalbody", "handlers"):
            children = getattr(node, field, [])
            for child in children:
                yield from statements(child.body if isinstance(child, ast.ExceptHandler) else [child])


@cache
def imports_of(module: str) -> frozenset[str]:
    """The modules that one names, those outside of the package by their first part."""
    found: set[str] = set()
    for node in statements(ast.parse(FILES[module].read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= inner or {node.module}
    return frozenset(name if name.startswith("folovllm") else name.partition(".")[0] for name in found)


def reachable(module: str) -> set[str]:
    """All that is imported with a module, directly or through others."""
    seen, queue = set[str](), [module]
    while queue:
        for name in imports_of(queue.pop()) - seen:
            seen.add(name)
            if name in FILES:
                queue.append(name)
    return seen


@pytest.mark.parametrize("module", ENGINE)
def test_the_engine_never_imports_the_course(module: str) -> None:
    assert {name for name in reachable(module) if name.startswith(COURSE)} == set()


def test_importing_the_engine_loads_none_of_the_course() -> None:
    code = (
        "import sys; from folovllm import LLM, LLMEngine; import folovllm.entrypoints.cli;"
        "print(*(m for m in sys.modules if m.startswith('folovllm.course') or m in ('matplotlib', 'triton')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("package", ["scheduler", "kv_cache"])
def test_the_scheduler_and_the_kv_cache_need_no_torch(package: str) -> None:
    for module in (name for name in FILES if name.startswith(f"folovllm.{package}.")):
        assert reachable(module) & {"torch", "transformers", "numpy"} == set(), module


def test_the_model_layer_knows_no_request_and_no_scheduler() -> None:
    for module in (name for name in FILES if name.startswith("folovllm.models.")):
        packages = {name.split(".")[1] for name in reachable(module) if name.startswith("folovllm.")}
        assert packages & {"scheduler", "runner", "engine", "entrypoints", "request"} == set(), module


def edges() -> dict[str, set[str]]:
    """Package -> the packages that its modules import. A module at the top level is a package of its own."""
    found: dict[str, set[str]] = {}
    for module in ENGINE:
        if module in ("folovllm", "folovllm.__main__"):
            continue
        own = module.split(".")[1]
        others = {name.split(".")[1] for name in imports_of(module) if name.startswith("folovllm.")}
        found.setdefault(own, set()).update(others - {own})
    return found


def test_the_packages_have_no_cycle() -> None:
    left = edges()
    while free := {package for package, needed in left.items() if not needed & left.keys()}:
        left = {package: needed for package, needed in left.items() if package not in free}
    assert left == {}


def test_a_request_is_at_most_four_calls_away_from_a_step() -> None:
    """`LLM.generate` -> ... -> `EngineCore.step`, as Python has it."""
    code = """
import traceback
from folovllm import LLM, SamplingParams
llm = LLM("folo-tiny", max_model_len=64, num_kv_blocks=16)
step, depth = llm.engine.core.step, []
def counted():
    names = [f.name for f in traceback.extract_stack() if "/folovllm/" in f.filename.replace(chr(92), "/")]
    depth.append(names)
    return step()
llm.engine.core.step = counted
llm.generate([[1, 2, 3]], SamplingParams(max_tokens=1), use_tqdm=False)
print(*depth[0])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    calls = done.stdout.split()
    assert calls[0] == "generate" and len(calls) <= 4, calls


# --- names ------------------------------------------------------------------------------------------------

# Names of ours before they were vLLM V1's: those that cannot be anything else, wherever they are written ...
GONE = {
    "ref_counts", "longest_piece", "CoreOutput", "RunnerOutput", "make_queue", "NewRequest", "new_requests",
    "finished_ids", "preempted_ids", "resumed_ids", "InputBuffers", "UserRequest", "run_longest_step", "free_bytes",
    "prefix_groups", "PrefixGroup",
}  # fmt: skip
# ... and ordinary words, which our classes must not define again. By class: old name -> vLLM's.
KV_MANAGER = {"match": "get_computed_blocks", "reserve": "allocate_slots", "release": "free", "commit": "cache_blocks"}
POOL = {"allocate": "get_new_blocks", "share": "touch", "release": "free_blocks"}
QUEUE = {name: f"{name}_request" for name in ("add", "prepend", "peek", "pop", "remove")}
RENAMED = {
    "KVCacheManager": KV_MANAGER,
    "ContiguousKVManager": KV_MANAGER,
    "BlockManager": KV_MANAGER,
    "BlockPool": POOL,
    "Scheduler": {"update": "update_from_output", "abort": "finish_requests"},
    "RequestQueue": QUEUE,
    "FCFSQueue": QUEUE,
    "SortedQueue": QUEUE,
    "ModelRunner": {"execute": "execute_model"},
    "HFRunner": {"execute": "execute_model"},
    "PagedRunner": {"execute": "execute_model"},
}
CALLS = {  # how an instance is written where it is used: old names that must not be called on it
    r"(.*\.)?kv": KV_MANAGER,
    r"(.*\.)?(manager|books)": KV_MANAGER,
    r"(.*\.)?(host_)?pool": POOL,
    r"(.*\.)?scheduler": RENAMED["Scheduler"],
    r"(.*\.)waiting": QUEUE,
    r"(.*\.)?runner": RENAMED["ModelRunner"],
}
SOURCES = sorted(
    file
    for folder in ("folovllm", "tests", "docs", "notebooks", "examples", "milestones")
    for file in (ROOT / folder).rglob("*.py")
    if "_build" not in file.parts
)


def test_the_old_names_are_gone_from_every_file() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    word = re.compile(rf"(?<!\w)({'|'.join(sorted(GONE))})(?!\w)")
    found = []
    for name in files:
        file = ROOT / name
        # Where learners are told the new names, the old ones have to stand.
        tells = name in ("folovllm/course/grading/runner.py", "tests/course/test_grade.py")
        kept = name == "CHANGELOG.md" or tells or file == Path(__file__).resolve()
        if not kept and file.suffix in (".py", ".md", ".ipynb", ".toml", ".js", ".html") and file.is_file():
            found += [f"{name}: {m.group()}" for m in word.finditer(file.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_no_old_method_is_defined_or_called_on_our_classes(file: Path) -> None:
    ours = PACKAGE in file.parents
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            table = RENAMED.get(node.name, {}) if ours else {}
            bases = [ast.unparse(base) for base in node.bases]
            for base in bases:
                table = table | RENAMED.get(base, {})
            methods = [f.name for f in node.body if isinstance(f, ast.FunctionDef)]
            found += [f"{node.name}.{name} is {table[name]}" for name in methods if name in table]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            receiver = ast.unparse(node.func.value)
            for pattern, table in CALLS.items():
                if node.func.attr in table and re.fullmatch(pattern, receiver):
                    found.append(f"line {node.lineno}: {receiver}.{node.func.attr} is {table[node.func.attr]}")
    assert found == []
