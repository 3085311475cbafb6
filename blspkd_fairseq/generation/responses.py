"""The LLM writes its own responses to transcripts: the targets of distillation.

Which rows go into a batch together follows from the input alone and not from what is done already: in bfloat16 an
answer may depend on the batch it was made in, and a run that was killed and started again must give the same bytes as
one that was not.
"""

from __future__ import annotations

import hashlib
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from blspkd_fairseq.data.chat import ChatFormat
from blspkd_fairseq.data.prompts import PROMPTS
from blspkd_fairseq.generation.decoding import llm_context
from blspkd_fairseq.generation.identity import llm_identity, model_identity
from blspkd_fairseq.modules.build import SpeechLlmConfig, load_chat_format, load_llm

if TYPE_CHECKING:  # at run time, this package comes before transformers and keeps a broken torchaudio from it
    from transformers import PreTrainedModel

__all__ = [
    "BACKENDS", "HuggingFaceBackend", "Request", "Response", "ResponseSettings", "VllmBackend", "answer_locally",
    "answer_with_ray", "is_refusal", "model_identity", "plan_batches", "response", "shard_of", "token_ids",
]  # fmt: skip

logger = logging.getLogger(__name__)

WINDOW_BATCHES = 64
"""Batches that are planned together: rows are sorted by length within so many, so that rows added at the end of the
input leave the batches before them as they were."""

