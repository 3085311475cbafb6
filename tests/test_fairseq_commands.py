"""fairseq's own commands, end to end on tiny random models."""

import json
import math
import os
import random
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import DEVICE, PACKAGE, TRAIN_OPTIONS, fairseq, load, program, start, train, train_on_two
from tiny import PATIENCE, SENTENCES, read_jsonl, save_llm, save_whisper, write_speech, write_split

from blspkd_fairseq.cli import average
from blspkd_fairseq.hub import BlspKd
from blspkd_fairseq.modules.trained_state import read_trained, write_weights

UPDATES = ("--max-update", 4, "--validate-interval", 1, "--disable-validation")


class World:
    """Models and data that the tests of this file share."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.llm = save_llm(root / "llm")
        self.whisper = save_whisper(root / "whisper")
        self.data = root / "data"
        write_split(self.data, "train", 8)
        write_split(self.data, "valid", 5)
        write_split(self.data, "test", 5)

    def train(self, save_dir: Path, *options: Any, data: Path | None = None) -> str:
        return train(data or self.data, save_dir, self.llm, self.whisper, *options)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def trained(world: World) -> Path:
    world.train(world.root / "trained", *UPDATES)
    return world.root / "trained" / "checkpoint_last.pt"


def weights(save_dir: Path, name: str = "checkpoint_last.pt") -> dict[str, torch.Tensor]:
    return load(save_dir / name)["model"]


def updates(log: str) -> list[str]:
    """Lines of single updates in the log."""
    return re.findall(r"^epoch \d+: +\d+ / \d+ loss=", log, re.M)


# A GPU adds up in another order every time and multiplies with fewer bits, and Adam makes steps of that: it is on the
# CPU that these tests are exact.
DEVICE_TOLERANCE = 0.0 if DEVICE == "cpu" else 5e-3


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 2e-6) -> None:
    tolerance = max(tolerance, DEVICE_TOLERANCE)
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], atol=tolerance, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# ---- training ------------------------------------------------------------------------------------------------------


def test_checkpoints_hold_the_trained_parameters_only_and_name_the_frozen_models(world: World, trained: Path) -> None:
    checkpoint = load(trained)
    names = checkpoint["model"].keys()
    assert any(n.startswith("adapter.") for n in names) and any("lora_A" in n for n in names)
    assert not any("lora_" not in n for n in names if n.startswith("llm."))
    assert {n for n in names if n.startswith("setting.")} == {
        "setting.adapter_heads", "setting.adapter_alignment", "setting.lora_alpha",
    }  # fmt: skip
    assert {n for n in names if n.startswith("frozen.")} == {"frozen.llm", "frozen.speech_encoder"}
    assert checkpoint["cfg"]["model"]["llm"] == str(world.llm)
    assert checkpoint["cfg"]["model"]["speech_encoder"] == str(world.whisper)


def test_validation_logs_every_part(world: World, tmp_path: Path) -> None:
    log = world.train(
        tmp_path, "--max-update", 2, "--eval-wer", "--eval-bleu", "--eval-max-tokens", 8, "--log-all-terms",
        "--best-checkpoint-metric", "wer", "--patience", 3, "--tensorboard-logdir", tmp_path / "tb",
    )  # fmt: skip
    line = next(line for line in log.splitlines() if "valid on 'valid' subset" in line)
    for name in (
        "loss", "response_kl", "input_kl", "response_ce", "token_ce", "token_mse",
        "response_agreement", "input_agreement", "quantity", "token_count_error", "wer", "wer_raw", "bleu",
    ):  # fmt: skip
        assert re.search(rf"\b{name} [-\d.]+", line), (name, line)
    assert list((tmp_path / "tb").rglob("events*"))
    assert load(tmp_path / "checkpoint_best.pt")["extra_state"]["best"] > 0


def test_one_update_is_the_same_however_the_batch_is_split(world: World, tmp_path: Path) -> None:
    """1 process x batch 4 = --update-freq 2 x batch 2 = 2 gloo processes x batch 2."""
    data = tmp_path / "data"
    write_split(data, "train", 4)
    # Adam would blow up the rounding of gradients that are zero but for rounding.
    one_update = (
        "--max-update", 1, "--disable-validation", "--token-ce-weight", 1, "--response-ce-weight", 1,
        "--token-mse-weight", 1,
        "--optimizer", "sgd", "--lr", 1,
    )  # fmt: skip
    world.train(tmp_path / "whole", *one_update, data=data)
    world.train(tmp_path / "accumulated", *one_update, "--batch-size", 2, "--update-freq", 2, data=data)
    train_on_two(data, tmp_path / "two", world.llm, world.whisper, *one_update, "--batch-size", 2)
    whole = weights(tmp_path / "whole")
    assert_same_weights(weights(tmp_path / "accumulated"), whole)
    assert_same_weights(weights(tmp_path / "two"), whole)


def test_resuming_in_mid_epoch_equals_an_uninterrupted_run(world: World, tmp_path: Path) -> None:
    options = ("--batch-size", 2, "--disable-validation", "--save-interval-updates", 3)
    world.train(tmp_path / "through", *options, "--max-update", 7)
    world.train(tmp_path / "resumed", *options, "--max-update", 3)
    world.train(tmp_path / "resumed", *options, "--max-update", 7)
    assert_same_weights(weights(tmp_path / "resumed"), weights(tmp_path / "through"), tolerance=0)


def test_warm_up_then_distillation(world: World, tmp_path: Path) -> None:
    """The warm-up needs no responses and no run of the LLM; its checkpoint starts the distillation."""
    data = tmp_path / "data"
    write_split(data, "spoken", 8, drop=["tgt_text"])
    log = world.train(
        tmp_path / "warm", *UPDATES, "--response-kl-weight", 0, "--input-kl-weight", 0, "--token-ce-weight", 1,
        "--token-mse-weight", 1, "--token-vocabulary", "train", "--train-subset", "spoken", data=data,
    )  # fmt: skip
    assert "token_ce=" in log and "response_kl=" not in log
    warm = tmp_path / "warm" / "checkpoint_last.pt"
    assert "token_ce" in fairseq("validate", world.data, "--path", warm, "--valid-subset", "valid", "--batch-size", 3)
    for option in (
        ["--restore-file", warm, "--reset-optimizer", "--reset-dataloader", "--reset-meters"],
        ["--finetune-from-model", warm],
        ["--pretrained-model", warm.parent],
    ):
        save_dir = tmp_path / option[0].strip("-")
        log = world.train(save_dir, "--max-update", 5, "--disable-validation", "--lr", 0, *option)
        assert "response_kl=" in log
        assert_same_weights(weights(save_dir), weights(tmp_path / "warm"), tolerance=0)  # lr 0: nothing but the start
    with pytest.raises(ValueError, match="warm is a folder: give the checkpoint in it, or --pretrained-model"):
        world.train(tmp_path / "none", "--max-update", 1, "--finetune-from-model", warm.parent)


def test_moving_average_checkpoint_retention_and_averaging(world: World, tmp_path: Path) -> None:
    import average_checkpoints

    world.train(
        tmp_path, "--max-epoch", 4, "--disable-validation", "--store-ema", "--ema-fp32", "--ema-decay", 0.5,
        "--keep-last-epochs", 2,
    )  # fmt: skip
    assert sorted(p.name for p in tmp_path.glob("checkpoint[0-9].pt")) == ["checkpoint3.pt", "checkpoint4.pt"]
    checkpoint = load(tmp_path / "checkpoint4.pt")
    ema, last = checkpoint["extra_state"]["ema"], checkpoint["model"]
    assert ema.keys() == last.keys()
    moved = [n for n in last if n.startswith("adapter") and not torch.equal(ema[n], last[n])]
    assert moved and torch.allclose(ema["frozen.llm"], last["frozen.llm"])

    average_checkpoints.main(
        ["--inputs", str(tmp_path), "--num-epoch-checkpoints", "2", "--output", str(tmp_path / "avg.pt")]
    )
    for count in ("0", "-1"):
        with pytest.raises(ValueError, match=f"must be at least 1, got {count}"):
            average_checkpoints.main(
                ["--inputs", str(tmp_path), "--num-epoch-checkpoints", count, "--output", str(tmp_path / "none.pt")]
            )
    with pytest.raises(ValueError, match="checkpoint4.pt is one of the inputs"):
        average_checkpoints.main(
            ["--inputs", str(tmp_path), "--num-epoch-checkpoints", "2", "--output", str(tmp_path / "checkpoint4.pt")]
        )
    one, two, mean = (weights(tmp_path, name) for name in ("checkpoint3.pt", "checkpoint4.pt", "avg.pt"))
    for name in mean:
        torch.testing.assert_close(mean[name], (one[name].float() + two[name].float()) / 2)
    output = fairseq("generate", world.data, "--gen-subset", "test", "--path", tmp_path / "avg.pt", "--max-len-b", 4)
    assert len(re.findall(r"^D-", output, re.M)) == 5


@pytest.fixture(scope="session")
def began(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that other trainings begin with."""
    folder = tmp_path_factory.mktemp("began")
    world.train(folder, *UPDATES)
    return folder / "checkpoint_last.pt"


