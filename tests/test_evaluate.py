"""The command that compares systems, on tiny models; Whisper's decoder is a stand-in that mishears noise."""

import json
import random
import subprocess
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import sacrebleu
import tiny
import warm_python
from commands import train
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from blspkd_fairseq import BlspKd, evaluate
from blspkd_fairseq.data.manifest import Manifest, write_manifest
from blspkd_fairseq.data.record_store import StoreError
from blspkd_fairseq.evaluation import report as report_module
from blspkd_fairseq.evaluation.metrics import error_rate
from blspkd_fairseq.evaluation.scoring import Answered, ScoringOptions, score_task
from blspkd_fairseq.generation import decoding
from blspkd_fairseq.systems import systems
from blspkd_fairseq.systems.boundaries import _timed_rows

ROWS = 22  # with fewer than 20 there are no intervals
SPEAKERS = 11  # and with fewer than 10 no tests


class Setting:
    """Two checkpoints and test sets."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.llm, self.whisper = tiny.save_llm(root / "llm"), tiny.save_whisper(root / "whisper")
        tiny.write_split(root / "data", "train", 4)
        for name, seed in (("a", 1), ("b", 2)):
            options = ("--max-update", 2, "--disable-validation", "--seed", seed)
            train(root / "data", root / name, self.llm, self.whisper, *options)
        # Rows of one length say the same, by which the stand-in for Whisper knows what was said.
        tiny.write_split(root / "data", "test", ROWS, tiny.SENTENCES[:7], src_lang="en", tgt_lang="de", speaker="s")
        rows = list(Manifest.load(root / "data" / "test.tsv"))
        for i, row in enumerate(rows):
            row["speaker"] = f"s{i % SPEAKERS}"
        write_manifest(root / "data" / "test.tsv", rows)

    def arguments(self, out: Path, *options: Any) -> list[str]:
        data = self.root / "data" / "test.tsv"
        base = ["--translation", data, "--asr", data, "--qa", data, "--out", out, "--max-new-tokens", 6]
        base += ["--samples", 100, "--trials", 200, "--llm", self.llm, "--llm-dtype", "float32", "--batch-size", 4]
        return [str(one) for one in (*base, *options)]

    def checkpoints(self) -> list[Any]:
        return [
            "--checkpoint",
            f"a={self.root}/a/checkpoint_last.pt",
            "--checkpoint",
            self.root / "b/checkpoint_last.pt",
        ]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("evaluate"))


class Mishearing:
    """Hears every third word wrong in loud audio; it knows what was said from how long the audio is."""

    texts: dict[int, str] = {}
    beams: list[int] = []

    def __init__(self, name: str) -> None:
        pass

    def transcribe(self, waveforms: Sequence[np.ndarray], languages: Sequence[str], beam: int = 1) -> list[str]:
        self.beams.append(beam)
        heard = []
        for waveform in waveforms:
            words = self.texts[len(waveform)].split()
            loud = float(np.square(waveform).mean()) > 0.02
            heard.append(" ".join("uh" if loud and i % 3 == 0 else w for i, w in enumerate(words)))
        return heard

    def word_ends(self, waveform: np.ndarray, transcript: str = "") -> list[tuple[str, float]]:
        words = transcript.split()
        return [(word, (i + 1) * len(waveform) / 16_000 / len(words)) for i, word in enumerate(words)]


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Pictures take most of the time: one test draws."""
    if "pictures" not in request.fixturenames:
        for name in ("plot_scores", "plot_robustness"):
            monkeypatch.setattr(report_module, name, lambda *_: None)


@pytest.fixture
def pictures() -> None:
    """For a test that looks at them."""


