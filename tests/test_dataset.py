"""The data set and what is wrong with data: one sentence that names the row, before anything is written."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from commands import fairseq, load, train
from tiny import SENTENCES, save_llm, save_whisper, write_split

import blspkd_fairseq
from blspkd_fairseq.data.audio import AudioError
from blspkd_fairseq.data.batch import Batch, Layout, pad_ids
from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.data.dataset import SpeechTextDataset
from blspkd_fairseq.data.manifest import Manifest, ManifestError, write_manifest
from blspkd_fairseq.data.prompts import PromptError
from blspkd_fairseq.generation.results import UnansweredError


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return save_llm(root / "llm"), save_whisper(root / "whisper")


@pytest.fixture(scope="module")
def chat(models: tuple[Path, Path]) -> ChatFormat:
    from blspkd_fairseq.modules.build import SpeechLlmConfig, load_chat_format

    return load_chat_format(SpeechLlmConfig(llm=str(models[0])))


def rows_of(path: Path) -> list[dict[str, str]]:
    manifest = Manifest.load(path)
    return [manifest[i] for i in range(len(manifest))]


def rewrite(path: Path, index: int, **cells: object) -> None:
    rows: list[dict[str, Any]] = list(rows_of(path))
    rows[index] |= cells
    write_manifest(path, rows, list(rows[0]))


def plan_of(batch: dict[str, Any]) -> Batch:
    return batch["net_input"]["spec"].build(batch["net_input"]["plan"])


def in_order(layout: Layout) -> list[list[int]]:
    """Ids of the prefix and of each row, as they are read."""
    return [ids.tolist() for ids in layout.ids[layout.rows.order].split([layout.rows.prefix, *layout.rows.counts])]


def test_a_batch_holds_the_sequences_and_their_common_prefix(tmp_path: Path, chat: ChatFormat) -> None:
    write_split(tmp_path, "train", 3)
    rewrite(tmp_path / "train.tsv", 1, tgt_text='\tTab, "quote", \\n and 😀 <|im_end|>')
    data = SpeechTextDataset(Manifest.load(tmp_path / "train.tsv"), chat, prompt="repeat")
    batch = data.collater([data[i] for i in range(3)])
    plan = plan_of(batch)
    before, after = chat.prompt_ids(batch["prompts"][0])
    layout = plan.student
    assert layout is plan.teacher and layout.rows.prefix == len(before)
    prefix, *rows = in_order(layout)
    assert prefix == before
    for i, ids in enumerate(rows):
        transcript = chat.encode_text(SENTENCES[i])
        assert ids[: len(transcript) + len(after)] == transcript + after
        response = ids[len(transcript) + len(after) :]
        assert response == plan.response.targets[plan.response.rows == i].tolist()
        assert response[-1] == chat.end_of_turn_id and chat.end_of_turn_id not in response[:-1]
        assert chat.decode(response) == data.manifest[i]["tgt_text"]
    assert batch["net_input"]["src_lengths"].tolist() == data.manifest.n_frames.tolist()
    assert batch["target"].min() == -1 and batch["nsentences"] == 3


def test_rows_may_have_their_own_prompts_languages_and_cut_responses(tmp_path: Path, chat: ChatFormat) -> None:
    write_split(tmp_path, "train", 2, prompt="translate", tgt_lang="de", cut="1")
    rewrite(tmp_path / "train.tsv", 1, prompt="", cut="0")
    data = SpeechTextDataset(Manifest.load(tmp_path / "train.tsv"), chat, prompt="repeat")
    batch = data.collater([data[0], data[1]])
    assert "German" in batch["prompts"][0] and "German" not in batch["prompts"][1]
    plan = plan_of(batch)
    assert 0 < plan.student.rows.prefix < len(chat.prompt_ids(batch["prompts"][0])[0])
    responses = [plan.response.targets[plan.response.rows == i].tolist() for i in range(2)]
    assert chat.end_of_turn_id not in responses[0] and chat.end_of_turn_id in responses[1]
    assert plan.ends.tolist() == [len(responses[0]) + len(responses[1]) - 1]
    rewrite(tmp_path / "train.tsv", 1, cut="true")
    data = SpeechTextDataset(Manifest.load(tmp_path / "train.tsv"), chat, prompt="repeat")
    with pytest.raises(ManifestError, match=r"train.tsv.*cut is 'true': write 1 where the response was cut, or 0"):
        data[1]


def test_order_is_by_length_and_differs_between_training_epochs(tmp_path: Path, chat: ChatFormat) -> None:
    write_split(tmp_path, "train", 12)
    for shuffle in (False, True):
        data = SpeechTextDataset(Manifest.load(tmp_path / "train.tsv"), chat, shuffle=shuffle)
        orders = []
        for seed in range(2):
            np.random.seed(seed)
            order = data.ordered_indices()
            assert sorted(order) == list(range(12))
            assert (np.diff(data.manifest.n_frames[order]) <= 0).all()
            orders.append(order.tolist())
        assert (orders[0] != orders[1]) == shuffle


def test_small_helpers() -> None:
    assert pad_ids([[1], [2, 3]], -1).tolist() == [[1, -1], [2, 3]]


def test_training_tokens_are_those_of_all_folders(chat: ChatFormat, tmp_path: Path) -> None:
    blspkd_fairseq.register()
    from blspkd_fairseq.tasks.blsp_kd import BlspKdTask

    for name, count in (("one", 1), ("two", 4)):
        write_split(tmp_path / name, "spoken", count)
    texts = [row["src_text"] for row in Manifest.load(tmp_path / "two" / "spoken.tsv")]
    cfg = SimpleNamespace(data=f"{tmp_path / 'one'}:{tmp_path / 'two'}")
    task = SimpleNamespace(cfg=cfg, chat=chat, _train_split="spoken")
    tokens = BlspKdTask.training_tokens(task)  # type: ignore[arg-type]
    assert tokens.tolist() == sorted({token for text in texts for token in chat.encode_text(text)})


# ---- bad input -----------------------------------------------------------------------------------------------------


def run(models: tuple[Path, Path], data: Path, *options: Any) -> str:
    return train(data, data / "save", *models, "--max-update", 2, "--disable-validation", *options)


BAD_CELLS = {
    "empty transcript": ({"src_text": " "}, "line 3.*src_text"),
    "empty response": ({"tgt_text": ""}, "line 3.*tgt_text"),
    "duplicate id": ({"id": "train-0"}, "lines 2 and 3.*train-0"),
    "missing audio": ({"audio": "audio/none.flac"}, "line 3.*audio/none.flac"),
    "audio outside the root": ({"audio": "../elsewhere.flac"}, "line 3.*elsewhere"),
    "too long": ({"n_frames": 500_000}, "line 3.*31.2 s.*--skip-bad-audio"),
    "truncated": ({"n_frames": 100_000}, "line 3.*truncated"),
    "no number": ({"n_frames": "many"}, "line 3.*n_frames"),
    "unknown prompt": ({"prompt": "nonesuch"}, "line 3.*nonesuch"),
    "another text": ({"src_text": "word " * 200}, "line 3.* tokens of transcript for 0.7 s of audio"),
}


@pytest.mark.parametrize(("cells", "message"), BAD_CELLS.values(), ids=BAD_CELLS)
def test_a_bad_row_is_named_and_nothing_is_saved(
    models: tuple[Path, Path], tmp_path: Path, cells: dict[str, Any], message: str
) -> None:
    path = write_split(tmp_path, "train", 3, prompt="")
    rewrite_anyhow(path, 1, cells)
    with pytest.raises((ManifestError, AudioError, PromptError), match=message):
        run(models, tmp_path)
    assert not list(tmp_path.glob("save/*.pt"))


def rewrite_anyhow(path: Path, index: int, cells: dict[str, Any]) -> None:
    """Edits the text, since no writer or reader of ours would take such rows."""
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    row = dict(zip(header.split("\t"), lines[index].split("\t"), strict=True)) | cells
    lines[index] = "\t".join(str(row[name]) for name in header.split("\t"))
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(0), "line 3.*(empty|no samples|zero)"),
        (np.full(9_600, np.nan), "line 3.*(NaN|finite)"),
    ],
    ids=["empty", "nan"],
)
def test_bad_audio_stops_training_or_is_left_out(
    models: tuple[Path, Path], tmp_path: Path, samples: np.ndarray, message: str
) -> None:
    path = write_split(tmp_path, "train", 3)
    soundfile.write(tmp_path / "audio" / "bad.wav", samples.astype(np.float32), 16_000, subtype="FLOAT")
    rewrite(path, 1, audio="audio/bad.wav", n_frames=9_600)
    with pytest.raises(AudioError, match=message):
        run(models, tmp_path)
    log = run(models, tmp_path, "--skip-bad-audio", "--batch-size", 1, "--save-dir", tmp_path / "other")
    assert "left out" in log and (tmp_path / "other" / "checkpoint_last.pt").exists()


def test_a_batch_that_is_left_out_has_no_weight_in_its_update(models: tuple[Path, Path], tmp_path: Path) -> None:
    path = write_split(tmp_path, "train", 3)
    update = ("--batch-size", 1, "--update-freq", 8, "--optimizer", "sgd", "--lr", 1, "--adapter-dropout", 0,
              "--lora-dropout", 0, "--max-update", 1)  # fmt: skip
    run(models, tmp_path, *update, "--save-dir", tmp_path / "good")
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    bad = [lines[0].replace("train-0", f"bad-{i}") for i in range(2)]
    path.write_text("\n".join([header, *lines, *bad]) + "\n", encoding="utf-8")
    frames = [99_000, 1]  # the longest, which fairseq takes for its stand-in, and the shortest
    for i in range(2):
        rewrite_anyhow(path, 3 + i, {"audio": "audio/none.flac", "n_frames": frames[i]})
    log = run(models, tmp_path, *update, "--save-dir", tmp_path / "bad", "--skip-bad-audio", "--max-bad-audio-share", 1)
    assert log.count("left out") >= 2
    good, bad_too = (load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("good", "bad"))
    for name, weight in good.items():
        torch.testing.assert_close(bad_too[name], weight)


def test_missing_columns_and_manifests_are_named(models: tuple[Path, Path], tmp_path: Path) -> None:
    write_split(tmp_path, "train", 3, drop=["tgt_text"])
    with pytest.raises(ManifestError, match="train.tsv.*tgt_text"):
        run(models, tmp_path)
    with pytest.raises(ManifestError, match="valid.tsv"):
        train(tmp_path, tmp_path / "save", *models, "--max-update", 1, "--response-kl-weight", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--adapter", "nonesuch"), "--adapter.*cformer"),
        (("--lora-scope", "nonesuch"), "--lora-scope.*speech"),
        (("--prompt", "nonesuch"), "nonesuch"),
        (("--adapter-heads", 3), "heads"),
        (("--kd-temperature", 0), "--kd-temperature"),
        (("--cache-encoder-features", "--unfreeze-speech-encoder"), "--cache-encoder-features"),
        (("--response-kl-weight", 0, "--input-kl-weight", 0, "--quantity-weight", 0), "weight"),
    ],
    ids=str,
)
def test_bad_options_are_named(models: tuple[Path, Path], tmp_path: Path, options: Any, message: str) -> None:
    write_split(tmp_path, "train", 2)
    with pytest.raises(ValueError, match=message):
        run(models, tmp_path, *options)


def test_a_vocabulary_that_is_too_small_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    small = save_llm(tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(small)
    tokenizer.add_tokens([f"word{i}" for i in range(50)])
    tokenizer.save_pretrained(small)
    write_split(tmp_path, "train", 2)
    with pytest.raises(ValueError, match="embeds only"):
        run((small, models[1]), tmp_path)


@pytest.mark.parametrize("criterion", ["kl_distillation", "on_policy_distillation"])
def test_weights_of_zero_alpha_are_said(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, criterion: str
) -> None:
    from blspkd_fairseq.modules.cformer import CFormer

    adapt = CFormer.adapt
    monkeypatch.setattr(
        CFormer, "adapt", lambda *args: (out := adapt(*args))._replace(alpha_sum=torch.zeros_like(out.alpha_sum))
    )
    write_split(tmp_path, "train", 2)
    with pytest.raises(ValueError, match="CIF weights of utterance 'train-"):
        run(models, tmp_path, "--criterion", criterion)


def test_interactive_names_the_file(models: tuple[Path, Path], tmp_path: Path) -> None:
    write_split(tmp_path, "train", 2)
    run(models, tmp_path)
    with pytest.raises(UnansweredError, match="none.wav"):
        fairseq("interactive", tmp_path, "--path", tmp_path / "save" / "checkpoint_last.pt", stdin="none.wav\n")
