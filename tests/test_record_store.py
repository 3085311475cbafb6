"""The append-only store: nothing lost, nothing twice, nothing mixed."""

import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blspkd_fairseq.data.record_store import RecordStore, StoreError

SETTINGS = {"llm": "a", "length": 48}


def store(path: Path, **changes: object) -> RecordStore:
    return RecordStore(path, {**SETTINGS, **changes})


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    texts = ['"quotes" \\ tab\t line\nbreak \u2028 🙂', "", "日本語"]
    with store(tmp_path / "a.jsonl") as one:
        one.add([{"id": str(i), "text": text} for i, text in enumerate(texts)])
        assert one["1"] == {"id": "1", "text": ""}  # read while it is open for writing
        one.add([{"id": "last", "text": "x"}])
    with store(tmp_path / "a.jsonl") as again:
        assert list(again.ids()) == ["0", "1", "2", "last"] and len(again) == 4
        assert [again[i]["text"] for i in ("0", "1", "2")] == texts
        assert "last" in again and "3" not in again


def test_half_a_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with store(path) as one:
        one.add([{"id": "a"}, {"id": "b"}])
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        with store(path) as again:
            left = list(again.ids())
            again.add([{"id": i} for i in ("a", "b") if i not in left])
        assert path.read_bytes() == whole


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    with store(tmp_path / "a.jsonl") as one:
        one.add([{"id": "a"}])
    with pytest.raises(StoreError, match="length was 48 and is 64"):
        store(tmp_path / "a.jsonl", length=64)
    with store(tmp_path / "a.jsonl") as one:  # the refusal has let go of it
        assert len(one) == 1


def test_settings_of_a_store_without_records_do_not_bind(tmp_path: Path) -> None:
    store(tmp_path / "a.jsonl").close()
    with store(tmp_path / "a.jsonl", length=64) as one:
        one.add([{"id": "a"}])
    with pytest.raises(StoreError, match="other settings"):
        store(tmp_path / "a.jsonl")


def test_a_second_process_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with store(path) as one:
        one.add([{"id": "a"}])
        code = f"from blspkd_fairseq.data.record_store import *; RecordStore(Path({str(path)!r}), {SETTINGS!r})"
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another process is writing" in second.stderr
        reader = RecordStore(path, SETTINGS, read_only=True)
        assert list(reader.ids()) == ["a"]
        with pytest.raises(StoreError, match="reading only"):
            reader.add([{"id": "b"}])


def test_a_repeated_id_is_refused_and_nothing_of_its_batch_written(tmp_path: Path) -> None:
    with store(tmp_path / "a.jsonl") as one:
        one.add([{"id": "a"}])
        for batch in ([{"id": "b"}, {"id": "a"}], [{"id": "c"}, {"id": "c"}]):
            with pytest.raises(StoreError, match="already has"):
                one.add(batch)
        assert list(one.ids()) == ["a"]
    assert (tmp_path / "a.jsonl").read_text() == '{"id": "a"}\n'


@pytest.mark.parametrize("line", ["no json", "[1]", '{"id": [1]}', '{"text": "no id"}', '{"id": "a"}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    with store(path) as one:
        one.add([{"id": "a"}])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(StoreError, match="line 2"):
        store(path)


def test_records_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(StoreError, match="settings.json"):
        store(tmp_path / "a.jsonl")


@pytest.mark.parametrize("content", ["", "null", "[]", "{", '"text"'])
def test_damaged_settings_are_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    with store(path) as one:
        one.add([{"id": "a"}])
    (tmp_path / "a.jsonl.settings.json").write_text(content)
    with pytest.raises(StoreError, match=r"a.jsonl.settings.json is damaged.*move both away"):
        store(path)


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with store(path) as one:
            one.add([{"id": "a"}])
            resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))
            with pytest.raises(StoreError, match="make room"):
                one.add([{"id": "b", "text": "x" * 100}])
            assert path.read_text() == '{"id": "a"}\n'
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            one.add([{"id": "b"}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == '{"id": "a"}\n{"id": "b"}\n'


_WRITER = """
import sys, time
from blspkd_fairseq.data.record_store import *
path, limit = Path(sys.argv[1]), int(sys.argv[2])
with RecordStore(path, {}) as store:
    for i in range(3000):
        if str(i) not in store:
            store.add([{"id": str(i), "text": "word " * (i % 50)}])
        while path.stat().st_size > limit:  # waits to be killed, which a busy machine may do late
            time.sleep(1)
"""


def test_killed_again_and_again_it_loses_and_repeats_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rng = random.Random(0)
    for _ in range(8):
        limit = (path.stat().st_size if path.exists() else 0) + 40_000
        process = subprocess.Popen([sys.executable, "-c", _WRITER, str(path), str(limit)])
        while process.poll() is None and (not path.exists() or path.stat().st_size < limit - rng.randrange(40_000)):
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -9
    subprocess.run([sys.executable, "-c", _WRITER, str(path), "1000000000"], check=True)
    with RecordStore(path, {}) as whole:
        assert list(whole.ids()) == [str(i) for i in range(3000)]
        assert all(whole[str(i)]["text"] == "word " * (i % 50) for i in range(0, 3000, 7))
