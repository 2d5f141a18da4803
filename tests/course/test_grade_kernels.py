"""Grading kernels: a milestone's second folder, Triton's interpreter, and systems without Triton."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from folovllm.course.grading.no_triton import MISSING, tl, triton
from folovllm.course.grading.runner import environment, find_milestones, pytest_arguments, run_checks
from tests.needs import need_module

KERNELS = find_milestones()["m3-kernels"]
needs_triton = need_module("triton")


def test_a_milestones_second_folder_goes_by_its_whole_name(tmp_path: Path) -> None:
    for folder in ("m1_one", "m1_two_parts", "m2_other"):
        (tmp_path / "milestones" / folder).mkdir(parents=True)
        (tmp_path / "milestones" / folder / "test_exercise.py").touch()
    found = find_milestones(tmp_path)
    assert {name: milestone.folder.name for name, milestone in found.items()} == {
        "m1": "m1_one",
        "m1-two-parts": "m1_two_parts",
        "m2": "m2_other",
    }
    assert [milestone.name for milestone in found.values()] == list(found)


@pytest.mark.slow
@needs_triton
def test_what_is_raised_in_a_kernel_is_shown_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "my_file.py"
    signature = "out: tl.tensor, x: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr"
    file.write_text(
        "from __future__ import annotations\n\nimport triton\nimport triton.language as tl\n\n\n"
        f"@triton.jit\ndef copy_kernel({signature}) -> None:\n"
        "    places = tl.arange(0, BLOCK)\n    tl.store(out + place, tl.load(x + places))\n"
    )
    report = run_checks(KERNELS, file, ["copy_kernel", "row_sum_kernel"])
    copied, summed = report.exercises
    failure = copied.first_failure
    assert failure is not None and failure.kind == "raised" and failure.line == 10
    assert failure.message == "NameError: name 'place' is not defined"
    assert summed.status == "not started"


def test_without_triton_a_file_of_kernels_can_be_loaded_and_says_what_is_missing() -> None:
    @triton.jit
    def kernel(x: tl.tensor) -> None:  # type: ignore[name-defined]
        """What it does."""

    assert (kernel.__name__, kernel.__doc__) == ("kernel", "What it does.")
    for run in (lambda: kernel[(1,)], lambda: kernel(0)):
        with pytest.raises(RuntimeError, match="Triton is not installed"):
            run()


@pytest.mark.slow
def test_without_triton_the_plain_exercises_are_graded() -> None:
    """In a process in which it cannot be imported."""
    code = "import sys; sys.modules['triton'] = None\nimport pytest\nsys.exit(pytest.main(sys.argv[1:]))\n"
    options = [*pytest_arguments(KERNELS), "-q", "--impl", str(KERNELS.folder / "solution.py")]
    done = subprocess.run(
        [sys.executable, "-c", code, *options], env=environment(), capture_output=True, text=True, timeout=120
    )
    plain = 4 + 6 + 5
    assert f"{plain} passed" in done.stdout, done.stdout[-2000:]
    assert f"RuntimeError: {MISSING[:23]}" in done.stdout


@pytest.mark.slow
@needs_triton
def test_kernels_are_graded_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says: nobody needs to know of the variable."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    report = run_checks(KERNELS, KERNELS.folder / "solution.py", ["copy_kernel"])
    assert [exercise.status for exercise in report.exercises] == ["passed"]
