"""A frozen LLM in 8 or 4 bits: the same checkpoints and caches, and Partial LoRA on top."""

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import updates
from commands import fairseq, load, train
from test_llm_families import make
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from blspkd_fairseq import BlspKd, compat
from blspkd_fairseq.generation.identity import llm_identity
from blspkd_fairseq.generation.responses import ResponseSettings
from blspkd_fairseq.model_card import Card, write_card
from blspkd_fairseq.modules.build import SpeechLlmConfig, build_speech_llm
from blspkd_fairseq.modules.fingerprint import fingerprint, identity, same_fingerprint
from blspkd_fairseq.modules.partial_lora import PartialLoraLinear, add_partial_lora, speech_positions
from blspkd_fairseq.modules.quantized import (
    Int8Linear,
    Nf4Linear,
    QuantizedLinear,
    frozen_weight,
    quantize_linears,
)
from blspkd_fairseq.modules.trained_state import load_trained_state_dict, trained_state_dict

KINDS = ("int8", "nf4")
IDS = torch.arange(3, 17).view(2, 7)
MASK = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0, 0]]).bool()


def has_bitsandbytes() -> bool:
    try:
        compat.import_bitsandbytes("a test")
    except ValueError:
        return False
    return True


needs_package = pytest.mark.skipif(not has_bitsandbytes(), reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    tiny.save_llm(folder / "llm")
    tiny.save_whisper(folder / "whisper")
    return folder


def config_of(root: Path, **options: Any) -> SpeechLlmConfig:
    return SpeechLlmConfig(
        llm=str(root / "llm"), speech_encoder=str(root / "whisper"), adapter_heads=2, adapter_pre_layers=1,
        adapter_post_layers=1, lora_rank=2, **options,
    )  # fmt: skip


# ---- a layer --------------------------------------------------------------------------------------------------------

NF4 = torch.tensor([-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
                    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0])  # fmt: skip


def expected_nf4(weight: Tensor) -> Tensor:
    """Blocks of 64 along the rows, each weight the nearest of 16 values times the block's largest."""
    flat = torch.cat([weight.flatten(), torch.zeros(-weight.numel() % 64)]).view(-1, 64)
    largest = flat.abs().amax(1, keepdim=True)
    nearest = (flat / largest).unsqueeze(2).sub(NF4).abs().argmin(2)
    return (NF4[nearest] * largest).flatten()[: weight.numel()].view_as(weight)


def expected_int8(weight: Tensor) -> Tensor:
    """Each weight a multiple of a 127th of its row's largest."""
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step).round() * step


@needs_package
@pytest.mark.parametrize("shape", [(64, 128), (48, 32), (8, 96), (7, 100)])
def test_the_weights_are_those_of_the_definition(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half().float()  # int8 goes through fp16
    torch.testing.assert_close(Nf4Linear(weight, None).restored(torch.float32), expected_nf4(weight))
    restored = Int8Linear(weight, None).restored(torch.float32)
    step = weight.abs().amax(1, keepdim=True) / 127
    # Halves may go either way.
    assert ((restored - weight).abs() <= 0.51 * step).all()
    assert ((restored - expected_int8(weight)).abs() > 0.01 * step).float().mean() < 0.02


@needs_package
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [nn.Linear(64, 48), nn.Linear(64, 48, bias=False), Conv1D(48, 64)])
def test_products_and_gradients_are_those_of_the_restored_weight(layer: nn.Module, kind: str) -> None:
    llm = make("llama")
    llm.model.layers[0].mlp.up_proj = copy.deepcopy(layer)
    quantize_linears(llm, kind)
    quantized = llm.model.layers[0].mlp.up_proj
    assert isinstance(quantized, QuantizedLinear) and quantized.weight.dtype.itemsize == 1
    assert quantized.weight.numel() == (48 * 64 if kind == "int8" else 48 * 64 // 2)
    x = torch.randn(3, 5, 64).requires_grad_()
    weight = quantized.restored(torch.float32)
    expected = nn.functional.linear(x, weight, quantized.bias)
    assert torch.equal(quantized(x), expected)
    direction = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, x, direction)
    (gradient,) = torch.autograd.grad(quantized(x), x, direction)
    torch.testing.assert_close(gradient, wanted)
    assert quantized.restored(torch.bfloat16).dtype == torch.bfloat16


