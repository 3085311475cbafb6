"""The runner of the GPU's gate: no step hangs it, none hides another, and what it writes is whole."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
from gpu_check import Gate, Outcome, Step


def python(program: str) -> list[str]:
    return [sys.executable, "-S", "-u", "-c", program]


def summary(out: Path) -> dict[str, tuple[str, str]]:
    steps = json.loads((out / "summary.json").read_text(encoding="utf-8"))["steps"]
    return {step["name"]: (step["status"], step["result"]) for step in steps}


def is_alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().split(")")[1][:4]
    except OSError:
        return False


def test_a_step_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    child = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid); time.sleep(60)"
    steps = [
        Step("hangs", python(child), 0.7),
        Step("after", python("print('result: fine')"), 20, gpu_check.told_results),
    ]
    assert not Gate(tmp_path, {}).run(steps)
    found = summary(tmp_path)
    assert found["hangs"][0] == "timeout" and "limit of 1 s" in found["hangs"][1]
    assert found["after"] == ("ok", "fine")
    (started,) = [int(word) for word in found["hangs"][1].split() if word.isdigit() and int(word) > 1]
    for _ in range(50):
        if not is_alive(started):
            break
        time.sleep(0.02)
    assert not is_alive(started)


def test_a_failing_step_is_reported_and_the_rest_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [
        Step("fails", python("print('what is wrong'); raise SystemExit(3)"), 20),
        Step("missing", [str(tmp_path / "no-such-command")], 20),
        Step("left out", [], 0, skipped="nothing to do"),
        Step("works", python("print('result: one'); print('result: two')"), 20, gpu_check.told_results),
    ]
    assert not Gate(tmp_path, {}).run(steps)
    found = summary(tmp_path)
    assert found["fails"] == ("failed", "exit code 3: what is wrong")
    assert found["missing"][0] == "failed" and "cannot be started" in found["missing"][1]
    assert found["left out"] == ("skipped", "nothing to do")
    assert found["works"] == ("ok", "one, two")
    printed = capsys.readouterr().out
    assert printed.index("== fails") < printed.index("== works") < printed.index("step            status")
    assert "what is wrong" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "summary.json"]


def test_what_is_done_must_exit(tmp_path: Path) -> None:
    steps = [
        Step("lingers", python("import time; print('done training'); time.sleep(60)"), 30, exits_after="done training")
    ]
    begin = time.monotonic()
    assert not Gate(tmp_path, {}, exit_seconds=0.3).run(steps)
    assert time.monotonic() - begin < 5
    assert "to exit after 'done training'" in summary(tmp_path)["lingers"][1]


def test_steps_that_would_begin_too_late_are_skipped_and_the_last_one_is_cut(tmp_path: Path) -> None:
    gate = Gate(tmp_path, {}, seconds=0.2)
    assert gate.run([Step("first", python("import time; time.sleep(.3)"), 9), Step("late", python("print()"), 9)])
    assert summary(tmp_path)["late"] == ("skipped", "the 0 seconds of --seconds are over")


def test_a_gate_that_is_terminated_still_tells_what_it_knows(tmp_path: Path) -> None:
    program = (
        "import sys, gpu_check\n"
        "from pathlib import Path\n"
        "run = [gpu_check.Step(n, ['sleep', s], 60) for n, s in (('one', '0'), ('two', '60'), ('three', '0'))]\n"
        "with gpu_check.interrupted_by_termination():\n"
        "    sys.exit(not gpu_check.Gate(Path(sys.argv[1]), {}).run(run))\n"
    )
    scripts = str(Path(gpu_check.__file__).parent)
    command = [sys.executable, "-u", "-c", program, str(tmp_path)]
    gate = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": scripts})
    assert gate.stdout is not None
    for line in gate.stdout:
        if line.startswith("== two"):
            break
    time.sleep(0.2)
    gate.send_signal(signal.SIGTERM)
    gate.communicate(timeout=10)
    assert {name: status for name, (status, _) in summary(tmp_path).items()} == {
        "one": "ok", "two": "skipped", "three": "skipped",
    }  # fmt: skip


def test_every_step_has_a_limit_and_fits_the_files_that_may_come_back(tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        args = gpu_check.parse(["--out", str(tmp_path), "--device", device])
        steps = gpu_check.make_steps(args, tmp_path / "work")
        names = [step.name for step in steps]
        assert len(set(names)) == len(names)
        assert all(0 < step.limit <= 300 for step in steps if not step.skipped)
        written = {word for step in steps for word in step.command if word.endswith(".csv")}
        assert len(written) + len(("log.txt", "summary.json")) <= 8
        assert ("--cpu" in next(step for step in steps if step.name == "train").command) == (device == "cpu")
    with pytest.raises(SystemExit):
        gpu_check.parse(["--out", str(tmp_path), "--steps", "versions,nonsense"])


def test_long_logs_keep_both_ends_and_no_progress_bars() -> None:
    text = "begin\n" + "10%\r20%\r100%\n" + "x" * 2_000_000 + "\nend"
    short = gpu_check.shorten(text)
    assert short.startswith("begin\n100%\n") and short.endswith("end") and len(short) < 800_000


def test_what_pytest_says_is_found() -> None:
    printed = (
        "two processes spoke over gloo\nFAILED tests/test_a.py::test_b[c d] - Error\n1 failed, 5 passed in 3.21s\n"
    )
    assert gpu_check.told_tests(printed) == (
        "1 failed, 5 passed in 3.21s; two processes spoke over gloo; test_a.py::test_b[c d]"
    )


def test_the_table_has_a_line_for_each_step() -> None:
    lines = gpu_check.table([Outcome("one", "ok", 1.5, "fine"), Outcome("two", "skipped")]).splitlines()
    assert len(lines) == 3 and lines[1].split() == ["one", "ok", "1.5", "fine"]


@pytest.mark.slow
def test_the_steps_that_no_other_test_runs_are_green_on_a_cpu(tmp_path: Path) -> None:
    steps = "versions,models,launches,training-0.5b-16,generation"
    command = [sys.executable, gpu_check.__file__, "--device", "cpu", "--quick", "--steps", steps, "--out", tmp_path]
    gate = subprocess.run(list(map(str, command)), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert gate.returncode == 0, gate.stdout
    found = summary(tmp_path)
    assert list(found) == steps.split(",") and {status for status, _ in found.values()} == {"ok"}
    # Only the variants of this run, in its order, and every one of them.
    assert [part.partition(":")[0] for part in found["training-0.5b-16"][1].split(", ")] == [
        "default options", "published", "padded rows", "float32 products",
    ]  # fmt: skip
    assert "tokens/s" in found["generation"][1]


def test_a_command_that_cannot_be_killed_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one is that hangs inside a driver."""
    monkeypatch.setattr(gpu_check, "_KILL_SECONDS", 0.2)
    monkeypatch.setattr(gpu_check.os, "killpg", lambda *_: None)
    process = subprocess.Popen(python("import time; time.sleep(60)"))
    begin = time.monotonic()
    gpu_check.kill_group(process)
    assert time.monotonic() - begin < 5 and process.poll() is None
    process.kill()
    process.wait()


def test_the_result_of_a_benchmark_is_that_of_its_own_variants(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(
        "models,batch,variant,utterances_per_second\n0.5b,2,published,7\n0.5b,2,default options,26\n7b,2,published,1\n"
    )
    told = gpu_check.told_training(path, "0.5b", 2, "default options,padded rows")
    assert told("") == "default options: 26/s"


def test_first_tokens_are_told_for_each_length_and_batch() -> None:
    line = "model m  device d  seconds %s  batch %d  system %s  first_token_s 0.4  first_token_ratio %s\n"
    printed = (
        line % ("3", 1, "stream", "1.00") + line % ("3", 1, "cascade", "2.18") + line % ("10", 16, "cascade", "15.8")
    )
    assert gpu_check.told_first_tokens(printed) == "3 s, batch 1: 2.18x, 10 s, batch 16: 15.8x"