# At the beginning of an answer; the last two anywhere. From what BLSP-Emo's authors filter.
_REFUSAL = re.compile(
    r"^\W*(i'?m sorry|i am sorry|i apologi[sz]e|sorry,|i can(no|')t (assist|help|fulfil)|i'?m unable to|i am unable to|"
    r"抱歉|很抱歉|对不起)|\bas an ai\b|\bas an? (large |ai )?language model\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ResponseSettings:
    """What an answer depends on besides the row; greedy by default (BLSP-Emo's prompt and length).

    Attributes:
        llm: Hugging Face name or local directory.
        llm_dtype: float32, bfloat16 or float16.
        prompt: text with a ``{speech}`` slot, for rows without a prompt of their own.
        system_prompt, chat_template: as in training.
        max_new_tokens: length limit, the end of turn included.
        sampling: draw from the distribution, shaped by ``temperature`` and ``top_p``; ``seed`` makes it repeatable.
        trust_remote_code: run code that comes with the LLM's files.
    """

    llm: str
    llm_dtype: str = "bfloat16"
    prompt: str = PROMPTS["continue"]
    system_prompt: str = ""
    chat_template: str = ""
    max_new_tokens: int = 48
    sampling: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 1
    trust_remote_code: bool = False

    def identity(self) -> dict[str, Any]:
        """What binds a store: the same settings, with what is in the files in place of where they are."""
        settings = asdict(self)
        del settings["trust_remote_code"]  # says who is trusted, not what is answered
        return {**settings, **llm_identity(self.config())}

    def config(self) -> SpeechLlmConfig:
        """The options that load the LLM."""
        return SpeechLlmConfig(
            llm=self.llm,
            llm_dtype=self.llm_dtype,
            system_prompt=self.system_prompt,
            chat_template=self.chat_template,
            trust_remote_code=self.trust_remote_code,
        )


class Request(NamedTuple):
    """A row to answer. Attributes: ``id``, ``text`` (the transcript), ``prompt`` (with its ``{speech}`` slot)."""

    id: str
    text: str
    prompt: str

    def digest(self) -> str:
        """Tells whether a row is still what was answered."""
        return hashlib.sha256(f"{self.prompt}\0{self.text}".encode()).hexdigest()[:12]


class Response(NamedTuple):
    """An answer.

    Attributes:
        id: the row's.
        tgt_text: the answer without control tokens.
        cut: "1" when the length limit ended it, else "0".
        source: digest of the request.
    """

    id: str
    tgt_text: str
    cut: str
    source: str


class Backend(Protocol):
    """What runs the LLM on one machine."""

    def answer(self, batch: Sequence[Request]) -> list[Response]:
        """Answers in the order of the requests."""
        ...


# ---- plan ----------------------------------------------------------------------------------------------------------


def plan_batches(requests: Iterable[Request], batch_size: int) -> Iterator[list[Request]]:
    """Batches of similar length, longest first within a window of the input."""
    window: list[Request] = []
    for request in requests:
        window.append(request)
        if len(window) == batch_size * WINDOW_BATCHES:
            yield from _batches(window, batch_size)
            window = []
    yield from _batches(window, batch_size)


def _batches(window: list[Request], size: int) -> Iterator[list[Request]]:
    # By letters and not by tokens, so that planning two million rows needs no tokenizer.
    ordered = sorted(window, key=lambda request: -len(request.prompt) - len(request.text))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def shard_of(row_id: str, shards: int) -> int:
    """Which of ``shards`` job-array members answers a row: by its id alone, whatever the order of the input."""
    return zlib.crc32(row_id.encode()) % shards


def is_refusal(answer: str) -> bool:
    """Whether the LLM declined or spoke of itself in place of continuing."""
    return _REFUSAL.search(answer.replace("’", "'")) is not None


# ---- backends ------------------------------------------------------------------------------------------------------


class HuggingFaceBackend:
    """transformers' ``generate`` on left-padded batches, on the GPU if there is one."""

    def __init__(self, settings: ResponseSettings) -> None:
        self.settings = settings
        self.chat = load_chat_format(settings.config())
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.llm: PreTrainedModel = load_llm(settings.config(), self.chat).to(device).eval()

    @torch.no_grad()
    def answer(self, batch: Sequence[Request]) -> list[Response]:
        """See :class:`Backend`."""
        prompts = [token_ids(self.chat, request) for request in batch]
        context = llm_context(self.llm)
        fits = [context is None or len(prompt) < context for prompt in prompts]
        if not all(fits):
            return self._without(batch, prompts, fits)
        settings = self.settings
        width = max(map(len, prompts))
        pad = self.chat.eos_ids[0]
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self.llm.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.llm.device)
        options: dict[str, Any] = {"do_sample": settings.sampling}
        if settings.sampling:
            options |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
            torch.manual_seed(settings.seed + zlib.crc32(batch[0].id.encode()))
        limit = settings.max_new_tokens
        out = self.llm.generate(input_ids=ids, attention_mask=mask, min_new_tokens=1, max_new_tokens=limit, **options)
        rows = out[:, width:].tolist()
        return [response(self.chat, request, row) for request, row in zip(batch, rows, strict=True)]

    def _without(
        self, batch: Sequence[Request], prompts: Sequence[Sequence[int]], fits: Sequence[bool]
    ) -> list[Response]:
        """As :meth:`answer`, with nothing for those that the LLM cannot read."""
        for request, prompt, does in zip(batch, prompts, fits, strict=True):
            if not does:
                logger.warning(f"no response to {request.id}: its {len(prompt)} tokens leave the LLM no room")
        rest = [request for request, does in zip(batch, fits, strict=True) if does]
        answers = iter(self.answer(rest) if rest else [])
        return [
            next(answers) if does else Response(request.id, "", "0", request.digest())
            for request, does in zip(batch, fits, strict=True)
        ]


class VllmBackend:
    """vLLM, where it is installed (a GPU is wanted; its greedy answers may differ in rounding from transformers')."""

    def __init__(self, settings: ResponseSettings) -> None:
        try:
            import vllm
        except ImportError as error:
            raise ValueError(
                f"--backend vllm needs vLLM (pip install vllm), which cannot be imported: {error}"
            ) from error
        self.settings = settings
        self.chat = load_chat_format(settings.config())
        self.llm = vllm.LLM(
            model=settings.llm,
            dtype=settings.llm_dtype,
            enable_prefix_caching=True,
            trust_remote_code=settings.trust_remote_code,
        )
        self.sampling = vllm.SamplingParams(
            temperature=settings.temperature if settings.sampling else 0.0,
            top_p=settings.top_p if settings.sampling else 1.0,
            seed=settings.seed if settings.sampling else None,
            min_tokens=1,
            max_tokens=settings.max_new_tokens,
            stop_token_ids=self.chat.eos_ids,
            detokenize=False,
        )

    def answer(self, batch: Sequence[Request]) -> list[Response]:
        """See :class:`Backend`."""
        prompts = [{"prompt_token_ids": token_ids(self.chat, request)} for request in batch]
        outputs = self.llm.generate(prompts, self.sampling, use_tqdm=False)
        rows = [list(output.outputs[0].token_ids) for output in outputs]
        return [response(self.chat, request, row) for request, row in zip(batch, rows, strict=True)]