# ---- an LLM ---------------------------------------------------------------------------------------------------------


def linear_layers(llm: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in llm.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


@needs_package
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "gpt_neox", "bloom", "lfm2"])
def test_partial_lora_acts_on_quantised_layers_as_on_those_with_the_restored_weights(family: str, kind: str) -> None:
    plain = make(family)
    llm = copy.deepcopy(plain)
    assert quantize_linears(llm, kind) == sum(isinstance(m, QuantizedLinear) for m in llm.modules()) > 0
    head, embeddings = llm.get_output_embeddings(), llm.get_input_embeddings()
    assert not isinstance(head, QuantizedLinear)
    assert torch.equal(head.weight, plain.get_output_embeddings().weight)
    assert torch.equal(embeddings.weight, plain.get_input_embeddings().weight)
    dense = dict(linear_layers(plain))
    with torch.no_grad():
        for name, module in linear_layers(llm):
            restored = frozen_weight(module, torch.float32)
            dense[name].weight.copy_(restored.t() if isinstance(dense[name], Conv1D) else restored)
        base = llm(IDS).logits
    results = []
    for model in (llm, plain):
        torch.manual_seed(0)
        add_partial_lora(model, rank=2, dropout=0.0)
        tiny.wake_lora(model)
        assert torch.equal(model(IDS).logits, base) or model is plain
        embeds = embeddings(IDS).detach().requires_grad_()
        with speech_positions(model, MASK):
            logits = model(inputs_embeds=embeds).logits
        assert torch.equal(logits[:, :2], base[:, :2]) or model is plain or family == "bloom"
        assert ((logits - base).abs().amax(2) > 1e-5)[MASK].all()
        logits.logsumexp(2).sum().backward()
        gradients = [p.grad for n, p in sorted(model.named_parameters()) if p.requires_grad]
        results.append((logits.detach(), embeds.grad, *gradients))
    assert len(results[0]) == len(results[1]) > 2
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=2e-4)


@needs_package
@pytest.mark.parametrize("family", ["jamba", "granitemoehybrid"])
def test_layers_whose_weights_mamba_reads_by_itself_stay(family: str) -> None:
    llm = make(family)
    with torch.no_grad():
        before = llm(IDS).logits
        assert quantize_linears(llm, "int8") > 0
        assert (llm(IDS).logits - before).abs().mean() < 0.1 * before.abs().mean()
    quantized = [name for name, module in llm.named_modules() if isinstance(module, QuantizedLinear)]
    assert any("self_attn" in name for name in quantized) and not any("mamba" in name for name in quantized)


@needs_package
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", updates.CASES)
def test_an_update_trains_and_asks_the_device_for_nothing(case: str, kind: str, root: Path) -> None:
    world = world_of(root)
    chosen = updates.CASES[case]
    model = world.build(chosen._replace(model={**chosen.model, "llm_quantization": kind}), torch.device("cpu"))
    assert any(isinstance(m, PartialLoraLinear) and isinstance(m.base_layer, QuantizedLinear) for m in model.modules())
    criterion, optimizer = updates.criterion_of(chosen, model), updates.optimizer_of(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with updates.fixed_rollouts():
        updates.update(model, criterion, world.sample(model, torch.device("cpu")), optimizer)
        sample = world.sample(model, torch.device("cpu"))
        with updates.no_host_reads(torch.device("cpu")):
            updates.update(model, criterion, sample, optimizer)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.removeprefix("speech_llm.") in model.speech_llm.trained_names for name in changed)


_WORLDS: dict[Path, updates.TinyWorld] = {}


