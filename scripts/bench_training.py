"""Utterances per second of whole updates, with each lever of the training step switched off in turn.

    python scripts/bench_training.py --llm DIR --speech-encoder DIR --out scripts/bench_training.csv
    python scripts/bench_training.py --preset 0.5b --batch-size 64 --device cuda

A preset has random weights of real shapes, made on the device, and random words; without one, real models are read.
"published" is the step as BLSP-KD's public code takes it: encoder input padded to 30 s, segments padded one by one
(padding in the middle of the sequence, so an attention mask), no shared prefix, LoRA's delta computed everywhere and
masked, logits at all positions of student and teacher, plain KL, float32 products outside the LLM. "features stored" is
a later epoch with --cache-encoder-features. All variants compute the same losses on the same batches from the same
weights; the largest difference is kept in the table.
Variants take turns, so that a slow minute of the machine hits all alike; medians are reported.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench_modules import cpu_name
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import blspkd_fairseq  # noqa: F401
from blspkd_fairseq.data.batch import Batch, PlanRow, Rows, pad_waveforms, plan_batch
from blspkd_fairseq.data.conversation import Speech
from blspkd_fairseq.modules.build import SpeechLlmConfig, build_speech_llm
from blspkd_fairseq.modules.cformer import CFormer
from blspkd_fairseq.modules.cif import quantity_loss
from blspkd_fairseq.modules.distillation_loss import chunk_size_for, linear_kl_div
from blspkd_fairseq.modules.packed_llm import padded_places
from blspkd_fairseq.modules.partial_lora import PartialLoraLinear, SpeechPlaces, add_partial_lora, speech_positions
from blspkd_fairseq.modules.speech_llm import SpeechLLM
from blspkd_fairseq.modules.whisper_encoder import SpeechEncoder


class Preset(NamedTuple):
    """Shapes of Whisper's encoder (width, layers, heads, mel bins), of the LLM, and the adapter's layers and heads."""

    encoder: tuple[int, int, int, int]
    llm: dict[str, Any]
    adapter: tuple[int, int]


def _llm(
    kind: str, hidden: int, layers: int, heads: int, groups: int, ffn: int, words: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": groups, "intermediate_size": ffn, "vocab_size": words, "tie_word_embeddings": tied,
    }  # fmt: skip


PRESETS = {
    # Whisper large-v3 and Qwen2.5-7B, small and Qwen2.5-0.5B, tiny and SmolLM2-135M
    "7b": Preset((1280, 32, 20, 128), _llm("qwen2", 3584, 28, 28, 4, 18944, 152064, False), (4, 8)),
    "0.5b": Preset((768, 12, 12, 80), _llm("qwen2", 896, 24, 14, 2, 4864, 151936, True), (4, 8)),
    "135m": Preset((384, 4, 6, 80), _llm("llama", 576, 30, 9, 3, 1536, 49152, True), (2, 6)),
}


class Lengths(NamedTuple):
    """Of utterances, on average; each varies by a third. ``prefix`` is what all prompts begin with."""

    seconds: float
    transcript: int
    response: int
    prefix: int
    after: int


QUICKSTART, TYPICAL = Lengths(2.5, 10, 13, 32, 6), Lengths(6.0, 20, 40, 30, 6)


@dataclass(frozen=True)
class Levers:
    """What makes the step fast; each can be switched off."""

    cut_encoder_input: bool = True
    share_prefix: bool = True
    head_on_kept_positions: bool = True
    chunked_kl: bool = True
    packed_rows: bool = True
    interior_padding: bool = False
    lora_at_speech_only: bool = True
    own_products: bool = True
    stored_features: bool = False
    known_layers: bool = True


VARIANTS = {
    "default options": Levers(),
    "features stored": Levers(stored_features=True),
    "encoder input padded to 30 s": Levers(cut_encoder_input=False),
    "padded rows": Levers(packed_rows=False),
    "no shared prefix": Levers(share_prefix=False),
    "decoder layers as in transformers": Levers(known_layers=False),
    "plain KL on kept positions": Levers(chunked_kl=False),
    "logits at all positions": Levers(head_on_kept_positions=False, chunked_kl=False),
    "LoRA's delta at all positions": Levers(lora_at_speech_only=False),
    "float32 products": Levers(own_products=False),
    "published": Levers(False, False, False, False, False, True, False, False),
}


class Step(NamedTuple):
    """A batch, planned with the prefix shared and not."""

    waveforms: Tensor
    lengths: Tensor
    samples: list[int]
    shared: Batch
    repeated: Batch


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    torch.manual_seed(0)
    lengths = TYPICAL if args.preset else QUICKSTART
    if args.quick:
        lengths = Lengths(1.5, 5, 6, 8, 2)
    model = (
        (from_preset(PRESETS[args.preset], device, args.quick) if args.preset else from_files(args)).to(device).train()
    )
    steps = [make_step(model, args.batch_size, seed, lengths) for seed in range(args.batches)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
    start = [p.detach().clone() for p in trained]
    names = args.variants.split(",") if args.variants else list(VARIANTS)

    results: dict[str, Result] = {name: Result() for name in names}
    rounds = [(r, name) for r in range(args.rounds + 1) for name in names]
    for round_, name in tqdm(rounds, desc="updates"):
        with torch.no_grad():  # every variant starts from the same weights, so that losses can be compared
            torch._foreach_copy_(trained, start)
        optimizer.state.clear()
        with levers_set(model, VARIANTS[name]) as run:
            for step in steps:
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                synchronize(device)
                begin = time.perf_counter()
                loss = update(run, optimizer, step)
                synchronize(device)
                if round_:  # round 0 warms up
                    results[name].seconds.append(time.perf_counter() - begin)
                    results[name].losses.append(float(loss))
                    if device.type == "cuda":
                        results[name].mib = max(results[name].mib, torch.cuda.max_memory_allocated() / 2**20)
            if round_ == 0:
                results[name].flops, results[name].launches = counted(run, optimizer, steps[0], device)
    write(args, results, lengths, matrix_rate(device))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), help="random weights of these shapes, in place of files")
    parser.add_argument("--llm")
    parser.add_argument("--speech-encoder")
    parser.add_argument("--llm-dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", help=f"comma-separated, of: {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="few layers, narrow, short: tries that it runs")
    parser.add_argument("--out", type=Path, help="CSV; rows of other devices, presets and batches are kept")
    args = parser.parse_args()
    if not args.preset and not (args.llm and args.speech_encoder):
        parser.error("give --preset, or --llm and --speech-encoder")
    unknown = set((args.variants or "published").split(",")) - set(VARIANTS)
    if unknown:
        parser.error(f"unknown variants {', '.join(sorted(unknown))}: choose from {', '.join(VARIANTS)}")
    return args


# ---- models and batches --------------------------------------------------------------------------------------------


def from_files(args: argparse.Namespace) -> SpeechLLM:
    config = SpeechLlmConfig(
        speech_encoder=args.speech_encoder,
        llm=args.llm,
        llm_dtype=args.llm_dtype,
        adapter_pre_layers=2,
        adapter_post_layers=2,
        adapter_heads=6,
        adapter_dropout=0.0,
        lora_dropout=0.0,
    )
    return build_speech_llm(config)[0]


def from_preset(preset: Preset, device: torch.device, quick: bool) -> SpeechLLM:
    """Random weights, made on the device."""
    width, layers, heads, bins = preset.encoder
    options = dict(preset.llm)
    if quick:
        width, layers, heads = 48, 2, 2
        options |= {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                    "intermediate_size": 96, "vocab_size": 2000}  # fmt: skip
    with torch.device(device):
        sizes = {"encoder_layers": layers, "encoder_attention_heads": heads, "encoder_ffn_dim": 4 * width}
        encoder = WhisperEncoder(WhisperConfig(d_model=width, num_mel_bins=bins, attn_implementation="sdpa", **sizes))
        config = AutoConfig.for_model(**options, max_position_embeddings=4096)
        llm: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        add_partial_lora(llm, rank=16, dropout=0.0)
        depth, adapter_heads = (1, 2) if quick else preset.adapter
        adapter = CFormer(width, config.hidden_size, 0.02, depth, depth, adapter_heads, dropout=0.0)
    return SpeechLLM(SpeechEncoder(encoder), adapter, llm, "speech")


def make_step(model: SpeechLLM, size: int, seed: int, lengths: Lengths) -> Step:
    """Random words and noise with the lengths of real utterances."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.llm.get_input_embeddings().num_embeddings

    def around(mean: float) -> list[float]:
        return (mean * (2 / 3 + torch.rand(size, generator=generator) * 2 / 3)).tolist()

    def words(count: int) -> list[int]:
        return torch.randint(vocabulary // 50, vocabulary // 3, (count,), generator=generator).tolist()

    prefix, after = words(lengths.prefix), words(lengths.after)
    samples = [int(16_000 * seconds) for seconds in around(lengths.seconds)]
    counts = zip(around(lengths.transcript), around(lengths.response), strict=True)
    rows = [
        PlanRow([prefix, Speech(0), after], [words(max(1, round(t)))], [samples[i]], words(max(1, round(r))), [i])
        for i, (t, r) in enumerate(counts)
    ]
    device = model.device
    waveforms = pad_waveforms([torch.randn(n, generator=generator) * 0.1 for n in samples])
    plans = [plan_batch(rows, model.speech_lengths, share_prefix=shared).to(device) for shared in (True, False)]
    return Step(waveforms.to(device), torch.tensor(samples, device=device), samples, *plans)


# ---- the step, with levers -----------------------------------------------------------------------------------------


class levers_set:  # noqa: N801  # used as a function
    """Sets a model's levers for a block, which gets a function from a step to its loss."""

    def __init__(self, model: SpeechLLM, levers: Levers) -> None:
        self.model, self.levers = model, levers
        self.before: tuple[Any, ...] = ()

    def __enter__(self) -> Any:
        model, levers = self.model, self.levers
        self.before = (model.reads_packed, model.product_dtype, model.speech_encoder, PartialLoraLinear.forward)
        self.known_decoder = model.known_decoder
        model.speech_encoder.pad_to_30s = not levers.cut_encoder_input
        model.reads_packed = levers.packed_rows
        if not levers.own_products:
            model.product_dtype = torch.float32
            model.settle_precision()
        if levers.stored_features:
            model.speech_encoder = Stored(model.speech_encoder)
        if not (levers.known_layers and levers.lora_at_speech_only):
            model.known_decoder = None
        if not levers.lora_at_speech_only:
            PartialLoraLinear.forward = masked_lora  # type: ignore[method-assign]
        is_ours = levers.head_on_kept_positions and levers.chunked_kl and not levers.interior_padding
        return lambda step: project_loss(model, step, levers) if is_ours else slower_loss(model, step, levers)

    def __exit__(self, *_: Any) -> None:
        model = self.model
        model.reads_packed, model.product_dtype, model.speech_encoder, PartialLoraLinear.forward = self.before
        model.known_decoder = self.known_decoder
        model.speech_encoder.pad_to_30s = False
        model.settle_precision()


class Stored(nn.Module):
    """Frames that were computed before, as a later epoch finds them."""

    def __init__(self, encoder: SpeechEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.frames: dict[int, Any] = encoder.__dict__.setdefault("_stored", {})

    def forward(self, waveforms: Tensor, lengths: Tensor, samples: Sequence[int], ragged: bool = True) -> Any:
        key = waveforms.data_ptr()
        if key not in self.frames:
            self.frames[key] = self.encoder(waveforms, lengths, samples, ragged)
        return self.frames[key]


def update(run: Any, optimizer: torch.optim.Optimizer, step: Step) -> Tensor:
    """Forward, backward, clipping and step; returns input KL + response KL + quantity loss."""
    loss: Tensor = run(step)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return loss.detach()


def project_loss(model: SpeechLLM, step: Step, levers: Levers) -> Tensor:
    """The training step as the criterion runs it."""
    batch = step.shared if levers.share_prefix else step.repeated
    output = model(step.waveforms, step.lengths, batch, samples=step.samples)
    weight, bias = model.head
    assert output.input is not None and output.response is not None and output.adapter.alpha_sum is not None
    return quantity_loss(output.adapter.alpha_sum, batch.piece_tokens).mean() + sum(
        linear_kl_div(one.student, one.teacher, weight, bias, chunk_size=chunk_size_for(weight.device)).mean()
        for one in (output.input, output.response)
    )


def slower_loss(model: SpeechLLM, step: Step, levers: Levers) -> Tensor:
    """The same loss with levers off."""
    batch = step.shared if levers.share_prefix else step.repeated
    adapter = model.adapt(step.waveforms, step.lengths, batch.pieces, samples=step.samples)
    layout = batch.student
    speech = adapter.embeddings.flatten(0, 1).index_select(0, layout.source).to(model.llm.dtype)
    heard = torch.cat([speech, model.embed(layout.ids[layout.speech :])])
    read = model.embed(layout.ids)
    if levers.interior_padding:
        student = padded_piecewise(model, heard, layout.rows, layout.speech, True)
        with torch.no_grad():
            teacher = padded_piecewise(model, read, layout.rows, layout.speech, False)
    else:
        student = model.hidden(heard, layout, model.speech_places(layout))
        teacher = model.teach(layout)
    weight, bias = model.head
    assert adapter.alpha_sum is not None
    total = quantity_loss(adapter.alpha_sum, batch.piece_tokens).mean()
    places = (torch.arange(layout.speech, device=weight.device), layout.response)
    if not levers.head_on_kept_positions:
        logits = F.linear(student, weight, bias), F.linear(teacher, weight, bias)
        return total + sum(plain_kl(logits[0][place], logits[1][place]) for place in places)
    for place in places:
        total = total + plain_kl(F.linear(student[place], weight, bias), F.linear(teacher[place], weight, bias))
    return total


def padded_piecewise(model: SpeechLLM, embeds: Tensor, rows: Rows, speech: int, is_speech: bool) -> Tensor:
    """Rows padded behind their speech and at their end, with a mask of all positions, as published."""
    device = embeds.device
    index, place = padded_places(rows)
    width, gap = index.shape[1], 4  # what padding of speech to the longest adds
    columns = torch.arange(width, device=device)
    mask = columns < (rows.prefix + rows.lengths).unsqueeze(1)
    padded = embeds[index] * mask.unsqueeze(2)
    padded = torch.cat([padded.new_zeros(len(padded), gap, padded.shape[2]), padded], 1)
    mask = F.pad(mask, (gap, 0))
    lora = None
    if is_speech and model.lora_scope == "speech":
        flat = (place // width) * (width + gap) + place % width + gap
        lora = SpeechPlaces(flat[:speech], tuple(mask.shape))
    with speech_positions(model.llm, lora):
        hidden = model.llm.get_decoder()(
            inputs_embeds=padded,
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
    return hidden[:, gap:].flatten(0, 1)[place]


def masked_lora(layer: PartialLoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The delta of every position times the mask."""
    mask = layer.mask_state.mask
    result = layer.base_layer(x, *args, **kwargs)
    if isinstance(mask, SpeechPlaces):
        kept = torch.zeros(torch.Size(mask.shape).numel(), device=x.device)
        if isinstance(mask.places, Tensor):
            kept[mask.places] = 1
        else:
            kept[: mask.places] = 1
        down, up = layer.lora_A["default"], layer.lora_B["default"]
        delta = up(down(layer.lora_dropout["default"](x.to(down.weight.dtype)))) * layer.scaling["default"]
        result = result + (delta * kept.view(*mask.shape, 1)).to(result.dtype)
    return result


def plain_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    log_q, log_p = student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()


# ---- measuring and writing -----------------------------------------------------------------------------------------


class Result:
    """What was measured of one variant."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.mib = self.flops = 0.0
        self.launches = 0


def counted(run: Any, optimizer: torch.optim.Optimizer, step: Step, device: torch.device) -> tuple[float, int]:
    """Floating-point operations of matrix products in an update, and kernel launches (on a CPU: operators)."""
    # Attention is left out: it is a small part at these lengths, and its formula does not know grouped heads.
    attention = [
        op
        for op in (getattr(torch.ops.aten, name, None) for name in dir(torch.ops.aten) if "attention" in name)
        if op is not None
    ]
    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(attention, lambda *_, **__: 0)) as counter:
        update(run, optimizer, step)
    is_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]) as profiler:
        update(run, optimizer, step)
        synchronize(device)
    events = profiler.key_averages()
    names = (
        ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx") if is_cuda else ("aten::",)
    )
    return float(counter.get_total_flops()), sum(e.count for e in events if e.key.startswith(names))


def matrix_rate(device: torch.device) -> float:
    """TFLOP/s of a bfloat16 product of 8192 x 8192 matrices; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    one, other = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        one @ other
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(10):
        one @ other
    synchronize(device)
    return 10 * 2 * 8192**3 / (time.perf_counter() - begin) / 1e12


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def write(args: argparse.Namespace, results: dict[str, Result], lengths: Lengths, rate: float) -> None:
    """Prints the table and replaces the rows of this device, preset, batch and precision in the CSV."""
    is_cuda = torch.device(args.device).type == "cuda"
    name = torch.cuda.get_device_name() if is_cuda else f"{cpu_name()} ({torch.get_num_threads()} threads)"
    first = next(iter(results.values()))
    ours, losses = statistics.median(first.seconds), first.losses
    rows = []
    for variant, result in results.items():
        median = statistics.median(result.seconds)
        per_second = args.batch_size / median
        rows.append(
            {
                "models": args.preset or "quickstart",
                "variant": variant,
                "device": name,
                "dtype": args.llm_dtype,
                "batch": str(args.batch_size),
                "utterances_per_second": f"{per_second:.2f}",
                "seconds_per_update": f"{median:.4f}",
                "times_as_slow": f"{median / ours:.2f}",
                "audio_hours_per_hour": f"{per_second * lengths.seconds:.1f}",
                "share_of_matrix_rate": f"{result.flops / median / 1e12 / rate:.3f}" if rate else "",
                "peak_mib": f"{result.mib:.0f}" if is_cuda else "",
                "launches": str(result.launches),
                "loss": f"{statistics.mean(result.losses):.4f}",
                "largest_loss_difference": f"{max(abs(a - b) for a, b in zip(result.losses, losses, strict=True)):.1e}",
                "torch": torch.__version__,
            }
        )
    for row in rows:
        print(
            f"{row['models']:10} {row['variant']:32} {row['utterances_per_second']:>9}/s {row['times_as_slow']:>6}x "
            f"{row['peak_mib']:>6} MiB {row['launches']:>6} launches  loss {row['loss']}"
        )
    if args.out:
        merge(args.out, rows)


def merge(path: Path, rows: list[dict[str, str]]) -> None:
    """Rows in place of those of the same models, variant, device, precision and batch."""

    def key(row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row.get(name, "") for name in ("models", "variant", "device", "dtype", "batch"))

    kept: list[dict[str, str]] = []
    if path.exists():
        with open(path, encoding="utf-8", newline="") as file:
            new = {key(row) for row in rows}
            kept = [row for row in csv.DictReader(file) if key(row) not in new]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept + rows)


if __name__ == "__main__":
    main()