BACKENDS: dict[str, Callable[[ResponseSettings], Backend]] = {"hf": HuggingFaceBackend, "vllm": VllmBackend}


def token_ids(chat: ChatFormat, request: Request) -> list[int]:
    """The whole conversation up to the answer."""
    before, after = chat.prompt_ids(request.prompt)
    return [*before, *chat.encode_text(request.text), *after]


def response(chat: ChatFormat, request: Request, ids: Sequence[int]) -> Response:
    """The answer in what was generated, which ends at the end of turn or, cut, at the length limit."""
    end = next((place for place, token in enumerate(ids) if token in chat.eos_ids), None)
    return Response(request.id, chat.decode_answer(ids[:end]), "1" if end is None else "0", request.digest())


# ---- engines -------------------------------------------------------------------------------------------------------


def answer_locally(
    settings: ResponseSettings, batches: Iterable[list[Request]], backend: str = "hf"
) -> Iterator[list[Response]]:
    """Answers batch after batch in this process."""
    llm = BACKENDS[backend](settings)
    return (llm.answer(batch) for batch in batches)


def answer_with_ray(
    settings: ResponseSettings,
    batches: Iterable[list[Request]],
    backend: str = "hf",
    address: str = "local",
    workers: int = 1,
    gpus_per_worker: float = 0,
    cpus_per_worker: float = 1,
) -> Iterator[list[Response]]:
    """Answers batches on the workers of a Ray cluster, through Ray Data; results come as they are ready.

    Args:
        settings, backend: as for one machine; every worker loads the LLM once.
        batches: which rows are answered together; the same batches as on one machine give the same answers.
        address: "local" starts a Ray on this machine, "auto" joins the cluster that it belongs to, HOST:PORT any other.
        workers: how many hold the LLM.
        gpus_per_worker, cpus_per_worker: what each of them reserves.

    Raises:
        ValueError: Ray is not installed, or its cluster cannot be reached.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(f"--engine ray needs Ray (pip install 'blspkd-fairseq[ray]'): {error}") from error
    try:
        ray.init(
            address=address,
            ignore_reinit_error=True,
            log_to_driver=False,
            **({"include_dashboard": False} if address == "local" else {}),
        )
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(
            f"no Ray cluster can be reached at {address!r}: is it running (`ray status` on its head), and does this "
            "process have its token, if it asks for one (RAY_AUTH_MODE=token and RAY_AUTH_TOKEN)? "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    rows = [{"batch": [tuple(request) for request in batch]} for batch in batches]
    if not rows:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A block of its own for each batch, up to what Ray handles well: an answer that is ready is an answer kept.
    answered = ray.data.from_items(rows, override_num_blocks=min(len(rows), _RAY_BLOCKS)).map(
        _RayWorker,
        fn_constructor_args=(settings, backend),
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=gpus_per_worker or None,
        num_cpus=cpus_per_worker,
    )
    for row in answered.iter_rows():
        yield [Response(*answer) for answer in row["answers"]]


_RAY_BLOCKS = 5000


class _RayWorker:
    """Holds the LLM in a Ray actor."""

    def __init__(self, settings: ResponseSettings, backend: str) -> None:
        self.llm = BACKENDS[backend](settings)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"answers": [tuple(one) for one in self.llm.answer([Request(*r) for r in row["batch"]])]}
