"""Where the command meets the system: encodings, files, disks, pipes, Ctrl-C. One line and the right status."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from folovllm.entrypoints import cli
from folovllm.entrypoints.terminal import check_writable, clean_exit
from tests.processes import can_be_interrupted

ROOT = Path(__file__).parents[2]
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="signals, pipes and devices of POSIX")
SMALL = ["--num-kv-blocks", "64", "--max-tokens", "8"]


def environment(**settings: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", **settings}


def run(*args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "folovllm", *args], stderr=subprocess.PIPE, encoding="utf-8", timeout=200,
        env=environment(), preexec_fn=can_be_interrupted, **kwargs,
    )  # fmt: skip


# ---------------------------------------------------------------------- encodings

COMMANDS = {
    "stream": (["generate", "🚀 né 漢字", *SMALL], 0),
    "no stream": (["generate", "🚀 né 漢字", "--no-stream", *SMALL], 0),
    "watch": (["generate", "🚀 né 漢字", "--watch", "--pace", "0", "--trace", "TRACE", *SMALL], 0),
    "replay": (["replay", "TRACE"], 0),
    "chat": (["chat", "--max-tokens", "8"], 0),
    "info": (["info"], 0),
    "museum": (["museum", "show", "half-a-character"], 0),
    "grade": (["grade"], 0),
    "help": (["generate", "--help"], 0),
    "mistake": (["generate", "--model", "🚀"], 2),
    "usage": (["generate", "--nope-🚀"], 2),
}
RUN_ALL = """
import json, sys
from folovllm.__main__ import main
status = {}
for name, args in json.loads(sys.argv[1]).items():
    sys.argv = ["folovllm", *args]
    try:
        main()
    except SystemExit as end:
        status[name] = end.code or 0
    print("end of", name, flush=True)