def test_the_mean_of_models_and_checkpoints(world: World, began: Path, tmp_path: Path) -> None:
    def mean(output: Path, *inputs: Path) -> dict[str, torch.Tensor]:
        average.main(["--inputs", *map(str, inputs), "--output", str(output)])
        return dict(read_trained(output)[1])

    tuned = tmp_path / "tuned" / "checkpoint_last.pt"
    world.train(tuned.parent, *UPDATES, "--pretrained-model", began)
    model, folder = BlspKd.from_pretrained(began), tmp_path / "began"
    model.save_pretrained(folder, dtype="bfloat16")
    before, after = read_trained(folder)[1], read_trained(tuned)[1]
    moved = [name for name in before if not torch.equal(before[name].float(), after[name].float())]
    assert any(name.startswith("adapter") for name in moved)

    # What is written is of the kind of the first, and loads.
    in_folder, in_file = mean(tmp_path / "mean", folder, tuned), mean(tmp_path / "mean.pt", tuned, folder)
    for name in before:
        expected = (before[name].float() + after[name].float()) / 2
        torch.testing.assert_close(in_file[name], expected)
        torch.testing.assert_close(in_folder[name], expected.to(before[name].dtype))
    for path in (tmp_path / "mean", tmp_path / "mean.pt"):
        assert BlspKd.from_pretrained(path).config.llm == model.config.llm
    twice = mean(tmp_path / "twice", folder, folder, tuned)
    name = next(name for name in moved if name.startswith("adapter"))
    torch.testing.assert_close(twice[name], ((2 * before[name].float() + after[name].float()) / 3).bfloat16())


