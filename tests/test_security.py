"""What a checkpoint, a folder or a configuration says never runs code: a canary for every way of loading."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fairseq, train
from tiny import save_llm, save_whisper, write_split

import blspkd_fairseq
from blspkd_fairseq import BlspKd, evaluate
from blspkd_fairseq.generation.identity import model_identity
from blspkd_fairseq.generation.responses import ResponseSettings
from blspkd_fairseq.modules.pretrained import CodeRefusedError
from blspkd_fairseq.modules.trained_state import read_trained

blspkd_fairseq.register()

REFUSED = r"needs code that comes with its files, .* --trust-remote-code .*trust_remote_code=True; .*--model-overrides"


class World:
    """A trained model, its folder, and a canary that code of others would leave."""

    def __init__(self, root: Path) -> None:
        self.root, self.canary = root, root / "CANARY"
        self.llm, self.whisper, self.data = save_llm(root / "llm"), save_whisper(root / "whisper"), root / "data"
        for split in ("train", "valid", "test"):
            write_split(self.data, split, 2)
        self.checkpoint = self.train(root / "save")
        BlspKd.from_pretrained(self.checkpoint).save_pretrained(root / "folder")

    def train(self, save: Path, *options: Any) -> Path:
        train(
            self.data, save, self.llm, self.whisper, "--max-update", 1, "--disable-validation",
            "--no-epoch-checkpoints", *options,
        )  # fmt: skip
        return save / "checkpoint_last.pt"

    def shared(self, path: Path, source: Path | None = None, **model: Any) -> Path:
        """The checkpoint as another might share it, with options of the model of its own."""
        state = torch.load(source or self.checkpoint, weights_only=True)  # nothing but data
        state["cfg"]["model"] |= model
        torch.save(state, path)
        return path

    def shared_folder(self, path: Path, **options: Any) -> Path:
        shutil.copytree(self.root / "folder", path)
        config = path / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | options))
        return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("security"))


@pytest.fixture(autouse=True)
def no_code_runs(world: World) -> Any:
    yield
    has_run = world.canary.exists()
    world.canary.unlink(missing_ok=True)
    assert not has_run


class Payload:
    """Unpickling it makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def code(world: World, folder: Path) -> None:
    (folder / "evil.py").write_text(
        f"open({str(world.canary)!r}, 'w').close()\nclass EvilConfig: pass\nclass EvilTokenizer: pass\n"
    )


# ---- LLMs whose files bring code -----------------------------------------------------------------------------------


def with_config(world: World, folder: Path) -> None:
    """Its configuration's class is in its files."""
    for path in folder.iterdir():
        path.unlink()
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    code(world, folder)


def with_tokenizer(world: World, folder: Path) -> None:
    """Only its tokenizer is."""
    path = folder / "tokenizer_config.json"
    mapped = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | mapped))
    code(world, folder)


def with_model(world: World, folder: Path) -> None:
    """The tokenizer is ordinary, and the model is of a kind that transformers has not."""
    path = folder / "config.json"
    mapped = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | mapped))
    code(world, folder)


@pytest.fixture(
    scope="module",
    params=[with_config, *(pytest.param(make, marks=pytest.mark.slow) for make in (with_tokenizer, with_model))],
    ids=lambda make: make.__name__,
)
def evil(request: pytest.FixtureRequest, world: World) -> Path:
    folder = world.root / request.param.__name__
    shutil.copytree(world.llm, folder)
    request.param(world, folder)
    return folder


def ways(world: World, evil: Path, tmp_path: Path) -> dict[str, Callable[[], Any]]:
    """All ways of loading a model that others have made, or an LLM that it names."""
    said = {"trust_remote_code": True, "llm": str(evil)}
    shared = world.shared(tmp_path / "shared.pt", **said)
    folder = world.shared_folder(tmp_path / "folder", **said)
    options = ("--path", shared, "--batch-size", 1)
    model = ("--disable-validation", "--max-update", 2, "--llm", evil, "--speech-encoder", world.whisper)

    def measured(*arguments: Any) -> None:
        evaluate.main(list(map(str, [*arguments, "--asr", world.data / "test.tsv", "--out", tmp_path / "results"])))

    return {
        "from_pretrained(checkpoint)": lambda: BlspKd.from_pretrained(shared),
        "from_pretrained(folder)": lambda: BlspKd.from_pretrained(folder),
        "fairseq-generate": lambda: fairseq("generate", world.data, "--gen-subset", "test", *options),
        "fairseq-interactive": lambda: fairseq("interactive", world.data, *options),
        "fairseq-validate": lambda: fairseq("validate", world.data, "--valid-subset", "valid", *options),
        "evaluate --checkpoint": lambda: measured("--checkpoint", f"x={shared}"),
        "evaluate --checkpoint FOLDER --text": lambda: measured("--checkpoint", f"x={folder}", "--text"),
        "evaluate --cascade": lambda: measured("--cascade", world.whisper, "--llm", evil),
        "fairseq-train --pretrained-model": lambda: world.train(tmp_path / "a", *model, "--pretrained-model", folder),
        "fairseq-train --finetune-from-model": lambda: world.train(
            tmp_path / "b", *model, "--finetune-from-model", shared
        ),
        "fairseq-train, resumed": lambda: world.train(tmp_path / "c", *model, "--restore-file", shared),
        "fairseq-train --teacher-llm": lambda: world.train(
            tmp_path / "d", "--criterion", "on_policy_distillation", "--teacher-llm", evil
        ),
    }