@pytest.fixture
def cascade(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    manifest = Manifest.load(setting.root / "data" / "test.tsv")
    Mishearing.texts = {int(manifest.n_frames[i]): manifest[i]["src_text"] for i in range(ROWS)}
    monkeypatch.setattr(systems, "WhisperTranscriber", Mishearing)
    monkeypatch.setattr(evaluate, "WhisperTranscriber", Mishearing)
    monkeypatch.setattr(evaluate, "scoring_spelling", lambda *_: {})
    return ["--cascade", setting.whisper]


def read(out: Path, *parts: str) -> list[dict[str, Any]]:
    return tiny.read_jsonl(out.joinpath("answers", *parts))


def test_all_systems_tasks_and_conditions_in_one_report(
    setting: Setting, cascade: list[Any], tmp_path: Path, pictures: None
) -> None:
    options = [*setting.checkpoints(), *cascade, "--text", "--conditions", "white:0", "8khz", "--align", "--cost", 2]
    evaluate.main(setting.arguments(tmp_path, *options))
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["tasks"]) == {"asr", "translation", "qa"}
    names = {"a", "b-checkpoint_last", "cascade", "text"}
    for kind, task in report["tasks"].items():
        assert task["rows"] == ROWS and task["speakers"] == SPEAKERS
        assert set(task["scores"]) == names
        assert set(task["robustness"]["a"]) == {"clean", "white:0", "8khz"}
        assert (tmp_path / f"scores-{kind}.png").stat().st_size > 5000
        assert (tmp_path / f"robustness-{kind}.png").stat().st_size > 5000
        for system in names:
            rows = read(tmp_path, kind, f"{system}.jsonl")
            assert sorted(row["id"] for row in rows) == sorted(f"test-{i}" for i in range(ROWS))
    heard = report["tasks"]["translation"]["heard"]["cascade"]
    assert heard["white:0"]["score"] > heard["clean"]["score"]
    assert sum(report["tasks"]["translation"]["bins"].values()) == ROWS
    differences = report["tasks"]["translation"]["differences"]
    assert {(d["system_a"], d["system_b"]) for d in differences} == {(n, "a") for n in names - {"a"}}
    assert set(report["tasks"]["translation"]["sacrebleu"]) == {"bs", "ar"}
    assert "Self-BLEU" not in report["tasks"]["qa"]["scores"]["text"]
    assert report["alignment"]["a"]["summary"]["matched"] > 0 and (tmp_path / "alignment-a.png").exists()
    assert set(report["costs"]) == names and all(cost["real_time_factor"] > 0 for cost in report["costs"].values())
    text = (tmp_path / "report.md").read_text()
    assert "## Cost" in text and "systems in turns (3 each)" in text
    assert "corpus BLEU against the text answers" in text and "Self-BLEU" not in text
    for heading in (
        "Differences of these systems",
        "Errors in detail",
        "By speaker",
        "Degraded speech",
        "How an error in the cascade's",
        "## Alignment",
    ):
        assert heading in text
    for picture in [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]:
        assert (tmp_path / picture).exists()
    exported = tiny.read_jsonl(tmp_path / "voicebench" / "a.jsonl")
    assert len(exported) == ROWS and set(exported[0]) == {"id", "prompt", "response", "reference"}


def test_figures_are_those_of_the_answers(setting: Setting, cascade: list[Any], tmp_path: Path) -> None:
    evaluate.main(setting.arguments(tmp_path, *setting.checkpoints()[:2], *cascade))
    tasks = json.loads((tmp_path / "report.json").read_text())["tasks"]
    manifest = list(Manifest.load(setting.root / "data" / "test.tsv"))
    said = {row["id"]: row["hypothesis"] for row in read(tmp_path, "translation", "a.jsonl")}
    bleu = sacrebleu.corpus_bleu([said[r["id"]] for r in manifest], [[r["tgt_text"] for r in manifest]])
    assert tasks["translation"]["scores"]["a"]["BLEU"]["score"] == pytest.approx(bleu.score)
    model = BlspKd.from_pretrained(setting.root / "a" / "checkpoint_last.pt", llm_dtype="float32")
    audio = [setting.root / "data" / r["audio"] for r in manifest]
    prompt = evaluate.questions(evaluate.parse(setting.arguments(tmp_path)), "asr").row_prompt(manifest[0])
    repeated = model.generate(audio, instruction=prompt, max_new_tokens=6)
    assert [
        row["hypothesis"] for row in sorted(read(tmp_path, "asr", "a.jsonl"), key=lambda r: int(r["id"][5:]))
    ] == repeated
    normalize = EnglishTextNormalizer({})
    texts = [normalize(r["src_text"]) for r in manifest]
    rate = 100 * jiwer.wer(texts, [normalize(h) for h in repeated])
    assert tasks["asr"]["scores"]["a"]["WER (normalized)"]["score"] == pytest.approx(rate)
    assert tasks["asr"]["scores"]["cascade"]["WER (raw)"]["score"] == 0


