"""What is downloaded of a hub repository: the weight files that are read, at M1 and M4 as in transformers.

The hub is a server on this machine that hands out folders and notes what is asked for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from folovllm.models.checkpoint import WEIGHT_FILES
from tests.oracle import tiny_model

ROOT = Path(__file__).resolve().parent.parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SINGLE, INDEX, BIN, BIN_INDEX = WEIGHT_FILES

READ_ALL = """
import sys, torch
from transformers import AutoModelForCausalLM
from folovllm.models.loader import LoadSpec, load_config, load_hf_model, resolve_model
from folovllm.models.weights import load_decoder
settings = torch.float32, torch.device("cpu")
for repository in sys.argv[1:]:
    source, reader = resolve_model(repository), repository.partition(".")[2]
    if reader == "transformers":
        AutoModelForCausalLM.from_pretrained(repository, dtype=torch.float32)
    elif reader == "m1":
        load_hf_model(source, *settings)
    else:
        load_decoder(LoadSpec(source, load_config(source), *settings))
"""


@contextmanager
def hub(folders: dict[str, Path]) -> Iterator[tuple[str, dict[str, set[str]]]]:
    """A server of `folders`, by id up to the dot: its address, and for each id the files that were downloaded."""
    asked: dict[str, set[str]] = {}

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            if path.startswith("api/models/"):
                parts = path.split("/")
                folder = folders[parts[3].partition(".")[0]]
                names = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
                tree = [{"type": "file", "path": n, "oid": n, "size": (folder / n).stat().st_size} for n in names]
                info = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
                body = json.dumps(tree if "tree" in parts else info).encode()
                return self.answer(body, Content_Type="application/json")
            name, _, file = path.partition("/resolve/")
            name = name.removeprefix("org/")
            folder = folders.get(name.partition(".")[0])
            wanted = folder and folder / file.partition("/")[2]
            if wanted is None or not wanted.is_file():
                return self.answer(b"", 404, X_Error_Code="EntryNotFound")
            if self.command == "GET":
                asked.setdefault(name, set()).add(file.partition("/")[2])
            return self.answer(wanted.read_bytes(), ETag=f'"{hash(str(wanted)):x}"')

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def read(repositories: list[str], **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, *repositories], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    model = tiny_model("llama", seed=3)
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    made = {}
    for name in ("single", "shards", "bin", "bin-shards", "everything"):
        folder = made[name] = tmp_path / name
        (folder / "original").mkdir(parents=True)
        model.config.save_pretrained(folder)
        save_file(tensors, folder / "consolidated.safetensors")
        save_file(tensors, folder / "original" / SINGLE)
        (folder / "model.gguf").write_bytes(b"GGUF")
        (folder / "pytorch_model-of-another-day.bin").write_bytes(b"")
        if name in ("single", "everything"):
            save_file(tensors, folder / SINGLE, {"format": "pt"})
        if name in ("shards", "everything"):
            for i, half in enumerate(halves):
                save_file(half, folder / f"model-{i}.safetensors", {"format": "pt"})
            put_index(folder / INDEX, {f"model-{i}.safetensors": half for i, half in enumerate(halves)})
        if name in ("bin", "everything"):
            torch.save(tensors, folder / BIN)
        if name in ("bin-shards", "everything"):
            for i, half in enumerate(halves):
                torch.save(half, folder / f"pytorch_model-{i}.bin")
            put_index(folder / BIN_INDEX, {f"pytorch_model-{i}.bin": half for i, half in enumerate(halves)})
    return made


def put_index(file: Path, files: dict[str, dict[str, torch.Tensor]]) -> None:
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_download_asks_for_what_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    readers = ("transformers", "m1", "m4")
    repositories = [f"org/{name}.{reader}" for name in folders for reader in readers]
    settings = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1", "DISABLE_SAFETENSORS_CONVERSION": "1"}
    with hub(folders) as (address, asked):
        read(repositories, HF_ENDPOINT=address, HF_HUB_OFFLINE="0", **settings)
    weights = {name: {file for file in files if not file.endswith("config.json")} for name, files in asked.items()}
    assert weights["single.transformers"] == weights["everything.transformers"] == {SINGLE}
    assert weights["shards.transformers"] == {INDEX, "model-0.safetensors", "model-1.safetensors"}
    assert weights["bin.transformers"] == {BIN}
    assert weights["bin-shards.transformers"] == {BIN_INDEX, "pytorch_model-0.bin", "pytorch_model-1.bin"}
    for name in folders:
        for reader in ("m1", "m4"):
            assert weights[f"{name}.{reader}"] == weights[f"{name}.transformers"], (name, reader)
    # And what is in the cache is enough.
    read([f"org/{name}.m4" for name in folders], HF_HUB_OFFLINE="1", **settings)