def test_no_way_of_loading_runs_code_that_a_file_asks_for(world: World, evil: Path, tmp_path: Path) -> None:
    for name, load in ways(world, evil, tmp_path).items():
        with pytest.raises(CodeRefusedError, match=REFUSED):
            load()
        assert not world.canary.exists(), name
    ResponseSettings(llm=str(evil)).identity()


def test_the_user_may_switch_it_on(world: World, tmp_path: Path) -> None:
    """And only so; the refusal names the option."""

    def load(way: str, shared: Path) -> None:
        overrides = ("--path", shared, "--batch-size", 1, "--model-overrides", "{'trust_remote_code': True}")
        if way == "from_pretrained":
            BlspKd.from_pretrained(shared, trust_remote_code=True)
        else:
            fairseq(way, world.data, *overrides)

    for way in ("from_pretrained", "generate", "interactive", "validate"):
        folder = tmp_path / way  # of its own: Python imports a file once
        shutil.copytree(world.llm, folder)
        with_config(world, folder)
        with pytest.raises(Exception):  # noqa: B017  (what the file's code leads to)
            load(way, world.shared(tmp_path / "shared.pt", llm=str(folder)))
        assert world.canary.exists(), way
        world.canary.unlink()


def test_a_checkpoint_trained_with_the_option_needs_it_only_if_its_llm_does(world: World, tmp_path: Path) -> None:
    shared = world.shared(tmp_path / "shared.pt", trust_remote_code=True)
    model = BlspKd.from_pretrained(shared)
    assert not model.config.trust_remote_code
    BlspKd.from_pretrained(shared, trust_remote_code=True).save_pretrained(tmp_path / "folder")
    assert "trust_remote_code" not in json.loads((tmp_path / "folder" / "config.json").read_text())
    assert "trust_remote_code" not in read_trained(shared)[0]


def test_a_teacher_that_a_checkpoint_names(world: World, tmp_path: Path) -> None:
    """fairseq-validate builds the criterion of the checkpoint, and with it the teacher."""
    x_opd = world.train(tmp_path / "x", "--criterion", "on_policy_distillation", "--rollout-max-tokens", 2)
    folder = tmp_path / "llm"
    shutil.copytree(world.llm, folder)
    with_tokenizer(world, folder)
    state = torch.load(x_opd, weights_only=True)
    state["cfg"]["criterion"] |= {"teacher_llm": str(folder), "trust_remote_code": True}
    torch.save(state, tmp_path / "shared.pt")
    with pytest.raises(CodeRefusedError, match=REFUSED):
        fairseq("validate", world.data, "--path", tmp_path / "shared.pt", "--batch-size", 1)


# ---- speech encoders, kernels, adapters, weights, templates --------------------------------------------------------


