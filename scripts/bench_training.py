"""Utterances per second of whole updates on real models, with each lever of the training step switched off in turn.

    python scripts/bench_training.py --llm DIR --speech-encoder DIR --out scripts/bench_training.csv

"published" is the step as BLSP-KD's public code takes it: encoder input padded to 30 s, segments padded one by one
(padding in the middle of the sequence, so an attention mask), no shared prefix, LoRA's delta computed everywhere and
masked, logits at all positions of student and teacher, plain KL, transformers' own attention. "encoder features cached"
is a later epoch with --cache-encoder-features. All variants compute the same losses on the same batches from the same
weights; the largest difference is kept in the table.
Variants take turns, so that a slow minute of the machine hits all alike; medians are reported.
"""

import argparse
import csv
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_modules import cpu_name
from blspkd_fairseq.modules.sequence import Segment, predicts
from torch import Tensor
from tqdm import tqdm

from blspkd_fairseq import compat
from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.data.dataset import pad_ids, pad_waveforms
from blspkd_fairseq.data.prompts import resolve_prompt
from blspkd_fairseq.modules.build import SpeechLlmConfig, build_speech_llm
from blspkd_fairseq.modules.cformer import AdapterOutput
from blspkd_fairseq.modules.cif import quantity_loss
from blspkd_fairseq.modules.distillation_loss import linear_kl_div
from blspkd_fairseq.modules.partial_lora import PartialLoraLinear, speech_positions
from blspkd_fairseq.modules.speech_llm import SpeechLLM

TRANSCRIPT_TOKENS, RESPONSE_TOKENS, SECONDS = 10, 13, 2.5  # of the quickstart's utterances, on average


@dataclass(frozen=True)
class Levers:
    """What makes the step fast; each can be switched off."""

    cut_encoder_input: bool = True
    share_prefix: bool = True
    head_on_kept_positions: bool = True
    chunked_kl: bool = True
    pad_once: bool = True
    lora_at_speech_only: bool = True
    cpu_attention: bool = True
    cached_features: bool = False


VARIANTS = {
    "all levers": Levers(),
    "encoder features cached": Levers(cached_features=True),
    "encoder input padded to 30 s": Levers(cut_encoder_input=False),
    "no shared prefix": Levers(share_prefix=False),
    "plain KL on kept positions": Levers(chunked_kl=False),
    "logits at all positions": Levers(head_on_kept_positions=False, chunked_kl=False),
    "interior padding": Levers(share_prefix=False, pad_once=False),
    "LoRA's delta at all positions": Levers(lora_at_speech_only=False),
    "attention in bfloat16 on the CPU": Levers(cpu_attention=False),
    "published": Levers(False, False, False, False, False, False, False),
}


def main() -> None:
    args = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = SpeechLlmConfig(
        speech_encoder=args.speech_encoder,
        llm=args.llm,
        llm_dtype=args.llm_dtype,
        adapter_pre_layers=2,
        adapter_post_layers=2,
        adapter_heads=6,
        adapter_dropout=0.0,
        lora_scope=args.lora_scope,
        lora_dropout=0.0,
    )
    model, chat = build_speech_llm(config)
    model.to(device).train()
    batches = [make_batch(chat, args.batch_size, seed, device) for seed in range(args.batches)]
    heard = [batch | {"features": frames_of(model, batch)} for batch in batches]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    losses: dict[str, list[float]] = {name: [] for name in VARIANTS}
    rounds = [(r, name) for r in range(args.rounds + 1) for name in VARIANTS]
    for round_, name in tqdm(rounds, desc="updates"):
        with torch.no_grad():  # every variant starts from the same weights, so that losses can be compared
            for parameter_name, parameter in model.named_parameters():
                if parameter_name in start:
                    parameter.copy_(start[parameter_name])
        optimizer.state.clear()
        for batch, cached in zip(batches, heard, strict=True):
            synchronize(device)
            begin = time.perf_counter()
            loss = update(model, optimizer, cached if VARIANTS[name].cached_features else batch, VARIANTS[name])
            synchronize(device)
            if round_:  # round 0 warms up
                seconds[name].append(time.perf_counter() - begin)
                losses[name].append(float(loss))
    write(args.out, seconds, losses, args, device)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--speech-encoder", required=True)
    parser.add_argument("--llm-dtype", default="bfloat16")
    parser.add_argument("--lora-scope", default="speech")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="CSV; rows of other devices are kept")
    return parser.parse_args()


