"""BlspKd: trained models in Python."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from commands import train
from tiny import save_llm, save_whisper, tiny_model, write_speech, write_split

from blspkd_fairseq import BlspKd


class Trained:
    """A checkpoint of fairseq-train and some speech."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.llm, self.whisper = save_llm(root / "llm"), save_whisper(root / "whisper")
        write_split(root / "data", "train", 4)
        train(
            root / "data", root / "save", self.llm, self.whisper, "--max-update", 2, "--disable-validation",
        )  # fmt: skip
        self.checkpoint = root / "save" / "checkpoint_last.pt"
        self.audio = [root / f"{i}.wav" for i in range(3)]
        for i, path in enumerate(self.audio):
            write_speech(path, 0.5 + 0.3 * i, seed=i, rate=(16_000, 44_100, 8_000)[i])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def model(trained: Trained) -> BlspKd:
    return BlspKd.from_pretrained(trained.checkpoint)


def test_a_list_gives_a_list_and_the_batch_does_not_matter(model: BlspKd, trained: Trained) -> None:
    together = model.generate(trained.audio, max_new_tokens=8)
    assert isinstance(together, list) and len(together) == 3
    assert [model.generate(path, max_new_tokens=8) for path in trained.audio] == together
    assert model.generate(trained.audio, max_new_tokens=8, batch_size=2) == together
    assert model.generate([], max_new_tokens=8) == []


def test_arrays_with_their_rate_are_as_good_as_files(model: BlspKd, trained: Trained) -> None:
    samples, rate = soundfile.read(trained.audio[1], dtype="float32")
    stereo = np.stack([samples, samples], 1)
    expected = model.transcribe(trained.audio[1], max_new_tokens=6)
    assert model.transcribe((samples, rate), max_new_tokens=6) == expected
    assert model.transcribe((torch.from_numpy(stereo), rate), max_new_tokens=6) == expected


