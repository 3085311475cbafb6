"""Responses of the LLM: one per row, the same bytes however the work was cut up."""

import json
import random
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import generate_responses
import pytest
import tiny
import warm_python

from blspkd_fairseq.data.manifest import Manifest, write_manifest
from blspkd_fairseq.data.prompts import resolve_prompt
from blspkd_fairseq.data.record_store import RecordStore, StoreError
from blspkd_fairseq.generation import responses
from blspkd_fairseq.generation.responses import (
    HuggingFaceBackend,
    Request,
    ResponseSettings,
    is_refusal,
    model_identity,
    plan_batches,
    shard_of,
)

ROWS = 150
SCRIPT = Path(generate_responses.__file__)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llm(tmp_path_factory.mktemp("llm") / "tiny")


def write_input(path: Path, rows: int = ROWS, **cells: str) -> Path:
    rng = random.Random(0)
    made = []
    for i in range(rows):
        words = rng.choices(" ".join(tiny.SENTENCES).split(), k=rng.randrange(1, 12))
        text = ' "quoted\\'.join(words[:2]) + " " + " ".join(words)
        made.append({"id": f"r{i}", "audio": "none.wav", "n_frames": 1, "src_text": text, **cells})
    write_manifest(path, made)
    return path


def arguments(folder: Path, llm: Path, *options: Any) -> list[str]:
    base = ["--input", folder / "in.tsv", "--output", folder / "out.tsv", "--llm", llm, "--llm-dtype", "float32"]
    return [str(a) for a in (*base, "--max-new-tokens", 8, "--batch-size", 4, "--keep-refusals", *options)]


def run(folder: Path, llm: Path, *options: Any) -> bytes:
    generate_responses.main(arguments(folder, llm, *options))
    output = folder / "out.tsv"
    return output.read_bytes() if output.exists() else b""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, llm: Path) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_input(folder / "in.tsv")
    return folder, run(folder, llm)


# ---- plan ----------------------------------------------------------------------------------------------------------


def test_batches_hold_every_row_once_and_are_of_similar_length() -> None:
    rng = random.Random(1)
    rows = [Request(str(i), "x" * rng.randrange(100), "p") for i in range(1000)]
    batches = list(plan_batches(rows, 4))
    assert sorted(int(r.id) for batch in batches for r in batch) == list(range(1000))
    assert all(len(batch) <= 4 for batch in batches)
    spread = [max(len(r.text) for r in b) - min(len(r.text) for r in b) for b in batches]
    assert sum(spread) / len(spread) < 5  # 60 in random order


