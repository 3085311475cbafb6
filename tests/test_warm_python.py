"""Commands of the warm Python end as those of a cold one."""

import subprocess
import sys
from pathlib import Path

import pytest
import warm_python


def both(script: str, given: str = "") -> list[tuple[int, str, str]]:
    """Status, output and last line of errors of a shell's script with a warm Python and a cold one."""
    found = []
    for folder in (warm_python.commands(), Path(sys.executable).parent):
        environment = warm_python.environment(PATH=f"{folder}:/usr/bin:/bin", WORD="said")
        done = subprocess.run(
            ["bash", "-c", script], input=given, capture_output=True, text=True, env=environment, timeout=120
        )
        found.append((done.returncode, done.stdout, done.stderr.strip().rpartition("\n")[2]))
    return found


@pytest.mark.parametrize(
    "script",
    [
        "python -c 'import os, sys; print(sys.argv, os.environ[\"WORD\"], input(), os.getcwd())' a 'b c'",
        "cd /usr; python -c 'import os; print(os.getcwd())' | cat",
        "python -c 'import sys; sys.exit(3)'",
        "python -c 'import sys; sys.exit(\"no\")'",
        "python -c 'import atexit; atexit.register(print, 7); 1 / 0'",
        "exec 2> /dev/null; python -c 'import os; os.kill(os.getpid(), 9)'; echo $?",
        "python -c 'import time; time.sleep(60)' & sleep 1; kill $!; wait $!; echo $?",
        "python -m json.tool --no-ensure-ascii",
        "python -V; echo 'print(7)' | python -",
        "fairseq-train --nonsense",
        "blspkd --nonsense",
    ],
)
def test_a_command_ends_as_a_cold_one(script: str) -> None:
    warm, cold = both(script, given="[1]\n")
    assert warm == cold


def test_a_script_is_the_main_module_and_finds_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("FOUND = 5\n")
    main = "import sys, beside\nif __name__ == '__main__':\n    print(beside.FOUND, __file__, sys.argv)\n"
    (tmp_path / "main.py").write_text(main)
    warm, cold = both(f"python {tmp_path}/main.py x")
    assert warm == cold and warm[1].startswith("5 ")


def test_a_command_ends_with_the_one_who_asked(tmp_path: Path) -> None:
    script = f"import pathlib, time; time.sleep(2); pathlib.Path('{tmp_path}/late').touch()"
    both_ended = f'python -c "{script}" & sleep 0.7; kill -9 $!; wait $!; sleep 2.5; ls {tmp_path}'
    environment = warm_python.environment()
    done = subprocess.run(["bash", "-c", both_ended], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0 and done.stdout == ""