def changed(world: World, source: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(source, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    code(world, folder)
    return folder


def test_speech_encoders_never_bring_code(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask at the terminal
    mapped = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    folder = changed(world, world.whisper, tmp_path / "whisper", **mapped)
    shared = world.shared(tmp_path / "shared.pt", speech_encoder=str(folder), trust_remote_code=True)
    for trusts in (False, True):
        with pytest.raises(CodeRefusedError, match="the speech encoder .* needs code .*: take another one"):
            BlspKd.from_pretrained(shared, trust_remote_code=trusts)
    with pytest.raises(ValueError, match="there is no model"):
        evaluate.main(["--asr", str(world.data / "test.tsv"), "--out", str(tmp_path / "o"), "--cascade", str(folder),
                       "--llm", str(world.llm)])  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel"},
        {"text_config": {"attn_implementation": "someone/kernel:attention"}},
        {"experts_implementation": "someone/experts"},
    ],
    ids=lambda config: "-".join(config),
)
def test_kernels_of_the_hub_are_code(world: World, tmp_path: Path, config: dict[str, Any]) -> None:
    folder = changed(world, world.llm, tmp_path / "llm", **config)
    with pytest.raises(
        CodeRefusedError, match="needs the kernels someone/.* of the Hugging Face hub, .*--trust-remote"
    ):
        BlspKd.from_pretrained(world.checkpoint, llm=str(folder))


def test_an_adapter_is_no_llm(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(world.llm, folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    message = "--llm .*adapter is a PEFT adapter of someone/else and no whole model: merge it"
    with pytest.raises(ValueError, match=message):
        BlspKd.from_pretrained(world.checkpoint, llm=str(folder))
    with pytest.raises(ValueError, match=message):
        world.train(tmp_path / "save", "--llm", folder)


def test_pickles_are_read_as_data(world: World, tmp_path: Path) -> None:
    llm, whisper = tmp_path / "llm", tmp_path / "whisper"
    for source, folder in ((world.llm, llm), (world.whisper, whisper)):
        shutil.copytree(source, folder)
        (folder / "model.safetensors").unlink()
        torch.save({"model.norm.weight": Payload(world.canary)}, folder / "pytorch_model.bin")
    torch.save({"cfg": {"model": {}}, "model": Payload(world.canary)}, tmp_path / "model.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(world.canary)))
    for overrides in ({"llm": str(llm)}, {"speech_encoder": str(whisper)}):
        with pytest.raises(Exception, match="[Ww]eights.only|cannot load"):
            BlspKd.from_pretrained(world.checkpoint, **overrides)
    import average_checkpoints

    for path in (tmp_path / "model.pt", tmp_path / "plain.pt"):
        for load in (
            lambda: BlspKd.from_pretrained(path),  # noqa: B023
            lambda: fairseq("generate", world.data, "--path", path),  # noqa: B023
            lambda: fairseq("interactive", world.data, "--path", path),  # noqa: B023
            lambda: fairseq("validate", world.data, "--path", path, "--batch-size", 1),  # noqa: B023
            lambda: world.train(tmp_path / "a", "--pretrained-model", path),  # noqa: B023
            lambda: average_checkpoints.average([path], tmp_path / "mean.pt"),  # noqa: B023
        ):
            with pytest.raises(ValueError, match="is damaged|is no checkpoint of|or is damaged"):
                load()
        for option in ("--finetune-from-model", "--restore-file"):
            with pytest.raises(ValueError, match="is damaged|is no checkpoint of"):
                world.train(tmp_path / "b", option, path)


def test_templates_run_in_a_sandbox(world: World, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    attack = f"cycler.__init__.__globals__.os.system('touch {world.canary}')"
    template.write_text("{{ " + attack + " }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(Exception, match="unsafe|undefined"):
        BlspKd.from_pretrained(world.shared(tmp_path / "shared.pt", chat_template=str(template)))


@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("criterion", {"_name": "ctc", "wer_args": "__import__('os').system('touch CANARY')"}),
        ("model", {"_name": "wav2vec_ctc", "w2v_path": "evil.pt"}),
        ("task", {"_name": "audio_finetuning", "eval_wer": True}),
    ],
)
def test_nothing_else_of_fairseq_is_built_from_a_checkpoint(
    world: World, tmp_path: Path, part: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.root)
    state = torch.load(world.checkpoint, weights_only=True)
    state["cfg"][part] = options
    torch.save(state, tmp_path / "shared.pt")
    for command in ("generate", "interactive", "validate"):
        with pytest.raises(
            ValueError, match=f"is no checkpoint of this project, whose {part} is .*: it names '{options['_name']}'"
        ):
            fairseq(command, world.data, "--path", tmp_path / "shared.pt", "--batch-size", 1)


def test_base_models_are_shown_before_anything_is_fetched(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    local, remote = world.checkpoint, world.shared(tmp_path / "shared.pt", llm="someone/unknown")
    BlspKd.from_pretrained(local)
    with pytest.raises(ValueError, match="cannot load the tokenizer 'someone/unknown'"):
        BlspKd.from_pretrained(remote)
    with pytest.raises(ValueError, match="cannot load the tokenizer 'someone/unknown'"):
        fairseq("generate", world.data, "--path", remote)
    shown = [record for record in caplog.records if "base models that" in record.getMessage()]
    assert [record.levelname for record in shown] == ["WARNING"] * 2  # nothing is said of local ones above INFO
    for record in shown:
        assert f"{remote} names: LLM someone/unknown (not local), speech encoder {world.whisper} (local); what is" in (
            record.getMessage()
        )


def test_a_name_of_the_hub_is_identified_without_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import hub

    snapshot = tmp_path / "models--someone--llm" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}')
    monkeypatch.setattr(hub, "cached_file", lambda name, file: str(snapshot / file))
    assert model_identity("someone/llm") == f"someone/llm@{'0' * 40}"