def test_what_is_answered_is_not_answered_again(
    setting: Setting, cascade: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate.main(setting.arguments(tmp_path, *cascade, "--text"))
    report = (tmp_path / "report.json").read_bytes()
    monkeypatch.setattr(systems, "load_llm", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(systems, "WhisperTranscriber", lambda *_: pytest.fail("loaded"))
    evaluate.main(setting.arguments(tmp_path, *cascade, "--text"))
    assert (tmp_path / "report.json").read_bytes() == report


def test_killed_again_and_again_it_gives_the_same_report(setting: Setting, tmp_path: Path) -> None:
    done, killed = tmp_path / "done", tmp_path / "killed"
    options = [*setting.checkpoints()[:2], "--text"]
    evaluate.main(setting.arguments(done, *options))
    rng = random.Random(4)
    python = warm_python.commands() / "python"
    command = [python, "-m", "blspkd_fairseq.evaluate", *setting.arguments(killed, *options)]
    for kill in range(3):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        lines = _lines(killed) + rng.randrange(1, 25)
        while kill < 2 and process.poll() is None and _lines(killed) < lines:
            time.sleep(0.002)
        if kill < 2:
            process.kill()
        process.communicate()  # until nobody writes
        # A busy machine may kill too late.
        assert process.returncode in (0, -9) and (kill < 2 or process.returncode == 0)
    strip = [{**json.loads((f / "report.json").read_text()), "settings": {}} for f in (done, killed)]
    assert strip[0] == strip[1]
    for path in sorted((done / "answers").rglob("*.jsonl")):
        twin = killed / path.relative_to(done)
        assert path.read_bytes() == twin.read_bytes()


def _lines(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in (out / "answers").rglob("*.jsonl"))


def test_answers_of_others_are_refused(setting: Setting, cascade: list[Any], tmp_path: Path) -> None:
    a, b = (setting.root / name / "checkpoint_last.pt" for name in "ab")
    evaluate.main(setting.arguments(tmp_path, "--checkpoint", f"x={a}"))
    with pytest.raises(StoreError, match="other settings"):
        evaluate.main(setting.arguments(tmp_path, "--checkpoint", f"x={b}"))
    with pytest.raises(StoreError, match="other settings"):
        evaluate.main(setting.arguments(tmp_path, "--checkpoint", f"x={a}", "--beam", 2))
    with pytest.raises(StoreError, match="text or prompt have changed"):
        evaluate.main(setting.arguments(tmp_path, "--checkpoint", f"x={a}", "--translation-prompt", "repeat"))


def test_more_or_fewer_rows_than_answers_give_no_score(setting: Setting, tmp_path: Path) -> None:
    rows = list(Manifest.load(setting.root / "data" / "test.tsv"))
    data = tmp_path / "few.tsv"
    write_manifest(data, rows[:6])
    base = ["--text", "--audio-root", setting.root / "data", "--translation", data]
    arguments = setting.arguments(tmp_path, *base)
    for name in ("--asr", "--qa"):
        place = arguments.index(name)
        del arguments[place : place + 2]
    evaluate.main(arguments)
    write_manifest(data, rows[:5])
    with pytest.raises(StoreError, match="6 answers for the 5 rows"):
        evaluate.main(arguments)
    write_manifest(data, rows[:8])
    evaluate.main(arguments)
    assert json.loads((tmp_path / "report.json").read_text())["tasks"]["translation"]["rows"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "x=/none.pt"], "/none.pt"),
        (["--checkpoint", "a=A", "--checkpoint", "a=A"], "two systems"),
        (["--text", "--baseline", "b"], "no system: choose from text"),
        (["--text", "--conditions", "pink:3"], "unknown"),
        (["--text", "--asr-prompt", "sing"], "no prompt 'sing'"),
        (["--text", "--judged", "x=/none.json"], "/none.json"),
        (["--text", "--llm", "/none/llm"], "there is no model '/none/llm'"),
        (["--cascade", "/none/whisper", "--text"], "there is no model '/none/whisper'"),
        (["--cascade", "LLM", "--text"], "is a llama model and no Whisper"),
    ],
)
def test_bad_options_are_named(setting: Setting, tmp_path: Path, options: list[str], message: str) -> None:
    options = [o.replace("=A", f"={setting.root}/a/checkpoint_last.pt") for o in options]
    options = [o.replace("LLM", str(setting.root / "llm")) for o in options]
    with pytest.raises(ValueError, match=message):
        evaluate.main(setting.arguments(tmp_path, *options))
    assert not (tmp_path / "report.md").exists()