def make_batch(chat: ChatFormat, size: int, seed: int, device: str) -> dict[str, Any]:
    """Random words and noise with the lengths of real utterances (tokens and seconds vary by a third)."""
    generator = torch.Generator().manual_seed(seed)

    def around(mean: float) -> list[float]:
        return (mean * (2 / 3 + torch.rand(size, generator=generator) * 2 / 3)).tolist()

    def words(mean: int) -> list[list[int]]:
        lengths = [max(1, round(n)) for n in around(mean)]
        return [torch.randint(1000, 20_000, (n,), generator=generator).tolist() for n in lengths]

    before, after = chat.prompt_ids(resolve_prompt("continue"))
    rows = {"before": [[]] * size, "transcript": words(TRANSCRIPT_TOKENS), "after": [after] * size}
    rows["response"] = words(RESPONSE_TOKENS)
    text = {"prefix": torch.tensor(before, device=device)}
    for name, ids in rows.items():
        text[name] = pad_ids(ids).to(device)
        text[f"{name}_lengths"] = torch.tensor([len(row) for row in ids], device=device)
    waveforms = [torch.randn(int(16_000 * s), generator=generator) * 0.1 for s in around(SECONDS)]
    lengths = torch.tensor([len(w) for w in waveforms], device=device)
    return {"src_tokens": pad_waveforms(waveforms).to(device), "src_lengths": lengths, "text": text}


def frames_of(model: SpeechLLM, batch: dict[str, Any]) -> Tensor:
    """The encoder's frames as --cache-encoder-features keeps them."""
    lengths = batch["src_lengths"]
    return model.encode(batch["src_tokens"], lengths, lengths.tolist()).values.to(torch.bfloat16)


def update(model: SpeechLLM, optimizer: torch.optim.Optimizer, batch: dict[str, Any], levers: Levers) -> Tensor:
    """Forward, backward, clipping and step; returns input KL + response KL + quantity loss."""
    model.speech_encoder.pad_to_30s = not levers.cut_encoder_input
    model.share_prefix = levers.share_prefix
    model.llm.set_attn_implementation(compat.CPU_ATTENTION if levers.cpu_attention else "sdpa")
    PartialLoraLinear.forward = SPARSE_LORA if levers.lora_at_speech_only else masked_lora  # type: ignore[method-assign]
    is_ours = levers.head_on_kept_positions and levers.chunked_kl and levers.pad_once
    loss = project_loss(model, batch) if is_ours else slower_loss(model, batch, levers)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return loss.detach()


SPARSE_LORA = PartialLoraLinear.forward