def test_models_that_have_no_mean(began: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "one", tmp_path / "other"
    BlspKd.from_pretrained(began).save_pretrained(folder)
    options, weights = read_trained(folder)
    for name, what in (("frozen.llm", "llm"), ("setting.adapter_heads", "adapter heads")):
        write_weights(other, options, {**weights, name: weights[name] + 1}, torch.float32)
        with pytest.raises(ValueError, match=f"one and .*other|other and .*one differ in their {what}: only models"):
            average.main(["--inputs", str(folder), str(other), "--output", str(tmp_path / "mean")])
    write_weights(other, options, {**weights, "adapter.more": torch.zeros(2)}, torch.float32)
    torch.save({"cfg": {}}, tmp_path / "nothing.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for inputs, output, match in (
        ([folder, other], "mean", "other has other parameters than .*one: only models of one shape"),
        ([folder, tmp_path / "nothing.pt"], "mean", "nothing.pt is no checkpoint of this project"),
        ([folder, tmp_path / "empty"], "mean", "no folder of save_pretrained at .*empty"),
        ([folder, folder], "one", "one is one of the inputs"),
        ([folder, folder], "file", "file is a file, unlike .*one, whose kind is written"),
        ([began, folder], "empty", "empty is a folder, unlike"),
    ):
        with pytest.raises(ValueError, match=match):
            average.main(["--inputs", *map(str, inputs), "--output", str(tmp_path / output)])
    assert not (tmp_path / "mean").exists() and (tmp_path / "file").read_text() == ""


def test_gradient_checkpointing_lora_everywhere_and_an_unfrozen_encoder_train(world: World, tmp_path: Path) -> None:
    world.train(
        tmp_path, *UPDATES, "--gradient-checkpointing", "--lora-scope", "all", "--unfreeze-speech-encoder",
        "--reverse-kl", "--kd-temperature", 2, "--scale-by-squared-temperature", "--pad-to-30s",
    )  # fmt: skip
    names = weights(tmp_path).keys()
    assert any(n.startswith("speech_encoder.encoder.layers") for n in names) and "frozen.speech_encoder" not in names


def test_max_tokens_counts_samples(world: World, tmp_path: Path) -> None:
    log = world.train(tmp_path, "--max-epoch", 1, "--disable-validation", "--max-tokens", 40_000, "--batch-size", 100)
    assert len(updates(log)) >= 2  # 8 utterances of .6 to 1.4 s do not fit one batch of 2.5 s


def test_epoch_slices(world: World, tmp_path: Path) -> None:
    """a:b takes train.tsv of one folder each epoch."""
    one, two = tmp_path / "one", tmp_path / "two"
    write_split(one, "train", 3)
    write_split(two, "train", 6)
    log = train(
        Path(f"{one}:{two}"), tmp_path / "save", world.llm, world.whisper, "--max-epoch", 2, "--disable-validation",
        "--batch-size", 1,
    )  # fmt: skip
    assert len(updates(log)) == 3 + 6


def test_training_killed_again_and_again_ends_like_an_undisturbed_one(world: World, tmp_path: Path) -> None:
    options = ("--max-update", 10, "--disable-validation", "--save-interval-updates", 1, "--keep-interval-updates", 2)
    world.train(tmp_path / "whole", *options)
    killed, rng = tmp_path / "killed", random.Random(5)
    for kill in range(4):
        process = start(
            "train", world.data, "--llm", world.llm, "--speech-encoder", world.whisper, "--save-dir", killed,
            *TRAIN_OPTIONS, *options, warm=True,
        )  # fmt: skip
        last = killed / "checkpoint_last.pt"
        stamp, count = _stamp(last), rng.randrange(1, 4)
        while kill < 3 and process.poll() is None and count:
            time.sleep(0.002)
            if _stamp(last) != stamp:
                stamp, count = _stamp(last), count - 1
        if kill < 3:
            process.kill()
            process.communicate()
            load(last)  # is whole
        else:
            output = process.communicate()[0]
            assert process.returncode == 0, output[-3000:]
    assert_same_weights(weights(killed), weights(tmp_path / "whole"))


def _stamp(path: Path) -> tuple[int, int]:
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else (0, 0)


def test_copies_of_checkpoints_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fairseq.file_io import PathManager

    source, target = tmp_path / "a.pt", tmp_path / "last.pt"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", lambda src, dst: Path(dst).write_bytes(b"n") and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            PathManager.copy(str(source), str(target), overwrite=True)
    assert target.read_bytes() == b"old"
    assert PathManager.copy(str(source), str(target), overwrite=True) and target.read_bytes() == b"new"


CE = ("--response-ce-weight", 1, "--response-kl-weight", 0, "--input-kl-weight", 0)
RESPONSE_KL = ("--input-kl-weight", 0)


@pytest.mark.parametrize(
    "lora", [pytest.param("none", marks=pytest.mark.slow), "speech", pytest.param("all", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "objective",
    [("cnn", *CE), ("cnn", *RESPONSE_KL), ("cformer", *CE), ("cformer", *RESPONSE_KL), ("cformer",)],
    ids=["cnn-ce", "cnn-response", "cformer-ce", "cformer-response", "cformer-both"],
)
def test_the_grid_of_the_papers_overfits_two_utterances_by_options_alone(
    world: World, tmp_path: Path, objective: tuple[Any, ...], lora: str
) -> None:
    """BLSP, BLSP-KD and what lies between: {adapter} x {objective} x {LoRA}, the encoder trained in one of them."""
    adapter, *weights_ = objective
    trained = ("--unfreeze-speech-encoder",) if lora == "all" else ()
    write_split(tmp_path / "data", "train", 2)
    log = world.train(
        tmp_path, "--adapter", adapter, "--adapter-bottleneck", 8, *weights_, "--lora-scope", lora, *trained,
        "--max-update", 60, "--disable-validation", "--no-epoch-checkpoints", "--lr", 1e-2, "--adapter-dropout", 0,
        "--lora-dropout", 0, data=tmp_path / "data",
    )  # fmt: skip
    terms = ["response_ce"] if "--response-ce-weight" in weights_ else ["response_kl"]
    for term in terms + (["input_kl"] if not weights_ else []):
        values = [float(value) for value in re.findall(rf"^epoch \d+:.* {term}=([\d.]+)", log, re.M)]
        # A frozen random LLM cannot be made to say anything: the likelihood of words comes to just above chance.
        bound = 0.3 if lora == "all" else 0.75 if (term, lora) == ("response_ce", "none") else 0.5
        assert len(values) == 60 and values[-1] < bound * values[0]
        assert term != "response_ce" or values[-1] < math.log(400)  # tokens of the tiny LLM
    names = set(load(tmp_path / "checkpoint_last.pt")["model"])
    assert any("lora_" in n for n in names) == (lora != "none")
    assert any(n.startswith("speech_encoder.") for n in names) == (lora == "all")
    output = fairseq(
        "generate", world.data, "--gen-subset", "test", "--path", tmp_path / "checkpoint_last.pt", "--max-len-b", 4
    )
    assert len(hypotheses(output)) == 5


def test_the_cnn_adapter_needs_something_to_learn(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="all weights of kl_distillation are 0.*--quantity-weight counts tokens"):
        world.train(tmp_path, "--adapter", "cnn", "--input-kl-weight", 0, "--response-kl-weight", 0, "--max-update", 1)
    log = world.train(tmp_path, "--adapter", "cnn", "--input-kl-weight", 0, "--max-update", 1)
    assert "response_kl=" in log and "quantity=" not in log and "token_count_error" not in log


@pytest.mark.parametrize("option", ["--input-kl-weight", "--token-ce-weight", "--token-mse-weight"])
def test_the_cnn_adapter_refuses_what_compares_token_by_token(world: World, tmp_path: Path, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be 0 with this adapter.*choose --adapter cformer"):
        world.train(tmp_path, "--adapter", "cnn", "--input-kl-weight", 0, option, 1, "--max-update", 1)


def test_training_goes_on_with_more_parts_than_it_began_with(world: World, trained: Path, tmp_path: Path) -> None:
    """A warm-up of the adapter alone, then LoRA and the encoder, too: they begin as they were in the warm-up."""
    world.train(tmp_path / "warm", *UPDATES, "--lora-scope", "none")
    warm = tmp_path / "warm" / "checkpoint_last.pt"
    more = ("--unfreeze-speech-encoder", "--finetune-from-model", warm, "--disable-validation", "--max-update", 1)
    world.train(tmp_path / "more", *more, "--lr", 0)
    before, after = weights(tmp_path / "warm"), weights(tmp_path / "more")
    assert any("lora_A" in n for n in after) and any(n.startswith("speech_encoder.") for n in after)
    assert not any(value.any() for n, value in after.items() if "lora_B" in n)
    assert_same_weights({n: after[n] for n in before if n.startswith("adapter.")}, {
        n: value for n, value in before.items() if n.startswith("adapter.")
    })  # fmt: skip
    whisper = save_whisper(tmp_path / "whisper", seed=9)
    with pytest.raises(ValueError, match="another speech encoder"):
        world.train(tmp_path / "other", *more, "--speech-encoder", whisper)
    with pytest.raises(ValueError, match="does not fit.*is unknown"):  # fewer: it would lose something
        world.train(tmp_path / "fewer", "--lora-scope", "none", "--finetune-from-model", trained, "--max-update", 1)
    with pytest.raises(ValueError, match="trained with --lora-alpha 16"):  # resumed with other options
        world.train(tmp_path / "more", *more[:1], "--lora-alpha", 64, "--max-update", 2)


# ---- generation ----------------------------------------------------------------------------------------------------


def hypotheses(output: str) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for index, text in re.findall(r"^D-(\d+)\t[-\d.einf]+\t(.*)$", output, re.M):
        found.setdefault(int(index), []).append(text)
    return found


@pytest.mark.parametrize("batching", [("--batch-size", 1), ("--batch-size", 4), ("--max-tokens", 60_000)])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 8, 17])
def test_every_row_gives_one_hypothesis(world: World, trained: Path, tmp_path: Path, count: int, batching: Any) -> None:
    write_split(tmp_path / "data", "test", count)
    output = fairseq(
        "generate", tmp_path / "data", "--gen-subset", "test", "--path", trained, "--beam", 1, "--max-len-b", 3,
        "--scoring", "sacrebleu", "--results-jsonl", tmp_path / "out.jsonl", *batching,
    )  # fmt: skip
    assert sorted(hypotheses(output)) == list(range(count))
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert sorted(row["id"] for row in rows) == sorted(f"test-{i}" for i in range(count))


@pytest.mark.parametrize(
    "options",
    [("--beam", 1), ("--beam", 3, "--lenpen", 0.5, "--nbest", 2), ("--beam", 2, "--no-repeat-ngram-size", 2)],
    ids=["greedy", "beam", "ngram"],
)
def test_batched_generation_equals_one_by_one(world: World, trained: Path, tmp_path: Path, options: Any) -> None:
    outputs = [
        fairseq(
            "generate", world.data, "--gen-subset", "test", "--path", trained, "--max-len-b", 12, "--batch-size", size,
            *options,
        )
        for size in (1, 2, 5)
    ]  # fmt: skip
    first = hypotheses(outputs[0])
    assert len(first) == 5 and len(set(map(tuple, first.values()))) > 1
    assert hypotheses(outputs[1]) == first and hypotheses(outputs[2]) == first


def test_results_are_text_with_scores_and_manifest_ids(world: World, trained: Path, tmp_path: Path) -> None:
    fairseq(
        "generate", world.data, "--gen-subset", "test", "--path", trained, "--beam", 2, "--nbest", 2, "--max-len-b", 6,
        "--results-path", tmp_path, "--prompt", "repeat",
    )  # fmt: skip
    rows = {row["id"]: row for row in read_jsonl(tmp_path / "generate-test.jsonl")}
    assert rows.keys() == {f"test-{i}" for i in range(5)}
    assert rows["test-1"]["transcript"] == SENTENCES[1] and rows["test-1"]["reference"] == SENTENCES[2]
    assert len(rows["test-1"]["n_best"]) == 2
    assert all(row["score"] < 0 and "{speech}" in row["prompt"] for row in rows.values())
    text = (tmp_path / "generate-test.txt").read_text(encoding="utf-8")
    assert re.search(rf"^T-1\t{re.escape(SENTENCES[1])}$", text, re.M)  # what is to be repeated is the transcript
    assert len(re.findall(r"^H-", text, re.M)) == len(re.findall(r"^P-", text, re.M)) == 10


def test_a_prompt_with_a_language_takes_it_from_the_rows(world: World, trained: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_split(data, "test", 3, tgt_lang="de")
    fairseq(
        "generate", data, "--gen-subset", "test", "--path", trained, "--beam", 1, "--max-len-b", 4, "--prompt",
        "translate", "--results-path", tmp_path, "--scoring", "sacrebleu",
    )  # fmt: skip
    assert all("German" in row["prompt"] for row in read_jsonl(tmp_path / "generate-test.jsonl"))


def readme_command(start: str, replace: dict[str, str]) -> list[str]:
    """The options of a command of the README, the names in it replaced by what is there in the test."""
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"```bash\n(.*?)```", readme, re.S) if b.startswith(start))
    command = re.split(r"(?<!\\)\n", block)[0]
    words = [replace.get(word, word) for word in shlex.split(command.replace("\\\n", " "))]
    return words[2:]  # without the command and the data


def test_the_commands_of_the_readme(world: World, tmp_path: Path) -> None:
    names = {
        "blspkd_fairseq": str(PACKAGE), "openai/whisper-small": str(world.whisper),
        "Qwen/Qwen2.5-7B-Instruct": str(world.llm), "checkpoints": str(tmp_path), "results": str(tmp_path / "results"),
        "checkpoints/checkpoint_best.pt": str(tmp_path / "checkpoint_best.pt"), "data/my": str(world.data),
    }  # fmt: skip
    small = ("--adapter-heads", 2, "--adapter-pre-layers", 1, "--adapter-post-layers", 1, "--eval-max-tokens", 4)
    train = readme_command("fairseq-train data", names)
    fairseq("train", world.data, *train, *small, "--max-update", 2, "--update-freq", 1, "--num-workers", 0)
    data = tmp_path / "data"
    write_split(data, "test", 3, tgt_lang="de")
    fairseq("generate", data, *readme_command("fairseq-generate data", names), "--max-len-b", 4)
    assert len(read_jsonl(tmp_path / "results" / "generate-test.jsonl")) == 3


def test_sampling_is_reproducible_by_seed(world: World, trained: Path) -> None:
    def sample(seed: int) -> dict[int, list[str]]:
        return hypotheses(
            fairseq(
                "generate", world.data, "--gen-subset", "test", "--path", trained, "--sampling", "--sampling-topp", 0.9,
                "--temperature", 1.3, "--beam", 3, "--nbest", 3, "--max-len-b", 8, "--seed", seed,
            )
        )  # fmt: skip

    one = sample(1)
    assert [len(group) for group in one.values()] == [3] * 5
    assert sample(1) == one != sample(2)


def test_interactive_reads_paths_from_stdin(world: World, trained: Path, tmp_path: Path) -> None:
    for i in range(3):
        write_speech(tmp_path / f"{i}.wav", 0.5 + 0.2 * i, seed=i, rate=22_050)
    lines = "".join(f"{tmp_path}/{i}.wav\n" for i in range(3))
    output = fairseq(
        "interactive", world.data, "--path", trained, "--beam", 1, "--max-len-b", 5, "--buffer-size", 2, "--batch-size",
        2, "--prompt", "repeat", stdin=lines,
    )  # fmt: skip
    assert sorted(hypotheses(output)) == [0, 1, 2]


def test_validate_command(world: World, trained: Path) -> None:
    output = fairseq("validate", world.data, "--path", trained, "--valid-subset", "valid", "--batch-size", 3)
    assert re.search(r"valid on 'valid' subset.*response_kl", output) or "response_kl" in output


@pytest.mark.parametrize(
    "options", [("--max-len-a", 1), ("--prefix-size", 2), ("--temperature", 2), ("--match-source-len",)]
)
def test_generation_options_without_a_counterpart_are_refused(world: World, trained: Path, options: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(options[0])):
        fairseq("generate", world.data, "--gen-subset", "test", "--path", trained, *options)


# ---- the real commands ---------------------------------------------------------------------------------------------


# What libraries say of themselves, in the midst of a command's own lines.
OF_LIBRARIES = re.compile(r"detected shared parameter|deprecated|Warning|DEBUG|Loading weights")


def test_commands_in_their_own_processes(world: World, tmp_path: Path) -> None:
    """As typed: fairseq-train, fairseq-generate and fairseq-hydra-train, with nothing imported before."""
    common = ["--llm", world.llm, "--speech-encoder", world.whisper, "--save-dir", tmp_path / "save"]
    hydra = [
        f"+task.data={world.data}", "++task._name=blsp_kd", "++model._name=blsp_kd", f"+model.llm={world.llm}",
        f"+model.speech_encoder={world.whisper}", "+model.llm_dtype=float32", "+model.adapter_heads=2",
        "+criterion._name=kl_distillation",
        "~criterion", "++optimizer._name=adam",
        f"common.user_dir={Path(__file__).parents[1] / 'blspkd_fairseq'}", f"common.cpu={DEVICE == 'cpu'}",
        "dataset.batch_size=4", "optimization.max_update=2", "optimization.lr=[1e-3]",
        f"checkpoint.save_dir={tmp_path / 'hydra'}", f"hydra.run.dir={tmp_path / 'hydra-run'}",
        "dataset.disable_validation=true", "dataset.num_workers=0",
    ]  # fmt: skip
    import subprocess

    other = subprocess.Popen(
        [*program("hydra-train"), *hydra], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path,
        env=os.environ | {"HYDRA_FULL_ERROR": "1"},
    )  # fmt: skip
    train_process = start("train", world.data, *common, *TRAIN_OPTIONS, *UPDATES)
    output, _ = train_process.communicate(timeout=PATIENCE)
    assert train_process.returncode == 0, output[-3000:]
    assert not OF_LIBRARIES.search(output), output
    generate = start(
        "generate", world.data, "--gen-subset", "test", "--path", tmp_path / "save" / "checkpoint_last.pt",
        "--max-len-b", 4, "--results-path", tmp_path / "results",
    )  # fmt: skip
    output, _ = generate.communicate(timeout=PATIENCE)
    assert generate.returncode == 0, output[-3000:]
    assert not OF_LIBRARIES.search(output), output
    assert len(read_jsonl(tmp_path / "results" / "generate-test.jsonl")) == 5
    output, _ = other.communicate(timeout=PATIENCE)
    assert other.returncode == 0, output[-3000:]
    assert json.dumps(load(tmp_path / "hydra" / "checkpoint_last.pt")["cfg"]["model"]["llm"]) == json.dumps(
        str(world.llm)
    )