def test_a_row_without_its_audio_is_named(setting: Setting, tmp_path: Path) -> None:
    rows = list(Manifest.load(setting.root / "data" / "test.tsv"))
    rows[3]["audio"] = "audio/none.flac"
    write_manifest(tmp_path / "t.tsv", rows)
    arguments = setting.arguments(tmp_path, "--asr", tmp_path / "t.tsv", "--audio-root", setting.root / "data")
    with pytest.raises(ValueError, match=r"t.tsv line 5 \(id test-3\)"):
        evaluate.main([*arguments, *map(str, setting.checkpoints())])


def test_rows_in_several_languages_get_no_common_score(setting: Setting, tmp_path: Path) -> None:
    rows = list(Manifest.load(setting.root / "data" / "test.tsv"))
    rows[1]["tgt_lang"] = "fr"
    write_manifest(tmp_path / "t.tsv", rows)
    arguments = setting.arguments(tmp_path, "--text", "--translation", tmp_path / "t.tsv")
    with pytest.raises(ValueError, match="several languages"):
        evaluate.main(arguments)


def write_scores(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("dtype", "is_said"), [("float32", False), ("bfloat16", True)])
def test_a_report_says_that_answers_are_of_a_rounded_llm(
    setting: Setting, tmp_path: Path, dtype: str, is_said: bool
) -> None:
    data = ["--qa", setting.root / "data" / "test.tsv", "--llm", setting.llm, "--max-new-tokens", 2, "--samples", 100]
    evaluate.main([str(one) for one in (*data, "--out", tmp_path, "--llm-dtype", dtype if dtype != "bfloat16" else "")])
    assert ("rounded to bfloat16" in (tmp_path / "report.md").read_text()) == is_said
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["llm_dtype"] == dtype


def judged_rows(rating: int) -> list[dict[str, Any]]:
    """Ratings of all questions, in another order than the manifest's."""
    scores = [str(min(5, rating + i % 2)) for i in range(ROWS)]
    rows = [{"id": f"test-{i}", "prompt": "p", "response": "r", "score": [scores[i]]} for i in range(ROWS)]
    return rows[::-1]