def masked_lora(layer: PartialLoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The delta of every position times the mask."""
    mask = layer.mask_state.mask
    result = layer.base_layer(x, *args, **kwargs)
    if isinstance(mask, Tensor):
        down, up = layer.lora_A["default"], layer.lora_B["default"]
        delta = up(down(layer.lora_dropout["default"](x.to(down.weight.dtype)))) * layer.scaling["default"]
        result = result + (delta * mask.unsqueeze(-1)).to(result.dtype)
    return result


def project_loss(model: SpeechLLM, batch: dict[str, Any]) -> Tensor:
    """The training step as the criterion runs it."""
    output = model(**batch)
    weight, bias = model.head
    assert output.input is not None and output.response is not None
    return mean_quantity_loss(output.adapter, batch) + sum(
        linear_kl_div(compared.student, compared.teacher, weight, bias).mean()
        for compared in (output.input, output.response)
    )


def slower_loss(model: SpeechLLM, batch: dict[str, Any], levers: Levers) -> Tensor:
    """The same loss with levers off."""
    text = batch["text"]
    adapter = model.adapt(batch["src_tokens"], batch["src_lengths"], text["transcript_lengths"])
    speech = Segment(adapter.embeddings.to(model.llm.dtype), adapter.lengths)
    transcript = Segment(model.embed(text["transcript"]), text["transcript_lengths"])
    run = padded_once if levers.pad_once else padded_piecewise
    segment, student = run(model, text, speech, True)
    with torch.no_grad():
        _, teacher = run(model, text, transcript, False)
    masks = [segment == 1, predicts(segment, 3) if levers.pad_once else predicts_over_gaps(segment)]
    weight, bias = model.head
    total = mean_quantity_loss(adapter, batch)
    if not levers.head_on_kept_positions:
        student_logits, teacher_logits = F.linear(student, weight, bias), F.linear(teacher, weight, bias)
        return total + sum(plain_kl(student_logits[mask], teacher_logits[mask]) for mask in masks)
    for mask in masks:
        if levers.chunked_kl:
            total = total + linear_kl_div(student[mask], teacher[mask], weight, bias).mean()
        else:
            total = total + plain_kl(F.linear(student[mask], weight, bias), F.linear(teacher[mask], weight, bias))
    return total


def padded_once(model: SpeechLLM, text: dict[str, Tensor], speech: Segment, is_speech: bool) -> tuple[Tensor, Tensor]:
    sequence, hidden = model._hidden(text, speech, ("input", "response"), is_speech)
    return sequence.segment, hidden


def padded_piecewise(
    model: SpeechLLM, text: dict[str, Tensor], speech: Segment, is_speech: bool
) -> tuple[Tensor, Tensor]:
    """Every segment padded to its longest row, padding in between masked out."""
    rows = len(speech.lengths)
    prefix = Segment(model.embed(text["prefix"]).expand(rows, -1, -1), torch.full((rows,), len(text["prefix"])))
    after, response = (Segment(model.embed(text[n]), text[f"{n}_lengths"]) for n in ("after", "response"))
    segments = [prefix, speech, after, response]
    embeds = torch.cat([s.embeds for s in segments], 1)
    index = torch.cat(
        [
            torch.where(
                torch.arange(s.embeds.shape[1], device=embeds.device) < s.lengths.to(embeds.device).unsqueeze(1), i, -1
            )
            for i, s in enumerate(segments)
        ],
        1,
    )
    mask = (index >= 0).long()
    lora = (index == 1) if is_speech and model.lora_scope == "speech" else None
    with speech_positions(model.llm, lora):
        hidden = model.llm.get_decoder()(
            inputs_embeds=embeds, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False
        ).last_hidden_state
    return index, hidden


def predicts_over_gaps(segment: Tensor) -> Tensor:
    """Positions whose next real token is a response token, where padding may lie between."""
    chosen = torch.zeros_like(segment, dtype=torch.bool)
    for row, ids in enumerate(segment.tolist()):
        real = [place for place, index in enumerate(ids) if index >= 0]
        for place, following in zip(real, real[1:], strict=False):
            chosen[row, place] = ids[following] == 3
    return chosen


def plain_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    log_q, log_p = student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()


def mean_quantity_loss(adapter: AdapterOutput, batch: dict[str, Any]) -> Tensor:
    assert adapter.alpha_sum is not None
    return quantity_loss(adapter.alpha_sum, batch["text"]["transcript_lengths"]).mean()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def write(
    path: Path | None, seconds: dict[str, list[float]], losses: dict[str, list[float]], args: Any, device: str
) -> None:
    """Prints the table and replaces the rows of this device and precision in the CSV."""
    ours = statistics.median(seconds["all levers"])
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()} ({torch.get_num_threads()} threads)"
    rows = []
    for variant, times in seconds.items():
        median = statistics.median(times)
        difference = max(abs(a - b) for a, b in zip(losses[variant], losses["all levers"], strict=True))
        rows.append(
            {
                "variant": variant,
                "device": name,
                "dtype": args.llm_dtype,
                "batch": args.batch_size,
                "utterances_per_second": f"{args.batch_size / median:.2f}",
                "seconds_per_update": f"{median:.4f}",
                "times_as_slow": f"{median / ours:.2f}",
                "loss": f"{statistics.mean(losses[variant]):.4f}",
                "largest_loss_difference": f"{difference:.1e}",
                "torch": torch.__version__,
            }
        )
    for row in rows:
        print(f"{row['variant']:32} {row['utterances_per_second']:>8}/s {row['times_as_slow']:>6}x  loss {row['loss']}")
    if path:
        kept = []
        if path.exists():
            with open(path, encoding="utf-8", newline="") as file:
                kept = [r for r in csv.DictReader(file) if (r["device"], r["dtype"]) != (name, args.llm_dtype)]
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept + rows)


if __name__ == "__main__":
    main()
