"""The recipes of examples/ as they are typed, on real recordings and the small real models."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
import warm_python
from commands import load
from conftest import THREADS
from tiny import PATIENCE

from blspkd_fairseq.data.manifest import Manifest

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.recordings]


def run(name: str, out: Path, *options: object) -> str:
    environment = warm_python.environment(OMP_NUM_THREADS=THREADS)
    command = ["bash", str(EXAMPLES / name / "run.sh"), "--out", str(out), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=2 * PATIENCE)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def systems(report: Path, task: str) -> set[str]:
    return set(json.loads((report / "report.json").read_text())["tasks"][task]["scores"])


def test_covost2_runs_and_a_second_run_skips_its_stages(tmp_path: Path) -> None:
    first = run("covost2", tmp_path, "--small", "--max-update", 4)
    work = tmp_path / "en_fr"
    test = Manifest.load(work / "data" / "test.tsv")
    assert "BLEU" in first and (work / "generated" / "generate-test.txt").exists()
    assert len(tiny.read_jsonl(work / "generated" / "generate-test.jsonl")) == len(test) >= 20
    report = json.loads((work / "report" / "report.json").read_text())
    assert systems(work / "report", "translation") == {"blsp_kd", "cascade", "text"}
    # tiny.en hears these recordings well, in MP3, too; its errors are counted against the text as it was written.
    assert report["tasks"]["asr"]["scores"]["cascade"]["WER (normalized)"]["score"] < 15
    assert report["alignment"]["blsp_kd"]["summary"]["matched"] > 100
    assert run("covost2", tmp_path, "--small", "--max-update", 4).count("done before") == 6


def test_the_recipes_of_all_systems_run(tmp_path: Path) -> None:
    """The evaluation of a checkpoint is that of CoVoST 2."""
    run("warm_up", tmp_path / "warm", "--small", "--max-update", 2, "--stop-stage", 3)
    warm = tmp_path / "warm" / "model" / "checkpoint_last.pt"
    assert not any("lora_" in name for name in load(warm)["model"])
    run("blsp_kd", tmp_path / "kd", "--small", "--max-update", 2, "--from", warm, "--stop-stage", 3)
    checkpoint = tmp_path / "kd" / "model" / "checkpoint_last.pt"
    run(
        "x_opd", tmp_path / "opd", "--small", "--max-update", 1, "--from", checkpoint, "--stop-stage", 3,
        "--", "--estimator", "exact", "--rollouts", 1,
    )  # fmt: skip
    options = load(tmp_path / "opd" / "model" / "checkpoint_last.pt")["cfg"]["criterion"]
    assert (options["estimator"], options["rollouts"]) == ("exact", 1)
    assert set(load(tmp_path / "opd" / "model" / "checkpoint_last.pt")["model"]) == set(load(checkpoint)["model"])
    run("blsp", tmp_path / "blsp", "--small", "--max-update", 1, "--stop-stage", 3)
    assert not any("lora_" in n for n in load(tmp_path / "blsp" / "model" / "checkpoint_last.pt")["model"])
    run("cascade", tmp_path / "cascade", "--small")
    assert systems(tmp_path / "cascade" / "report", "qa") == {"cascade", "text"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("covost2", [], "--common-voice and --direction are needed"),
        ("covost2", ["--direktion", "x"], "unknown option --direktion"),
        ("blsp", [], "--train, --valid and --test must be given"),
        ("cascade", [], "run.sh: --test must be given"),
        ("blsp_kd", ["--gpus", "many"], "--gpus must be a whole number"),
        ("x_opd", ["--from"], "--from needs a value"),
        ("x_opd", ["--train", "a", "--valid", "b", "--test", "c"], "--from must be given"),
        ("cascade", ["--small", "--", "--lr", "1"], "--lr 1: nothing is trained here"),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, name: str, options: list[str], message: str) -> None:
    command = ["bash", str(EXAMPLES / name / "run.sh"), "--out", str(tmp_path / "out"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "out").exists()  # which would refuse the options that are given next


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("blsp", [], "--lr 5e-5 --warmup-updates 1000 --max-update 2600 --batch-size 8 --update-freq 12"),
        ("blsp_kd", [], "--lr 1e-4 --warmup-updates 1000 --max-update 2600 --batch-size 8 --update-freq 12"),
        ("x_opd", [], "--lr 2e-5 --warmup-updates 50 --max-update 109 --batch-size 8 --update-freq 4"),
        ("blsp_kd", ["--gpus", 2, "--nodes", 3, "--master", "a:1"], "--batch-size 8 --update-freq 16"),
        ("x_opd", ["--nodes", 8, "--master", "a:1"], "--batch-size 4 --update-freq 1 --max-tokens 1920000"),
        ("blsp", [], "--save-interval-updates 250 --validate-interval-updates 250 --keep-interval-updates 3"),
        ("x_opd", [], "--save-interval-updates 25 --validate-interval-updates 25 --max-tokens 3840000"),
        ("blsp_kd", ["--gpus", 7], "an update has 784 utterances, not 768 --batch-size 8 --update-freq 14"),
    ],
)
def test_the_full_size_is_that_of_the_papers(tmp_path: Path, name: str, options: list[object], expected: str) -> None:
    """768 utterances an update, 256 of X-OPD: what fairseq-train would be called with."""
    examples = tmp_path / "examples"
    shutil.copytree(EXAMPLES, examples, ignore=shutil.ignore_patterns("results"))
    with (examples / "common.sh").open("a") as file:
        file.write('use_environment() { :; }\ntrain_on_gpus() { echo "$@"; }\n')
    paths = [word for split in ("train", "valid", "test", "from") for word in (f"--{split}", f"{split}.x")]
    command = ["bash", str(examples / name / "run.sh"), *paths, "--stage", "3", "--stop-stage", "3"]
    called = subprocess.run([*command, *map(str, options)], capture_output=True, text=True, check=True).stdout
    for part in re.findall(r"--\S+ \S+|an .*? 768", expected):
        assert re.search(rf"{re.escape(part)}\b", called)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "options").write_text("--train a.tsv")
    given = ["--out", str(tmp_path), "--train", "b.tsv", "--valid", "v.tsv", "--test", "t.tsv"]
    done = subprocess.run(["bash", str(EXAMPLES / "blsp" / "run.sh"), *given], capture_output=True, text=True)
    assert done.returncode == 2 and "holds a run with other options (--train a.tsv): give another --out" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["options"]


def test_paths_are_those_of_the_callers_folder(tmp_path: Path) -> None:
    """The first stage, which leaves that folder, reads them; the names of models are left as they are."""
    for name in ("a", "b", "v", "t"):
        tiny.write_split(tmp_path, name, 2)
    given = ["--train", "a.tsv b.tsv", "--valid", "v.tsv", "--test", "t.tsv", "--stop-stage", "1", "--out", "out"]
    done = subprocess.run(
        ["bash", str(EXAMPLES / "blsp_kd" / "run.sh"), *given], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(Manifest.load(tmp_path / "out" / "data" / "train.tsv")) == 4
    assert "--llm Qwen/Qwen2.5-7B-Instruct" in (tmp_path / "out" / "options").read_text()