def test_instructions_and_decoding_options(model: BlspKd, trained: Trained) -> None:
    audio = trained.audio[0]
    assert isinstance(model.translate(audio, target="de", max_new_tokens=4), str)
    assert model.generate(audio, "Say it again: {speech}", max_new_tokens=4) == model.generate(
        audio, instruction="Say it again: {speech}", max_new_tokens=4
    )
    assert len(model.generate(audio, beam=3, n_best=2, max_new_tokens=4)) == 2
    with pytest.raises(ValueError, match="nosuchprompt"):
        model.generate(audio, "nosuchprompt")
    with pytest.raises(ValueError, match="n-best"):
        model.generate(audio, beam=1, n_best=2)
    with pytest.raises(ValueError, match="rate"):
        model.generate([np.zeros(16_000)])
    samples = np.zeros(16_000)
    for wrong, message in (
        ({"audio": samples}, "rate"),
        ({"audio": None}, "there is no audio"),
        ({"audio": (samples, float("nan"))}, "whole number of Hz, got nan"),
        ({"audio": (samples, 0.5)}, "whole number of Hz"),
        ({"audio": audio, "instruction": None}, "a prompt is a name or a text, not None"),
        ({"audio": audio, "batch_size": 0}, "batch size must be a whole number of at least 1, got 0"),
        ({"audio": audio, "beam": 0}, "beam must be 1 to 1024"),
        ({"audio": audio, "beam": 2, "length_penalty": float("nan")}, "length penalty finite"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**wrong)
    assert model.generate((samples, np.float32(16_000)), max_new_tokens=2) == model.generate(
        (samples, 16_000), max_new_tokens=2
    )


def test_alignment_covers_the_speech_in_order(model: BlspKd, trained: Trained) -> None:
    tokens = model.align(trained.audio[2])
    times = [0.0] + [token.end for token in tokens]
    assert times == sorted(times) and [t.start for t in tokens] == times[:-1]
    assert tokens[-1].end == pytest.approx(1.1, abs=0.03)
    two = trained.audio[:2]
    assert [len(aligned) for aligned in model.align(two, ["Play it.", "Stop."])] == [
        len(model.chat_format.encode_text(text)) for text in ("Play it.", "Stop.")
    ]
    for audio, transcript in ((two, "Hi"), (two, ["x"]), (two[0], ["x"]), (two[0], " "), (two, ["x", ""])):
        with pytest.raises(ValueError, match="transcript"):
            model.align(audio, transcript)


def test_without_the_llm_only_an_adapter_with_an_embedding_for_each_token_writes(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, adapter="cnn", adapter_bottleneck=8)
    with pytest.raises(ValueError, match="cnn has no embedding for each token"):
        model.transcripts([(np.ones(8000, np.float32), 16_000)], None)


@pytest.mark.parametrize("from_folder", [True, False])
def test_saved_and_loaded_it_answers_the_same(
    model: BlspKd, trained: Trained, tmp_path: Path, from_folder: bool
) -> None:
    if from_folder:
        model.save_pretrained(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
        assert len({p.stat().st_mode for p in tmp_path.iterdir()}) == 1  # who may read one may read the other
    source = tmp_path if from_folder else trained.checkpoint.parent  # a folder of checkpoints
    again = BlspKd.from_pretrained(source)
    assert again.generate(trained.audio, max_new_tokens=8) == model.generate(trained.audio, max_new_tokens=8)


def test_half_the_size(model: BlspKd, trained: Trained, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "half", dtype="float16")
    whole, half = (BlspKd.from_pretrained(tmp_path / name).model for name in ("whole", "half"))
    for (name, one), other in zip(whole.named_parameters(), half.parameters(), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6, msg=name)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.75 * sizes[0]  # names and fingerprints keep their size
    with pytest.raises(ValueError, match="dtype 'int8' is unknown: choose from float32"):
        model.save_pretrained(tmp_path, dtype="int8")


def test_base_models_in_the_home_folder(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(trained.root))
    again = BlspKd.from_pretrained(trained.checkpoint, llm="~/llm", speech_encoder="~/whisper")
    assert again.config.llm == "~/llm"


def test_other_base_models_and_wrong_options_are_said_plainly(trained: Trained, tmp_path: Path) -> None:
    other_llm = save_llm(tmp_path / "llm", seed=5)
    with pytest.raises(ValueError, match="another LLM.*--llm"):
        BlspKd.from_pretrained(trained.checkpoint, llm=str(other_llm))
    with pytest.raises(ValueError, match="another speech encoder.*--speech-encoder"):
        BlspKd.from_pretrained(trained.checkpoint, speech_encoder=str(save_whisper(tmp_path / "whisper", seed=5)))
    with pytest.raises(ValueError, match="another LLM"):
        BlspKd.from_pretrained(trained.checkpoint, llm=str(save_llm(tmp_path / "big", hidden=64)))
    with pytest.raises(ValueError, match="does not fit.*and not"):
        BlspKd.from_pretrained(trained.checkpoint, lora_rank=2)
    with pytest.raises(ValueError, match="does not fit.*is unknown"):
        BlspKd.from_pretrained(trained.checkpoint, lora_scope="none")
    # Of the same shapes, and yet not what was trained.
    for option, other, message in (
        ("adapter_heads", 4, "trained with --adapter-heads 2, .* something else with --adapter-heads 4"),
        ("adapter_alignment", "pif", "trained with --adapter-alignment cif, .*: give --adapter-alignment cif"),
        ("lora_alpha", 64.0, "trained with --lora-alpha 16, .*: give --lora-alpha 16"),
    ):
        with pytest.raises(ValueError, match=message):
            BlspKd.from_pretrained(trained.checkpoint, **{option: other})
    with pytest.raises(ValueError, match="must not be negative, got -1, 1 and None"):
        BlspKd.from_pretrained(trained.checkpoint, adapter_pre_layers=-1)
    with pytest.raises(ValueError, match="--adapter-alignment pif aligns tokens in the cformer"):
        BlspKd.from_pretrained(trained.checkpoint, adapter="cnn", adapter_alignment="pif")
    with pytest.raises(ValueError, match="unknown --adapter 'nonesuch': choose from cformer"):
        BlspKd.from_pretrained(trained.checkpoint, adapter="nonesuch")
    with pytest.raises(ValueError, match="cannot load the .*'/no/such/llm'"):
        BlspKd.from_pretrained(trained.checkpoint, llm="/no/such/llm")
    with pytest.raises(ValueError, match="unknown options nonesuch"):
        BlspKd.from_pretrained(trained.checkpoint, nonesuch=1)
    with pytest.raises(ValueError, match="no checkpoint at"):
        BlspKd.from_pretrained(tmp_path / "none.pt")
    (tmp_path / "damaged.pt").write_bytes(trained.checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        BlspKd.from_pretrained(tmp_path / "damaged.pt")


def test_half_precision_of_the_same_base_is_the_same_base(trained: Trained) -> None:
    assert BlspKd.from_pretrained(trained.checkpoint, llm_dtype="bfloat16").model.llm.dtype == torch.bfloat16
