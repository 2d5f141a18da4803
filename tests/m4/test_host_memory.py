"""What the host's memory allows, what an engine takes of it, and what it gives back.

What is resident is asked of the system: `mincore` for the pool, /proc/self/statm for a process. The pages expected are
those of the tokens that were computed.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folovllm import LLM, SamplingParams
from folovllm.runner import host_memory
from folovllm.runner.host_memory import GIB, cgroup_free_bytes, free_cpu_bytes
from folovllm.runner.kv_storage import KVStorage
from folovllm.runner.memory import CPU_MEMORY_SHARE
from folovllm.runner.paged_runner import PagedRunner
from tests.oracle import tiny_model

ROOT = Path(__file__).resolve().parents[2]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what is resident")
MIB = 2**20
HUGE_PAGE = 2 * MIB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama", seed=2, max_position_embeddings=2048).save_pretrained(path)
    return str(path)


# ---------------------------------------------------------------------- control groups


def make_tree(
    root: Path,
    version: int,
    own: str,
    top: str,
    limits: dict[str, tuple[object, int, int]],
    mount: str = "/sys/fs/cgroup",
) -> None:
    """A /proc and a /sys. own: the process's group; top: the group that is mounted; limits: of groups below `top`.

    A limit is (limit, used, droppable).
    """
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}
    limit_file, usage_file, droppable = names.get(version, ("memory.max", "memory.current", "inactive_file"))
    (root / "proc/self").mkdir(parents=True)
    group = f"0::{own}" if version == 2 else f"5:cpuset:/elsewhere\n4:cpu,memory:{own}\n0::/"
    (root / "proc/self/cgroup").write_text(group + "\n")
    kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,memory"
    lines = ["22 1 0:20 / /proc rw - proc proc rw", f"35 31 0:32 {top} {mount} rw,relatime shared:9 - {kind}"]
    (root / "proc/self/mountinfo").write_text("\n".join(lines) + "\n")
    for name, (limit, used, inactive) in limits.items():
        path = root / mount.strip("/") / name.strip("/")
        path.mkdir(parents=True, exist_ok=True)
        (path / limit_file).write_text(f"{limit}\n")
        (path / usage_file).write_text(f"{used}\n")
        (path / "memory.stat").write_text(f"anon 5\n{droppable} {inactive}\n")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("own", "top", "name"),
    [
        ("/", "/", "/"),  # a container that sees its group as the topmost
        ("/docker/abc", "/docker/abc", "/"),  # v1: the container's own group is mounted
        ("/docker/abc", "/", "/docker/abc"),  # no container
        ("/docker/abc", "/another", "/"),  # the process's group cannot be seen
        ("/../../abc", "/", "/"),  # nor here
    ],
)
def test_the_limit_of_a_group_counts_wherever_it_is_mounted(
    version: int, own: str, top: str, name: str, tmp_path: Path
) -> None:
    make_tree(tmp_path, version, own, top, {name: (1000 * MIB, 300 * MIB, 100 * MIB)})
    assert cgroup_free_bytes(str(tmp_path)) == [800 * MIB]  # what the kernel drops on demand is not in use


groups = st.lists(
    st.tuples(st.one_of(st.none(), st.integers(0, 2**40)), st.integers(0, 2**40), st.integers(0, 2**40)), max_size=5
)


@pytest.mark.parametrize("version", [1, 2])
@given(levels=groups)
def test_the_smallest_limit_of_nested_groups_counts(
    version: int, levels: list[tuple[int | None, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    none = 2**63 - 4096 if version == 1 else "max"
    paths = ["/" + "/".join(f"g{i}" for i in range(1, depth + 1)) for depth in range(1, len(levels) + 1)]
    root = tmp_path_factory.mktemp("tree")
    limits = {p: (none if limit is None else limit, *rest) for p, (limit, *rest) in zip(paths, levels, strict=True)}
    make_tree(root, version, paths[-1] if paths else "/", "/", limits)  # type: ignore[arg-type]
    expected = [max(0, limit - (used - min(used, free))) for limit, used, free in levels if limit is not None]
    found = cgroup_free_bytes(str(root))
    assert min([*found, 2**50]) == min([*expected, 2**50])


def test_a_limit_that_throttles_counts_and_nothing_without_files(tmp_path: Path) -> None:
    assert cgroup_free_bytes(str(tmp_path / "nothing")) == []
    make_tree(tmp_path, 2, "/a", "/", {"/a": ("max", 100, 0)})
    assert cgroup_free_bytes(str(tmp_path)) == []
    (tmp_path / "sys/fs/cgroup/a/memory.high").write_text("250\n")
    assert cgroup_free_bytes(str(tmp_path)) == [150]


def test_a_machine_of_two_versions_at_once(tmp_path: Path) -> None:
    """As systemd had it for years: the memory controller is v1, and v2 is mounted without controllers."""
    make_tree(tmp_path, 1, "/job", "/", {"/job": (500, 100, 0)}, mount="/sys/fs/cgroup/memory")
    with (tmp_path / "proc/self/mountinfo").open("a") as file:
        file.write("41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n")
    (tmp_path / "sys/fs/cgroup/unified").mkdir(parents=True)
    assert cgroup_free_bytes(str(tmp_path)) == [400]


def test_the_pool_heeds_the_container_and_the_machine(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for milestone in ("m3", "m4"):
        for machine, container, free in ((80 * MIB, [40 * MIB, 60 * MIB], 40 * MIB), (20 * MIB, [40 * MIB], 20 * MIB)):
            monkeypatch.setattr(host_memory, "_free_of_machine", lambda machine=machine: machine)
            monkeypatch.setattr(host_memory, "cgroup_free_bytes", lambda container=container: container)
            assert free_cpu_bytes() == free
            llm = LLM(folder, milestone=milestone, device="cpu", dtype="float32")
            block = 2 * 16 * 2 * 2 * 16 * 4  # layers, tokens, K and V, heads, head_dim, bytes
            assert storage(llm).num_bytes == (int(CPU_MEMORY_SHARE * free) // block + 1) * block


# ---------------------------------------------------------------------- what is taken


def storage(llm: LLM) -> KVStorage:
    runner = llm.engine.core.runner
    assert isinstance(runner, PagedRunner)
    return runner.storage


def resident_bytes(storage: KVStorage) -> int:
    """Of the pools, by mincore(2)."""
    page, total = os.sysconf("SC_PAGE_SIZE"), 0
    for pool in [*storage.device_pools, *storage.host_pools]:
        start = pool.data_ptr() // page * page
        length = pool.data_ptr() + pool.nbytes - start
        vector = (ctypes.c_ubyte * (-(-length // page)))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(length), vector) == 0
        total += sum(flag & 1 for flag in bytes(vector)) * page
    return total


@LINUX
@pytest.mark.parametrize("preemption_mode", ["recompute", "swap"])
@pytest.mark.parametrize("milestone", ["m3", "m4"])
def test_the_pool_takes_memory_as_it_is_written(milestone: str, preemption_mode: str, folder: str) -> None:
    llm = LLM(folder, milestone=milestone, device="cpu", dtype="float32", max_num_seqs=8, num_kv_blocks=60_000,
              preemption_mode=preemption_mode, swap_space=0.5)  # fmt: skip
    pools = len(storage(llm).device_pools) + len(storage(llm).host_pools)
    assert storage(llm).num_bytes > 450 * MIB
    edges = 2 * pools * HUGE_PAGE  # a pool's first and last page belong to the allocator
    assert resident_bytes(storage(llm)) <= edges
    length, count = 1500, 4
    prompts = [[i + 1] * length for i in range(count)]
    llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    written = count * length * 2 * 2 * 2 * 16 * 4  # tokens x layers, K and V, heads, head_dim, bytes
    parts = 2 * 2 * (count + 1)  # ranges of the pool: keys and values of each layer, for each request
    assert written / 2 <= resident_bytes(storage(llm)) <= written + edges + parts * HUGE_PAGE


def test_one_line_says_what_is_taken_and_why(
    folder: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(milestone: str, **kwargs: object) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO, "folovllm"):
            LLM(folder, milestone=milestone, device="cpu", dtype="float32", **kwargs)
        (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("K/V")]
        return line

    for milestone in ("m3", "m4"):
        assert "48 blocks of 16 tokens, as num_kv_blocks says" in said(milestone, num_kv_blocks=48)
        monkeypatch.setattr("folovllm.runner.memory.free_cpu_bytes", lambda: GIB)
        assert "twice what 2 requests of 100 tokens hold" in said(milestone, max_num_seqs=2, max_model_len=100)
        monkeypatch.setattr("folovllm.runner.memory.free_cpu_bytes", lambda: 4 * MIB)
        assert "25% of the memory that is free to this process; it takes memory as it is written" in said(milestone)
    for milestone, reserved in (("m1", "2,048 tokens"), ("m2", "8,192 tokens")):
        line = said(milestone, **({} if milestone == "m1" else {"max_num_seqs": 4}))
        assert reserved in line and "as much memory as its tokens take" in line


def test_more_than_is_free_is_warned_of_and_more_than_there_is_refused(
    folder: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for milestone in ("m3", "m4"):
        with pytest.raises(ValueError, match=r"as num_kv_blocks says: the system refuses so much memory"):
            LLM(folder, milestone=milestone, device="cpu", num_kv_blocks=10**14)
        with pytest.raises(ValueError, match=r"GiB of swap_space: the system refuses"):
            LLM(folder, milestone=milestone, device="cpu", num_kv_blocks=8, preemption_mode="swap", swap_space=2**20)
        monkeypatch.setattr("folovllm.engine.factory.free_cpu_bytes", lambda: 10_000)
        caplog.clear()
        LLM(folder, milestone=milestone, device="cpu", num_kv_blocks=8)
        assert "may need more than the 0.00 GiB that are free" in caplog.text
        monkeypatch.undo()
    for milestone in ("m1", "m2"):  # a count: no memory is asked for
        LLM(folder, milestone=milestone, device="cpu", num_kv_blocks=10**14)


# ---------------------------------------------------------------------- what is given back

GIVE_BACK = """
import gc, json, os, sys, weakref
from folovllm import LLM, SamplingParams
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20
def run(milestone, config, length):
    llm = LLM(config, milestone=milestone, device="cpu", dtype="float32", load_format="dummy", max_model_len=length + 1,
              max_num_batched_tokens=None if milestone in ("m1", "m2") else length)
    llm.generate([[5] * length], SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    full = resident()
    core = llm.engine.core
    return full, [weakref.ref(part) for part in (llm, llm.engine, core, core.runner, core.runner.model)]
found = {}
for milestone in ("m1", "m2", "m3", "m4"):
    run(milestone, sys.argv[1], 8)  # what is imported and kept once
    gc.collect()
    before = resident()
    gc.disable()  # no cycle keeps a part of an engine
    full, parts = run(milestone, sys.argv[1], 300)
    found[milestone] = before, full, resident(), [part() is not None for part in parts]
    gc.enable()
print("found:", json.dumps(found))
"""


@LINUX
def test_memory_goes_back_when_the_engine_goes(tmp_path: Path) -> None:
    """Weights of 70 MiB in tensors small enough for the heap, where glibc was told to keep up to a GiB."""
    config = tiny_model("llama", max_position_embeddings=2048).config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.head_dim = 512, 2048, 4, 128
    config.save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", GIVE_BACK, str(tmp_path)], capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for milestone, (before, full, after, left) in json.loads(done.stdout.split("found:")[1]).items():
        assert left == [False] * 5, (milestone, left)
        assert full - before > 50, (milestone, before, full)
        assert after - before < 0.3 * (full - before), (milestone, before, full, after)