def test_rows_added_at_the_end_leave_earlier_windows_alone() -> None:
    rows = [Request(str(i), "x" * (i * 7 % 100), "p") for i in range(600)]
    window = 4 * responses.WINDOW_BATCHES
    before, after = list(plan_batches(rows[:500], 4)), list(plan_batches(rows, 4))
    assert before[: window // 4] == after[: window // 4]


def test_shards_are_even_and_depend_on_the_id_alone() -> None:
    counts = [0] * 4
    for i in range(4000):
        counts[shard_of(f"row-{i}", 4)] += 1
    assert min(counts) > 900 and sum(counts) == 4000


# ---- answers -------------------------------------------------------------------------------------------------------


def test_every_row_gets_what_the_llm_says_to_it_alone(undisturbed: tuple[Path, bytes], llm: Path) -> None:
    manifest = Manifest.load(undisturbed[0] / "out.tsv")
    source = Manifest.load(undisturbed[0] / "in.tsv")
    backend = HuggingFaceBackend(ResponseSettings(str(llm), "float32", max_new_tokens=8))
    lengths = set()
    for i in range(0, ROWS, 10):
        row = manifest[i]
        [alone] = backend.answer([Request(row["id"], source[i]["src_text"], resolve_prompt("continue"))])
        assert (row["tgt_text"], row["cut"]) == (alone.tgt_text, alone.cut)
        lengths.add(len(row["tgt_text"]))
    assert len(lengths) > 3


def test_the_mark_says_whether_the_limit_cut_the_answer(llm: Path) -> None:
    backend = HuggingFaceBackend(ResponseSettings(str(llm), "float32", max_new_tokens=8))
    end = backend.chat.eos_ids[0]
    request = Request("a", "text", "p {speech}")
    assert responses.response(backend.chat, request, [5, 6, end, 7]).cut == "0"
    assert responses.response(backend.chat, request, [5, 6, end, 7]).tgt_text == backend.chat.decode([5, 6])
    assert responses.response(backend.chat, request, [5, 6]).cut == "1"


def test_a_rows_own_prompt_comes_first(tmp_path: Path, llm: Path, undisturbed: tuple[Path, bytes]) -> None:
    write_input(tmp_path / "in.tsv", 12, prompt="repeat")
    own = run(tmp_path, llm)
    other = tmp_path / "other"
    other.mkdir()
    write_input(other / "in.tsv", 12)
    given = run(other, llm, "--prompt", "repeat")
    texts = [[row["tgt_text"] for row in Manifest.load(f / "out.tsv")] for f in (tmp_path, other)]
    assert own and given and texts[0] == texts[1]
    assert texts[0] != [row["tgt_text"] for row in Manifest.load(undisturbed[0] / "out.tsv")][:12]


def test_sampling_is_repeatable_and_no_greedy_answer(
    tmp_path: Path, llm: Path, undisturbed: tuple[Path, bytes]
) -> None:
    outputs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        write_input(tmp_path / name / "in.tsv", 20)
        outputs.append(run(tmp_path / name, llm, "--sampling", "--seed", seed))
    assert outputs[0] == outputs[1] != outputs[2]


def test_empty_answers_and_refusals_are_left_out_and_counted(
    tmp_path: Path, llm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"r0": "", "r1": "I'm sorry, but I cannot do that.", "r2": " \n", "r3": "As an AI language model, no."}

    class Scripted:
        def __init__(self, settings: ResponseSettings) -> None:
            pass

        def answer(self, batch: list[Request]) -> list[responses.Response]:
            return [responses.Response(r.id, said.get(r.id, "and so on"), "0", r.digest()) for r in batch]

    monkeypatch.setitem(responses.BACKENDS, "hf", Scripted)
    write_input(tmp_path / "in.tsv", 6)
    options = [a for a in arguments(tmp_path, llm) if a != "--keep-refusals"]
    generate_responses.main(options)
    assert "left out: 2 refusals, 2 empty" in capsys.readouterr().out
    assert [row["id"] for row in Manifest.load(tmp_path / "out.tsv")] == ["r4", "r5"]
    dropped = tiny.read_jsonl(tmp_path / "out.tsv.dropped.jsonl")
    assert [(row["id"], row["reason"]) for row in dropped] == [
        ("r0", "empty"), ("r1", "refusal"), ("r2", "empty"), ("r3", "refusal"),
    ]  # fmt: skip
    generate_responses.main([*options, "--keep-refusals"])
    assert [row["id"] for row in Manifest.load(tmp_path / "out.tsv")] == ["r1", "r3", "r4", "r5"]


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I’m sorry, but I can't help.", True),
        ("I cannot assist with that.", True),
        ("Well, as an AI I have no body.", True),
        ("很抱歉，我不能", True),
        ("he said, 'I'm sorry', and left.", False),
        ("The sorry state of the harbour was plain.", False),
        ("I can tell you more.", False),
        ("", False),
    ],
)
def test_refusals(text: str, refused: bool) -> None:
    assert is_refusal(text) == refused


# ---- going on ------------------------------------------------------------------------------------------------------