def test_judgements_are_tested_as_any_score(setting: Setting, tmp_path: Path) -> None:
    options = ["--text", *setting.checkpoints()[:2]]
    for name, rating in (("a", 2), ("text", 4)):
        path = write_scores(tmp_path / f"{name}.jsonl", judged_rows(rating))
        options += ["--judged", f"{name}={path}"]
    evaluate.main(setting.arguments(tmp_path / "out", *options))
    task = json.loads((tmp_path / "out" / "report.json").read_text())["tasks"]["qa"]
    assert task["scores"]["text"]["VoiceBench rating"]["score"] == pytest.approx(4.5)
    tested = [one for one in task["differences"] if one["metric"] == "VoiceBench rating"]
    assert [(one["system_a"], one["system_b"], one["holds"]) for one in tested] == [("text", "a", True)]
    assert tested[0]["difference"] == pytest.approx(2)
    assert "VoiceBench rating" in (tmp_path / "out" / "report.md").read_text()


def test_judgements_of_other_questions_are_refused(setting: Setting, tmp_path: Path) -> None:
    path = write_scores(tmp_path / "judged.jsonl", [{**row, "id": f"x{i}"} for i, row in enumerate(judged_rows(2))])
    with pytest.raises(ValueError, match="22 ids are missing"):
        evaluate.main(setting.arguments(tmp_path / "out", "--text", "--judged", f"text={path}"))
    path = write_scores(tmp_path / "judged.jsonl", judged_rows(2))
    with pytest.raises(ValueError, match="'other', which is no system"):
        evaluate.main(setting.arguments(tmp_path / "out", "--text", "--judged", f"other={path}"))
    assert not (tmp_path / "out").exists()


def test_row_scores_of_other_programs_are_tested_as_any_score(setting: Setting, tmp_path: Path) -> None:
    options = ["--text", *setting.checkpoints()[:2]]
    for name, value in (("a", 0.2), ("text", 0.9)):
        rows = [{"id": f"test-{i}", "value": value + 0.01 * (i % 3), "signature": "comet-x"} for i in range(ROWS)]
        options += ["--row-scores", f"translation/{name}:COMET={write_scores(tmp_path / f'{name}.jsonl', rows)}"]
    evaluate.main(setting.arguments(tmp_path / "out", *options))
    tasks = json.loads((tmp_path / "out" / "report.json").read_text())["tasks"]
    assert tasks["translation"]["signatures"]["COMET"] == "comet-x" and "COMET" not in tasks["asr"]["signatures"]
    (tested,) = [one for one in tasks["translation"]["differences"] if one["metric"] == "COMET"]
    assert tested["difference"] == pytest.approx(0.7) and tested["holds"]
    with pytest.raises(ValueError, match="names no task: write one of asr, translation, qa"):
        evaluate.main(setting.arguments(tmp_path / "o", "--text", "--row-scores", f"text:COMET={tmp_path}/a.jsonl"))
    with pytest.raises(ValueError, match="no system"):
        evaluate.main(setting.arguments(tmp_path / "o", "--text", "--row-scores", f"asr/b:COMET={tmp_path}/a.jsonl"))