def world_of(root: Path) -> updates.TinyWorld:
    return _WORLDS.setdefault(root, updates.TinyWorld(root / "world"))


# ---- what does not depend on it -------------------------------------------------------------------------------------


@needs_package
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_fit_the_llm_quantised_or_not(root: Path, kind: str) -> None:
    models = {bits: build_speech_llm(config_of(root, llm_quantization=bits))[0] for bits in ("none", kind)}
    states = {bits: trained_state_dict(model) for bits, model in models.items()}
    assert states["none"].keys() == states[kind].keys()
    for name in ("frozen.llm", "frozen.speech_encoder"):
        assert torch.equal(states["none"][name], states[kind][name])
    load_trained_state_dict(models["none"], states[kind])
    load_trained_state_dict(models[kind], states["none"])
    assert torch.equal(fingerprint(copy.deepcopy(models[kind]).llm), states["none"]["frozen.llm"])
    assert identity(models[kind].speech_encoder) == identity(models["none"].speech_encoder)  # of stored features


def test_responses_are_those_of_the_llm_and_answers_of_its_bits(root: Path) -> None:
    plain = llm_identity(config_of(root))
    assert ResponseSettings(str(root / "llm")).identity().items() >= plain.items()
    for kind in KINDS:
        assert llm_identity(config_of(root, llm_quantization=kind)) == {**plain, "llm_quantization": kind}


@needs_package
def test_copies_share_the_quantised_weights(root: Path) -> None:
    model = build_speech_llm(config_of(root, llm_quantization="nf4"))[0]
    twin = copy.deepcopy(model)
    layers = [[m for m in one.modules() if isinstance(m, QuantizedLinear)] for one in (model, twin)]
    assert layers[0] and all(a.scale is b.scale and a.weight is b.weight for a, b in zip(*layers, strict=True))


@needs_package
@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_it_is_trained_resumed_and_used_with_and_without(root: Path, tmp_path: Path, kind: str) -> None:
    data, save, llm, whisper = tmp_path / "data", tmp_path / "save", root / "llm", root / "whisper"
    tiny.write_split(data, "train", 4)
    tiny.write_split(data, "test", 2)
    options = ("--disable-validation", "--llm-quantization", kind)
    log = train(data, save, llm, whisper, "--max-update", 1, *options)
    assert f"linear layers of the LLM are held in {kind}" in log
    checkpoint = save / "checkpoint_last.pt"
    assert load(checkpoint)["cfg"]["model"]["llm_quantization"] == kind
    assert "num_updates 2 " in train(data, save, llm, whisper, "--max-update", 2, *options[:1])
    log = fairseq(
        "generate", data, "--gen-subset", "test", "--path", checkpoint, "--max-len-b", 4,
        "--model-overrides", f"{{'llm_quantization': '{kind}'}}",
    )  # fmt: skip
    assert f"held in {kind}" in log and "Translated 2 sentences" in log
    model = BlspKd.from_pretrained(checkpoint, llm_quantization=kind)
    assert any(isinstance(m, QuantizedLinear) for m in model.model.modules())
    assert isinstance(model.generate(data / "audio" / "test-0.flac", max_new_tokens=4), str)
    model.save_pretrained(tmp_path / "saved")
    assert BlspKd.from_pretrained(tmp_path / "saved").config.llm_quantization == kind


def test_the_card_says_in_what_the_llm_was_held() -> None:
    options = {"llm": "a/b", "speech_encoder": "c/d"}
    card = Card("m", "mit")
    assert "were held in nf4 in training" in write_card(card, {**options, "llm_quantization": "nf4"})
    assert "held in" not in write_card(card, options)


# ---- models that are quantised already ------------------------------------------------------------------------------


@needs_package
@pytest.mark.parametrize("bits", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
                                  {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}])  # fmt: skip