def test_killed_again_and_again_it_gives_the_same_bytes(
    tmp_path: Path, llm: Path, undisturbed: tuple[Path, bytes]
) -> None:
    write_input(tmp_path / "in.tsv")
    store, rng = tmp_path / "out.tsv.responses.jsonl", random.Random(2)
    for kill in range(4):
        process = subprocess.Popen(
            [warm_python.commands() / "python", str(SCRIPT), *arguments(tmp_path, llm)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        size = store.stat().st_size if store.exists() else 0
        target = size + rng.randrange(1, 3000)
        while kill < 3 and process.poll() is None and (not store.exists() or store.stat().st_size < target):
            time.sleep(0.001)
        if kill < 3:
            process.kill()
            process.communicate()  # until nobody writes
            if process.returncode == 0:  # a busy machine may kill too late
                continue
            assert not (tmp_path / "out.tsv").exists()
            with open(store, "ab") as file:  # what a kill in the middle of a write leaves
                file.write(b'{"id": "r1')
        assert process.wait() == (-9 if kill < 3 else 0)
    assert (tmp_path / "out.tsv").read_bytes() == undisturbed[1]
    ids = [row["id"] for row in tiny.read_jsonl(store)]
    assert len(ids) == len(set(ids)) == ROWS


def test_a_finished_run_does_not_load_the_llm_again(
    undisturbed: tuple[Path, bytes], llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(responses.BACKENDS, "hf", lambda settings: pytest.fail("loaded"))
    assert run(undisturbed[0], llm) == undisturbed[1]


def test_rows_may_be_added_later(tmp_path: Path, llm: Path, undisturbed: tuple[Path, bytes]) -> None:
    write_input(tmp_path / "in.tsv", 70)
    run(tmp_path, llm)
    first = (tmp_path / "out.tsv.responses.jsonl").read_bytes()
    write_input(tmp_path / "in.tsv")
    assert run(tmp_path, llm) == undisturbed[1]
    assert (tmp_path / "out.tsv.responses.jsonl").read_bytes().startswith(first)


@pytest.mark.parametrize("option", [("--prompt", "repeat"), ("--max-new-tokens", 9), ("--sampling",)])
def test_other_settings_are_refused(undisturbed: tuple[Path, bytes], llm: Path, option: tuple[Any, ...]) -> None:
    with pytest.raises(StoreError, match="other settings"):
        run(undisturbed[0], llm, *option)
    assert (undisturbed[0] / "out.tsv").read_bytes() == undisturbed[1]


def test_another_llm_is_refused_and_the_same_one_in_another_place_is_not(
    undisturbed: tuple[Path, bytes], llm: Path, tmp_path: Path
) -> None:
    other = tiny.save_llm(tmp_path / "tiny", seed=5)
    with pytest.raises(StoreError, match="llm was"):
        run(undisturbed[0], other)
    moved = tmp_path / "moved" / "tiny"
    moved.parent.mkdir()
    moved.symlink_to(llm)
    assert model_identity(str(moved)) == model_identity(str(llm))


def test_a_row_that_has_changed_is_named(tmp_path: Path, llm: Path) -> None:
    write_input(tmp_path / "in.tsv", 8)
    run(tmp_path, llm)
    rows = list(Manifest.load(tmp_path / "in.tsv"))
    rows[3]["src_text"] = "Something else."
    write_manifest(tmp_path / "in.tsv", rows)
    before = (tmp_path / "out.tsv").read_bytes()
    with pytest.raises(ValueError, match="row 'r3'"):
        run(tmp_path, llm)
    assert (tmp_path / "out.tsv").read_bytes() == before


def test_a_second_process_is_told(undisturbed: tuple[Path, bytes], llm: Path) -> None:
    settings = ResponseSettings(str(llm), "float32", max_new_tokens=8)
    with (
        RecordStore(undisturbed[0] / "out.tsv.responses.jsonl", settings.identity()),
        pytest.raises(StoreError, match="another process"),
    ):
        run(undisturbed[0], llm)


# ---- other engines -------------------------------------------------------------------------------------------------


def test_shards_join_to_the_same_rows(
    tmp_path: Path, llm: Path, undisturbed: tuple[Path, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    write_input(tmp_path / "in.tsv")
    assert run(tmp_path, llm, "--num-shards", 3, "--shard", 2) == b""
    with pytest.raises(ValueError, match="--shard 0 first"):
        run(tmp_path, llm, "--num-shards", 3)
    run(tmp_path, llm, "--num-shards", 3, "--shard", 0)
    run(tmp_path, llm, "--num-shards", 3, "--shard", 1, "--rows", 100)
    with pytest.raises(ValueError, match="let --shard 1 end first"):
        run(tmp_path, llm, "--num-shards", 3)
    run(tmp_path, llm, "--num-shards", 3, "--shard", 1)
    assert run(tmp_path, llm, "--num-shards", 3) == undisturbed[1]


def test_ray_gives_the_same_bytes(tmp_path: Path, llm: Path, undisturbed: tuple[Path, bytes]) -> None:
    write_input(tmp_path / "in.tsv")
    code = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments(tmp_path, llm, "--engine", "ray", "--workers", 2)],
        capture_output=True,
        text=True,
    )
    assert code.returncode == 0, code.stderr[-2000:]
    assert (tmp_path / "out.tsv").read_bytes() == undisturbed[1]


def test_vllm_gets_token_ids_and_greedy_decoding(llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is not installed here: a stand-in takes what the real one documents."""
    seen: dict[str, Any] = {}

    class LLM:
        def __init__(self, **options: Any) -> None:
            seen["llm"] = options

        def generate(self, prompts: list[dict[str, Any]], sampling: Any, use_tqdm: bool) -> list[Any]:
            seen["prompts"], seen["sampling"] = prompts, sampling
            token = types.SimpleNamespace(token_ids=(70, 71))
            return [types.SimpleNamespace(outputs=[token]) for _ in prompts]

    module = types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", module)
    backend = responses.VllmBackend(ResponseSettings(str(llm), "float32", max_new_tokens=8))
    requests = [Request("a", "Hello there.", "Say {speech}"), Request("b", "Play.", "Say {speech}")]
    answers = backend.answer(requests)
    assert [a.id for a in answers] == ["a", "b"] and answers[0].tgt_text == backend.chat.decode([70, 71])
    assert answers[0].cut == "1"
    assert seen["prompts"][0]["prompt_token_ids"] == responses.token_ids(backend.chat, requests[0])
    assert seen["sampling"]["temperature"] == 0 and seen["sampling"]["max_tokens"] == 8


def test_missing_engines_say_how_to_get_them(llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="pip install vllm"):
        responses.VllmBackend(ResponseSettings(str(llm)))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="pip install"):
        list(responses.answer_with_ray(ResponseSettings(str(llm)), [[Request("a", "b", "c")]]))


def test_options_that_make_no_sense_are_refused(tmp_path: Path, llm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (
        ("--num-shards", 2, "--shard", 2), ("--batch-size", 0), ("--num-shards", 0), ("--rows", -1), ("--top-p", 0),
        ("--input", tmp_path / "same.tsv", "--output", tmp_path / "same.tsv"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            generate_responses.parse(arguments(tmp_path, llm, *option))
    said = capsys.readouterr().err
    assert "--shard must be" in said and "--rows must be" in said and "same.tsv is the --input, which would" in said


def test_a_model_that_is_not_there_leaves_nothing_behind(tmp_path: Path, llm: Path) -> None:
    tiny.write_split(tmp_path, "train", 2)
    options = ["--input", tmp_path / "train.tsv", "--output", tmp_path / "out.tsv", "--llm", "/nonexistent/model"]
    with pytest.raises(ValueError, match="there is no model '/nonexistent/model': give a local directory"):
        generate_responses.main(list(map(str, options)))
    assert not list(tmp_path.glob("out*"))


def test_a_cluster_that_cannot_be_reached_is_named(llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def refuse(**_: Any) -> None:
        raise ConnectionError("Failed to connect to Ray cluster\nmore")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(
        ValueError, match=r"no Ray cluster can be reached at '10\.0\.0\.1:6379'.*RAY_AUTH_TOKEN.*Failed"
    ):
        list(responses.answer_with_ray(ResponseSettings(str(llm)), [], address="10.0.0.1:6379"))


def test_the_settings_beside_the_store_can_be_read(undisturbed: tuple[Path, bytes]) -> None:
    settings = json.loads((undisturbed[0] / "out.tsv.responses.jsonl.settings.json").read_text())
    assert settings["prompt"] == resolve_prompt("continue") and settings["llm"].startswith("tiny@")
