"""A hub that cannot be asked: one short check, then the cache, or one line.

The hub is a server on this machine that fails in a way of its own for each id. What is counted is how often it is
asked: a retry would be seen there, and no time is measured. The expected tokens are those of Hugging Face's `generate`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from folovllm.models.hub import why_not_the_hub
from folovllm.models.loader import resolve_model
from tests.oracle import hf_greedy

ROOT = Path(__file__).resolve().parent.parent.parent
FAILURES = {  # the name of the repository: the status of the answer, and what the warning says
    "hangs": (None, "timed out|does not answer within 2 s"),
    "fails": (500, "status 500"),
    "overloaded": (503, "status 503"),
    "limits": (429, "status 429"),
    "portal": (200, "what answers is no hub"),  # a page to log in, as hotels have it
}
MILESTONES = ("m1", "m2", "m3", "m4")

RUN = """
import json, logging, socket, sys, threading
from folovllm import LLM, SamplingParams
logging.basicConfig(level=logging.WARNING)
def run(model, milestone):
    try:
        llm = LLM(model, milestone=milestone, dtype="float32", num_kv_blocks=64)
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        return llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0].token_ids
    except ValueError as error:
        return str(error)
cases = json.loads(sys.argv[1])
found = {}
for kind in ("server", "refused", "no name", "slow name"):
    if kind == "refused":
        def refused(self, address): raise ConnectionRefusedError(111, "Connection refused")
        socket.socket.connect = refused
    elif kind == "no name":
        def unresolved(*args, **kwargs): raise socket.gaierror(-3, "Temporary failure in name resolution")
        socket.getaddrinfo = unresolved
    elif kind == "slow name":
        socket.getaddrinfo = lambda *args, **kwargs: threading.Event().wait()
    for model, milestone in cases[kind]:
        print(kind, model, milestone, file=sys.stderr)
        found[f"{kind} {model} {milestone}"] = run(model, milestone)
print("found:", json.dumps(found))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Counter[str]]]:
    """Its address, and how often each repository was asked for."""
    asked: Counter[str] = Counter()
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            name = self.path.split("/")[2]
            asked[name] += 1
            status = FAILURES.get(name.partition(".")[0], (404, ""))[0]
            if status is None:
                over.wait()
                return
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args: object) -> None:
            """Quiet."""

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", asked
    over.set()
    running.shutdown()
    running.server_close()


def put_into_cache(home: Path, name: str, files: Path, without: str = "") -> None:
    folder = home / "hub" / f"models--org--{name}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc123")
    (folder / "snapshots" / "abc123").mkdir(parents=True)
    for file in files.iterdir():
        if file.suffix != without:
            (folder / "snapshots" / "abc123" / file.name).symlink_to(file.resolve())


def test_one_check_then_the_cache_or_one_line(server: tuple[str, Counter[str]], tmp_path: Path) -> None:
    address, asked = server
    files = Path(resolve_model("folo-tiny").path_or_id)
    for name in FAILURES:
        put_into_cache(tmp_path, name, files)
    put_into_cache(tmp_path, "no-weights", files, without=".safetensors")
    cases = {
        "server": [
            *(("org/fails", milestone) for milestone in MILESTONES),
            *((f"org/{name}", "m4") for name in FAILURES if name != "fails"),
            *((f"org/{name}.unknown", "m1") for name in FAILURES),
            ("org/nobody-has-it", "m4"),
        ],
        "refused": [("org/fails", "m4"), ("org/unknown", "m2")],
        "no name": [("org/fails", "m2"), ("org/unknown", "m4"), ("org/no-weights", "m1"), ("org/no-weights", "m4")],
        "slow name": [("org/fails", "m3")],
    }
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE" and "proxy" not in k.lower()}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(cases)], capture_output=True, text=True, cwd=ROOT, timeout=200,
        env={**environment, "HF_HOME": str(tmp_path), "HF_ENDPOINT": address, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.split("found:")[1])
    model = AutoModelForCausalLM.from_pretrained(files).eval()
    expected = hf_greedy(model, [5, 6, 7], 6)
    assert len(found) == sum(map(len, cases.values()))
    for case, result in found.items():
        kind, _, rest = case.rpartition(" org/")
        name, _milestone = rest.split()
        if name in FAILURES:
            assert result == expected, (case, result)
        elif name == "no-weights":
            assert "cannot get" in result and "no-weights" in result and "name resolution" in result, (case, result)
        else:
            assert f"cannot get config.json of 'org/{name}' from the hub" in result, (case, result)
            assert "hf download ORG/NAME" in result
            why = {
                "server": FAILURES.get(name.partition(".")[0], (0, ""))[1],
                "refused": "refused", "no name": "name resolution",
            }[kind]  # fmt: skip
            assert re.search(why, result), (case, result)
    # One request each. A hub that answers, and does not know the id, may be asked again.
    counts = {name: count for name, count in asked.items() if name.partition(".")[0] in FAILURES}
    assert counts == {**dict.fromkeys(FAILURES, 1), **{f"{n}.unknown": 1 for n in FAILURES}, "fails": len(MILESTONES)}
    assert done.stderr.count("only its cache is used") == sum(map(len, cases.values())) - 1
    assert "Retry" not in done.stderr


def test_a_hub_that_is_off_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE, which all tests set. A folder and a bundled model never ask."""
    assert why_not_the_hub("org/name") == "HF_HUB_OFFLINE is set"
    monkeypatch.setattr("folovllm.models.checkpoint.why_not_the_hub", lambda _: pytest.fail("asked the hub"))
    for name in ("folo-tiny", "qwen3-0.6b", str(ROOT / "folovllm" / "assets" / "folo-tiny")):
        assert resolve_model(name).cache_only is None and not resolve_model(name).local_files_only