print("status:", json.dumps(status), file=sys.stderr)
"""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii:strict", "cp932"])
def test_what_an_encoding_lacks_is_replaced(encoding: str, tmp_path: Path) -> None:
    trace = tmp_path / "my trace é.json"
    commands = {name: [str(trace) if a == "TRACE" else a for a in args] for name, (args, _) in COMMANDS.items()}
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(commands)], timeout=250, capture_output=True,
        input=b"caf\xe9 \xf0\x9f\x9a\x80\n/quit\n",
        env=environment(PYTHONIOENCODING=encoding, FOLOVLLM_PROGRESS=str(tmp_path / "progress.json")),
    )  # fmt: skip
    name = encoding.partition(":")[0]
    said, errors = done.stdout.decode(name), done.stderr.decode(name)  # strict: it is text in that encoding
    assert done.returncode == 0, errors
    assert "Traceback" not in errors and "UnicodeEncodeError" not in errors
    assert json.loads(errors.split("status:")[1]) == {name: status for name, (_, status) in COMMANDS.items()}
    parts = dict(zip(COMMANDS, said.split("end of"), strict=False))
    assert "> ? n" in parts["stream"]
    assert "error: model=" in errors
    recorded = json.loads(trace.read_bytes())  # JSON is JSON, whatever the terminal can show
    assert recorded["traceEvents"] and recorded["folovllm"]["steps"]


# ---------------------------------------------------------------------- files


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "load_llm", lambda *_, **__: pytest.fail("the model was loaded"))


@POSIX
@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "name",
    ["/proc/trace.json", "{tmp}", "{tmp}/none/t.json", "{tmp}/" + 300 * "x", "{tmp}/file/t.json", "/proc/version"],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_model_is_loaded(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    path = name.format(tmp=tmp_path)
    result = CliRunner().invoke(cli.app, ["generate", "Hello", "--trace", path])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: trace={path!r} is not valid; allowed: a file ")
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    if name != "{tmp}/none/t.json":  # the folder that bench makes
        result = CliRunner().invoke(cli.app, ["bench", "--out", path, "--rounds", "1"])
        assert result.exit_code == 2 and result.stderr.startswith(f"error: out={path!r} is not valid")


@POSIX
def test_a_check_leaves_everything_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("kept")
    os.mkfifo(tmp_path / "pipe")  # which nobody reads: opening it would wait for ever
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("old", "new", "pipe", "link"):
        check_writable("trace", tmp_path / name)
    check_writable("trace", Path("/dev/null"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "old", "pipe"]
    assert (tmp_path / "old").read_text() == "kept"
    with pytest.raises(ValueError, match="trace="):
        check_writable("trace", Path("a\0b"))


def test_a_hint_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    trace = tmp_path / "my trace's $HOME [red].json"
    result = CliRunner().invoke(cli.app, ["generate", "Hello", "--trace", str(trace), *SMALL], env={"COLUMNS": "40"})
    assert result.exit_code == 0, result.output
    hint = next(line for line in result.stdout.splitlines() if line.startswith("To see them: "))
    assert shlex.split(hint.removeprefix("To see them: ")) == ["folovllm", "replay", str(trace)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full, on Linux")
def test_a_full_disk_is_one_line_with_the_file_it_is_about() -> None:
    result = CliRunner().invoke(cli.app, ["generate", "Hello", "--trace", "/dev/full", *SMALL])
    assert result.exit_code == 1 and "tokens generated" in result.stdout  # the answer is not lost
    assert result.stderr == "error: [Errno 28] No space left on device: '/dev/full'\n"


# ---------------------------------------------------------------------- where output goes


@pytest.fixture
def stdout(request: pytest.FixtureRequest) -> Iterator[IO[str] | None]:
    """A stdout that fails: "full", a pipe that is "closed" at the other end, or "none" at all."""
    if request.param == "none":
        yield None
        return
    if request.param == "full":
        stream = open("/dev/full", "w")  # noqa: SIM115
    else:
        read, write = os.pipe()
        os.close(read)
        stream = os.fdopen(write, "w")
    yield stream
    stream.close()  # what could not be written must not fail once more


@POSIX
@pytest.mark.parametrize("how", ["rich", "print", "out"])
@pytest.mark.parametrize(("stdout", "status"), [("full", 1), ("closed", 141), ("none", None)], indirect=["stdout"])
def test_output_that_cannot_be_written_ends_with_a_status(
    stdout: IO[str] | None,
    status: int | None,
    how: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", stdout)

    def program() -> None:
        console = Console()
        with clean_exit(console):
            for _ in range(3):
                {"rich": console.print, "out": console.out, "print": print}[how]("hello")

    if status is None:
        program()
        assert capfd.readouterr().err == ""
        return
    with pytest.raises(SystemExit) as ended:
        program()
    assert ended.value.code == status
    expected = "error: standard output cannot be written: No space left on device\n" if status == 1 else ""
    assert (
        capfd.readouterr().err.replace("error: [Errno 28] ", "error: standard output cannot be written: ") == expected
    )


@POSIX
def test_the_process_ends_as_the_command_says() -> None:
    """The interpreter flushes stdout once more at its end, and must find nothing that fails."""
    read, write = os.pipe()
    os.close(read)
    done = run("museum", "list", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
    if Path("/dev/full").exists():
        with open("/dev/full", "w") as full:
            done = run("museum", "list", stdout=full)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left" in done.stderr
        with open("/dev/full", "w") as full:  # and nowhere to say it
            assert subprocess.run(
                [sys.executable, "-m", "folovllm", "museum", "list"], stdout=full, stderr=full, env=environment()
            ).returncode == 1  # fmt: skip


def test_a_chat_without_an_input_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.read_line(Console()) is None


# ---------------------------------------------------------------------- Ctrl-C

INTERRUPT = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in range(10**9): pass\n"


@POSIX
@pytest.mark.parametrize("module", ["torch", "typer", "rich", "transformers"])
def test_ctrl_c_while_the_command_imports(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text(INTERRUPT)
    starts = [["-m", "folovllm", "info"], ["-c", "from folovllm.__main__ import main; main()"]]
    starts += [[str(ROOT / f"examples/m{i}_inference.py")] for i in range(5)] if module == "torch" else []
    for start in starts:
        done = subprocess.run(
            [sys.executable, *start], capture_output=True, text=True, timeout=200, preexec_fn=can_be_interrupted,
            env=environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}"),
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n"), start


@POSIX
def test_nothing_heavy_is_imported_before_ctrl_c_is_handled_and_a_job_that_ignores_it_goes_on() -> None:
    program = (
        "import signal, sys; before = set(sys.modules); import folovllm.__main__ as m; "
        "print(*sorted({n.partition('.')[0] for n in set(sys.modules) - before} - set(sys.stdlib_module_names))); "
        "signal.signal(signal.SIGINT, signal.SIG_IGN); m.prepare(); print(signal.getsignal(signal.SIGINT).name)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert done.stdout.split() == ["folovllm", "SIG_IGN"], done.stderr


@POSIX
def test_a_command_handles_ctrl_c_itself_and_gives_it_back() -> None:
    from folovllm.entrypoints.start import interrupted

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        with pytest.raises(SystemExit) as ended, clean_exit(Console()):
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            raise KeyboardInterrupt
        assert ended.value.code == 130 and signal.getsignal(signal.SIGINT) is interrupted
    finally:
        signal.signal(signal.SIGINT, before)