@pytest.mark.parametrize("kind", ["asr", "translation", "qa"])
def test_clusters_are_drawn_in_every_task(kind: str) -> None:
    """22 rows of 11 talks; all rows of a talk are alike, so that intervals over rows would be too narrow."""
    talks = [f"t{i // 2}" for i in range(ROWS)]
    words = [f"w{i // 2} " * 6 for i in range(ROWS)]
    said = [text if i // 2 % 2 else "x y z" for i, text in enumerate(words)]
    rows = [Answered(f"r{i}", "", "", words[i], said[i], words[i]) for i in range(ROWS)]
    perfect = [replace(row, hypothesis=row.transcript) for row in rows]
    answers = {"a": {"clean": [rows]}, "text": {"clean": [perfect]}}
    by_talk, by_row = (
        score_task(kind, answers, ScoringOptions("de", "a", 400, 400, blocks=blocks)) for blocks in (talks, [""] * ROWS)
    )
    wide, narrow = (one.scores["a"][one.main] for one in (by_talk, by_row))
    assert wide.high - wide.low > 1.2 * (narrow.high - narrow.low)
    assert by_talk.speakers == 11 and set(by_talk.by_speaker["a"]) == set(talks)


def test_a_column_of_clusters_is_chosen(setting: Setting, tmp_path: Path) -> None:
    rows = list(Manifest.load(setting.root / "data" / "test.tsv"))
    write_manifest(tmp_path / "t.tsv", [{**row, "talk": f"t{i % 21}"} for i, row in enumerate(rows)])
    options = ["--text", "--translation", tmp_path / "t.tsv", "--asr", tmp_path / "t.tsv", "--qa", tmp_path / "t.tsv"]
    evaluate.main(setting.arguments(tmp_path / "out", *options, "--clusters", "talk"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {task["speakers"] for task in report["tasks"].values()} == {21}
    with pytest.raises(ValueError, match="no column 'document'"):
        evaluate.main(setting.arguments(tmp_path / "out", *options, "--clusters", "document"))


def test_a_cascades_transcript_is_scored_in_the_language_of_the_speech() -> None:
    rows = [Answered(f"r{i}", f"s{i}", "", "今天天气好", "good", "good weather", "今天天汽好") for i in range(25)]
    options = ScoringOptions("en", "a", 50, 50, speech_language="zh")
    found = score_task("translation", {"a": {"clean": [rows]}}, options)
    assert found.heard_metric == "CER (normalized)" and found.heard["a"]["clean"].score == pytest.approx(20)


def test_cascades_have_names_and_the_beam_of_the_llm(setting: Setting, cascade: list[Any], tmp_path: Path) -> None:
    Mishearing.beams.clear()
    options = [*cascade, "--cascade", f"tuned={setting.whisper}", "--beam", "2", "--text"]
    evaluate.main(setting.arguments(tmp_path, *options))
    assert set(Mishearing.beams) == {2}
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["tasks"]["asr"]["scores"]) == {"cascade", "tuned", "text"}
    with pytest.raises(ValueError, match="two systems are named 'cascade'"):
        evaluate.main(setting.arguments(tmp_path, *cascade, *cascade))


def test_several_draws_of_the_noise(setting: Setting, cascade: list[Any], tmp_path: Path) -> None:
    options = [*cascade, "--conditions", "white:0", "8khz", "babble:0", "--noise-seeds", "2"]
    evaluate.main(setting.arguments(tmp_path, *options))
    answers = sorted(path.name for path in (tmp_path / "answers" / "asr").glob("*.jsonl"))
    noisy = [f"cascade.{kind}{draw}.jsonl" for kind in ("babble-0", "white-0") for draw in (".draw-2", "")]
    assert answers == sorted(["cascade.8khz.jsonl", "cascade.jsonl", *noisy])
    task = json.loads((tmp_path / "report.json").read_text())["tasks"]["asr"]
    assert task["noise_seeds"] == 2
    scores = []
    for name in ("cascade.white-0.jsonl", "cascade.white-0.draw-2.jsonl"):
        rows = read(tmp_path, "asr", name)
        said, texts = ([row[key] for row in rows] for key in ("hypothesis", "transcript"))
        scores.append(error_rate(said, texts, "WER", "en").score)
    assert task["robustness"]["cascade"]["white:0"]["score"] == pytest.approx(np.mean(scores))
    assert "mean over 2 draws" in (tmp_path / "report.md").read_text()


def test_rows_are_not_chosen_and_compared_by_the_same_errors(
    setting: Setting, cascade: list[Any], tmp_path: Path
) -> None:
    evaluate.main(setting.arguments(tmp_path, *cascade, "--text"))
    text = (tmp_path / "report.md").read_text()
    assert "its column shows how its errors travel, and is not to be compared" in text


def test_recordings_of_any_length_are_measured(
    setting: Setting,
    cascade: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = tmp_path / "data"
    tiny.write_split(data, "test", 2, src_lang="en", tgt_lang="de", speaker="s")
    long = {**Manifest.load(data / "test.tsv")[0], "id": "long", "audio": "long.wav"}
    long["n_frames"] = str(tiny.write_speech(data / "long.wav", 31.0, 7))
    write_manifest(data / "test.tsv", [long, *Manifest.load(data / "test.tsv")])
    manifest = Manifest.load(data / "test.tsv")
    lengths = {int(manifest.n_frames[i]): manifest[i]["src_text"] for i in range(3)}
    monkeypatch.setattr(Mishearing, "texts", defaultdict(lambda: "lights on", lengths))
    checkpoint = setting.root / "a" / "checkpoint_last.pt"
    arguments = setting.arguments(tmp_path / "out", "--checkpoint", f"a={checkpoint}", *cascade, "--align")
    arguments[:6] = ["--asr", str(data / "test.tsv")]
    evaluate.main([*arguments, "--conditions", "speed:0.95"])
    assert "1 rows of" in caplog.text and "longer than the 30 s that Whisper times: they are left out" in caplog.text
    model = BlspKd.from_pretrained(checkpoint, llm=str(setting.llm), llm_dtype="float32")
    said = {row["id"]: row["hypothesis"] for row in read(tmp_path / "out", "asr", "a.jsonl")}
    assert said == {row["id"]: model.generate(data / row["audio"], "repeat", max_new_tokens=6) for row in manifest}
    assert len(read(tmp_path / "out", "asr", "a.speed-0.95.jsonl")) == 3

    monkeypatch.setattr(decoding, "context_of", lambda _: 20)
    with pytest.raises(ValueError, match=r"test\.tsv.* line 2.*the LLM reads 20 together with its answer"):
        evaluate.main([*arguments[:-1], "--out", str(tmp_path / "other")])
    only = tmp_path / "only.tsv"
    write_manifest(only, [{**long, "audio": str(data / "long.wav")}])
    with pytest.raises(ValueError, match="give --align a test set of shorter rows"):
        _timed_rows(Manifest.load(only))


@pytest.mark.parametrize("system", ["text", "cascade"])
def test_a_transcript_that_the_llm_has_no_room_for_is_named(
    setting: Setting, cascade: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    tiny.write_split(tmp_path, "test", 3, src_lang="en", tgt_lang="de", speaker="s")
    rows = list(Manifest.load(tmp_path / "test.tsv"))  # the third is the longest recording, the second the longest text
    rows[1]["src_text"] = "light " * 600
    write_manifest(tmp_path / "test.tsv", rows)
    monkeypatch.setattr(Mishearing, "texts", {int(row["n_frames"]): row["src_text"] for row in rows})
    arguments = setting.arguments(tmp_path / "out", *(["--text"] if system == "text" else cascade))
    arguments[:6] = ["--translation", str(tmp_path / "test.tsv")]
    with pytest.raises(ValueError, match=r"test\.tsv.* line 3.*the LLM reads 512 together with its answer"):
        evaluate.main(arguments)


def test_whisper_hears_long_recordings_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[tuple[int, str]]] = []

    def hear(self: Any, windows: Sequence[np.ndarray], languages: Sequence[str], beam: int) -> list[str]:
        batches.append([(len(one), code) for one, code in zip(windows, languages, strict=True)])
        return [f" {code}{len(batches)} " for code in languages]

    monkeypatch.setattr(systems.WhisperTranscriber, "_transcribe", hear)
    whisper = object.__new__(systems.WhisperTranscriber)
    long, short = np.random.default_rng(0).normal(size=100 * 16_000).astype(np.float32), np.zeros(1600, np.float32)
    assert whisper.transcribe([long, short], ["en", "de"]) == ["en1 en1 en2 en2 en3", "de3"]
    assert [len(batch) for batch in batches] == [2, 2, 2]
    assert sum(n for batch in batches for n, code in batch if code == "en") == len(long)
    assert max(n for batch in batches for n, _ in batch) <= 30 * 16_000