def test_a_folder_that_bitsandbytes_has_quantised_is_restored(root: Path, tmp_path: Path, bits: dict[str, Any]) -> None:
    folder = tmp_path / "llm"
    tiny.save_llm(folder, hidden=64)
    quantized = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**bits), dtype=torch.float32, device_map="cpu"
    )
    quantized.save_pretrained(folder)
    options = {"llm_dtype": "float32", "lora_scope": "none"}
    config = config_of(root, **options)
    config.llm = str(folder)
    model = build_speech_llm(config)[0]
    layers = [module for _, module in linear_layers(model.llm)]
    assert {type(one) for one in layers} == {nn.Linear} and all(one.weight.dtype == torch.float32 for one in layers)
    assert not getattr(model.llm.config, "quantization_config", None)
    ids = torch.arange(10).unsqueeze(0)
    torch.testing.assert_close(model.llm(ids).logits, quantized.eval()(ids).logits, atol=0.5, rtol=0.1)
    # Of other weights than the LLM that it was made from.
    original = build_speech_llm(config_of(root, **options))[0]
    assert not same_fingerprint(model.fingerprints["llm"], original.fingerprints["llm"])


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "hqq", "what-comes-next"])
def test_other_ways_of_quantising_are_refused(root: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^--llm \S+ is quantised already \({method}\).*--llm-quantization"
    ) as caught:
        build_speech_llm(quantized_by(method, root, tmp_path))
    assert "\n" not in str(caught.value)


def quantized_by(method: str, root: Path, tmp_path: Path) -> SpeechLlmConfig:
    """Options that name a folder that claims to be quantised."""
    folder = tiny.save_llm(tmp_path / "claims")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_4bit": method == "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    options = config_of(root)
    options.llm = str(folder)
    return options


# ---- what is missing ------------------------------------------------------------------------------------------------


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


@pytest.mark.usefixtures("without_package")
@pytest.mark.parametrize("kind", KINDS)
def test_without_the_package_the_option_is_refused(root: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"^--llm-quantization {kind} needs bitsandbytes.*pip install") as caught:
        build_speech_llm(config_of(root, llm_quantization=kind))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("without_package")
def test_without_the_package_a_quantised_folder_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--llm \S+ needs bitsandbytes.*pip install"):
        build_speech_llm(quantized_by("bitsandbytes", root, tmp_path))


def test_an_unknown_kind_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"^unknown --llm-quantization 'int4': choose from none, int8, nf4$"):
        build_speech_llm(config_of(root, llm_quantization="int4"))


class NoKernel:
    """A release of bitsandbytes without code for a device."""

    @staticmethod
    def QuantState(*_: Any, **__: Any) -> None:  # noqa: N802  # its name there
        pass

    @staticmethod
    def dequantize_4bit(*_: Any) -> Tensor:
        raise RuntimeError("no kernel image\nfor this and that")


@needs_package
def test_a_device_that_cannot_is_named_when_the_model_moves_there() -> None:
    layer = Nf4Linear(torch.randn(4, 64), None)
    layer.functional = NoKernel
    with pytest.raises(ValueError, match=r"^bitsandbytes has no nf4 for this meta \(no kernel image\): [^\n]*$"):
        nn.Sequential(layer).to("meta")


@needs_package
def test_it_says_nothing_in_commands_that_do_not_use_it() -> None:
    program = "import blspkd_fairseq, logging; logging.basicConfig(level=logging.DEBUG); import bitsandbytes"
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True)
    assert done.returncode == 0 and "bitsandbytes" not in done.stderr, done.stderr


def test_what_the_package_would_fetch_from_a_hub_is_not_there_while_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bitsandbytes.py").write_text("import sys\nsaw = sys.modules.get('kernels', 'whatever is installed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    others = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "bitsandbytes"}
    for name in others:
        monkeypatch.delitem(sys.modules, name)
    for before in ({}, {"kernels": sys}):
        monkeypatch.delitem(sys.modules, "kernels", raising=False)
        sys.modules.update(before)
        try:
            assert compat.import_bitsandbytes("a test").saw is None
        finally:
            sys.modules.pop("bitsandbytes")
        assert {name: m for name, m in sys.modules.items() if name == "kernels"} == before
