"""Work-arounds for fairseq, torch and torchaudio, each with its reason, and nowhere else.

Importing this module imports none of them: `blspkd_fairseq.check` runs where they are missing or broken.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import inspect
import logging
import queue
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from blspkd_fairseq.files import whole_file
from blspkd_fairseq.requirements import FAIRSEQ_NAME, FAIRSEQ_VERSION

INSTALL_FAIRSEQ = f"pip install {FAIRSEQ_NAME}=={FAIRSEQ_VERSION}"


# --- torchaudio -----------------------------------------------------------------------------------


def block_broken_torchaudio() -> None:
    """Hides a torchaudio that cannot be imported; leaves a working or an absent one alone.

    Every build of fairseq requires torchaudio, whose wheel links CUDA and so fails beside a CPU torch.
    transformers imports it wherever it is *installed*, and then even its tokenizers fail with a misleading
    message. With `None` in `sys.modules`, Python and transformers take it for not installed. Nothing here
    needs torchaudio.
    """
    if "torchaudio" in sys.modules or importlib.util.find_spec("torchaudio") is None:
        return
    try:
        importlib.import_module("torchaudio")
    except Exception:  # OSError, RuntimeError, AttributeError, ...: depends on the pair of versions
        sys.modules["torchaudio"] = None  # type: ignore[assignment]


class _BlockTorchaudioBeforeTransformers(importlib.abc.MetaPathFinder):
    """Finds nothing itself: the look-up of transformers is the latest moment to deal with torchaudio."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        if name == "transformers":
            block_broken_torchaudio()


def guard_transformers() -> None:
    """Calls `block_broken_torchaudio` when transformers is first imported, by whomever.

    Testing torchaudio costs an import of torch (1.5 s), which code that only reads manifests should not pay.
    """
    if "transformers" in sys.modules:
        block_broken_torchaudio()
    elif not any(isinstance(finder, _BlockTorchaudioBeforeTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BlockTorchaudioBeforeTransformers())


# --- fairseq --------------------------------------------------------------------------------------


class FairseqError(ImportError):
    """fairseq is missing, cannot be imported, or was overwritten; the message says what to do."""


class Problem(NamedTuple):
    """What is wrong, and what the user can do about it."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


class FairseqDistribution(NamedTuple):
    """A distribution that provides `import fairseq`."""

    name: str
    version: str
    folder: Path | None  # where it put its files; None: an editable install, which puts none

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def is_pinned(self) -> bool:
        return (self.name, self.version) == (FAIRSEQ_NAME, FAIRSEQ_VERSION)


def fairseq_distributions() -> list[FairseqDistribution]:
    """All installed distributions that provide `import fairseq`, whatever their names, sorted by name."""
    names = set(importlib.metadata.packages_distributions().get("fairseq", []))
    return [_describe(importlib.metadata.distribution(name)) for name in sorted(names)]


def _describe(distribution: importlib.metadata.Distribution) -> FairseqDistribution:
    name = str(distribution.metadata["Name"]).lower().replace("_", "-")
    owns_files = any(file.parts[:1] == ("fairseq",) for file in distribution.files or ())
    folder = Path(str(distribution.locate_file("fairseq"))).resolve() if owns_files else None
    return FairseqDistribution(name, distribution.version, folder)


def fairseq_problem() -> Problem | None:
    """What keeps fairseq from being used here, or None. Imports fairseq."""
    found = fairseq_distributions()
    problem = _overwritten(found)
    if problem is not None or "fairseq" in sys.modules:
        return problem
    if importlib.util.find_spec("fairseq") is None:
        return Problem("fairseq is not installed", f"run `{INSTALL_FAIRSEQ}`, a build for Python 3.11 and 3.12")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        importlib.import_module("fairseq")
    except Exception as error:
        return _unimportable(found, error)
    finally:
        # Importing fairseq makes every library print its debugging messages, unless the program set up logging before.
        for handler in set(root.handlers) - set(handlers):
            root.removeHandler(handler)
        root.setLevel(level)
    return None


def _overwritten(found: list[FairseqDistribution]) -> Problem | None:
    folders = [one.folder for one in found if one.folder is not None]
    shared = [one for one in found if one.folder is not None and folders.count(one.folder) > 1]
    if not shared:
        return None
    return Problem(
        f"{' and '.join(map(str, shared))} have written into the same folder {shared[0].folder}, "
        "so that one has overwritten the other",
        f"run `pip uninstall -y {' '.join(one.name for one in shared)}` and then `{INSTALL_FAIRSEQ}`, "
        "or give this project a virtual environment of its own (scripts/venv.sh)",
    )


def _unimportable(found: list[FairseqDistribution], error: Exception) -> Problem:
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] != "fairseq":
        missing = error.name.split(".")[0]
        return Problem(f"fairseq needs the Python package {missing}, which is missing", f"install {missing}")
    who = " and ".join(map(str, found)) or "the fairseq on your Python path"
    reason = (str(error).strip() or "no message").splitlines()[0]
    uninstall = "".join(f"`pip uninstall -y {one.name}` and then " for one in found)
    return Problem(
        f"{who} cannot be imported by Python {sys.version_info.major}.{sys.version_info.minor} "
        f"({type(error).__name__}: {reason})",
        f"run {uninstall}`{INSTALL_FAIRSEQ}`",
    )


def fairseq_warning() -> Problem | None:
    """What to say when another build than the tested one provides fairseq, or several do; else None."""
    found = fairseq_distributions()
    if len(found) == 1 and found[0].is_pinned:
        return None
    who = " and ".join(map(str, found)) or "a source folder on your Python path"
    return Problem(
        f"fairseq comes from {who}, and only {FAIRSEQ_NAME} {FAIRSEQ_VERSION} is tested",
        f"if something fails, `{INSTALL_FAIRSEQ}` in a virtual environment of its own (scripts/venv.sh)",
    )


def require_fairseq() -> None:
    """Raises unless fairseq can be used; cheap when it is imported already.

    Raises:
        FairseqError: one sentence that says what is wrong and what to do.
    """
    problem = fairseq_problem()
    if problem is not None:
        raise FairseqError(str(problem))


# What fairseq says to hydra and torch of today, in every command, and what nobody but its authors could act upon.
_FAIRSEQ_WARNINGS = (
    r"hydra\.experimental\.\w+\(\) is no longer experimental",
    r"\s*The version_base parameter is not specified",
    r"In '.*': Usage of deprecated keyword in package header",
    r"\s*'config' is validated against ConfigStore schema",
    r"\s*The strict flag in the compose API is deprecated",
    r"`torch\.cuda\.amp\.\w+\(args\.\.\.\)` is deprecated",
    r"`torch\.jit\.script` is deprecated",
    r"'pin_memory' argument is set as true but no accelerator is found",
)


def silence_fairseq() -> None:
    """Hides what fairseq says of itself: hundreds of lines before anything happens.

    Those are warnings about its use of deprecated interfaces; hydra's debugging messages, as one of its models makes
    all libraries print theirs; and a line for each bias that an LLM does not have, since its trainer takes all that are
    None for one shared parameter.
    """
    for message in _FAIRSEQ_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("hydra").setLevel(logging.INFO)
    logging.getLogger("fairseq.trainer").addFilter(_is_not_on_shared_parameters)


def _is_not_on_shared_parameters(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("detected shared parameter")


def _replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Puts ``wrap(original)`` in the place of an attribute, once."""
    original = getattr(owner, name)
    if not getattr(original, "_is_ours", False):
        ours = wrap(original)
        ours._is_ours = True
        setattr(owner, name, ours)


# --- fairseq's commands ---------------------------------------------------------------------------

_commands: list[Any] = []  # configurations of those that run
_readers: weakref.WeakSet[Any] = weakref.WeakSet()  # threads that read batches ahead
_LONGEST_READ = 30.0  # seconds for the batch that is being read when its reader is told to end


def attend_commands() -> None:
    """Knows the options of fairseq's commands, and ends what they have begun.

    To be called when this package is loaded and when a task begins. fairseq-hydra-train and the processes that torch
    spawns load it when ``main`` runs already: there it is ``train``, which ``main`` calls, that is attended.
    """
    from fairseq.distributed import utils

    _end_reading_with_commands()
    _replace(utils, "call_main", _remembered)
    for name, module in list(sys.modules.items()):
        if name in ("__main__", "__mp_main__") or name.startswith("fairseq_cli."):
            for function in ("main", "train"):
                if _is_of_a_command(getattr(module, function, None)):
                    _replace(module, function, _followed_by_an_end)


def _is_of_a_command(function: Any) -> bool:
    if not inspect.isfunction(function):
        return False
    return Path(inspect.unwrap(function).__code__.co_filename).parent.name == "fairseq_cli"


def _remembered(call_main: Any) -> Any:
    @functools.wraps(call_main)
    def call(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(cfg.task, "_name", None) == "blsp_kd":
            refuse_precision(cfg)
        _commands.append(cfg)
        try:
            return call_main(cfg, *args, **kwargs)
        finally:
            _commands.pop()

    return call


def _followed_by_an_end(function: Any) -> Any:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        finally:
            for reader in list(_readers):
                reader.end()

    return run


def _end_reading_with_commands() -> None:
    """Lets fairseq's data loading end before the interpreter does.

    fairseq leaves a thread that reads ahead, loader processes and the thread that pins memory to the interpreter's end.
    torch's clean-up starts a thread, which Python 3.12 refuses by then, and the pinning thread lives on while CUDA is
    torn down: a training that stopped in mid-epoch never exits. Here the reading thread ends on request or with an
    error, and takes the rest with it; loader processes that would outlive their epoch are not kept.
    """
    from fairseq.data import iterators

    class Reader(iterators.BackgroundConsumer):
        def __init__(self, ahead: Any, loader: Any, most: int | None, cuda_device: int | None) -> None:
            self.is_ended = threading.Event()
            super().__init__(ahead, self._batches(loader, most), None, cuda_device)
            _readers.add(self)

        def _batches(self, loader: Any, most: int | None) -> Iterator[Any]:
            batches = iter(loader)
            try:
                for batch in islice(batches, most):
                    yield batch
                    if self.is_ended.is_set():
                        return
            finally:
                if hasattr(batches, "_shutdown_workers"):  # not where this process loads
                    batches._shutdown_workers()

        def end(self) -> None:
            self.is_ended.set()
            deadline = time.monotonic() + _LONGEST_READ
            while self.is_alive() and time.monotonic() < deadline:
                with contextlib.suppress(queue.Empty):  # room for the batch that it wants to hand over
                    self._queue.get(timeout=0.01)

    def read_by_a_thread(begin: Any) -> Any:
        @functools.wraps(begin)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            begin(self, *args, **kwargs)
            self.persistent_workers = False
            self.buffer_size = max(self.buffer_size, int(self.num_workers > 0))

        return __init__

    _replace(iterators, "BackgroundConsumer", lambda _: Reader)
    _replace(iterators.EpochBatchIterator, "__init__", read_by_a_thread)


def refuse_precision_of_command(cfg: Any, from_checkpoint: bool) -> None:
    """Checks the options of the command that sets up a task with this configuration.

    Args:
        cfg: of the task, within that of the command or, if ``from_checkpoint``, of the training that ended with it.
        from_checkpoint: fairseq-validate takes the task from there.
    """
    parent = cfg._get_parent() if hasattr(cfg, "_get_parent") and not from_checkpoint else None
    for command in (parent, *_commands[-1:]):
        if command is not None:
            refuse_precision(command)


_PRECISIONS = ("fp16", "bf16", "amp", "memory_efficient_fp16", "memory_efficient_bf16")


def refuse_precision(command: Any) -> None:
    """Refuses fairseq's kinds of half precision, which halve what is trained, or fail (fairseq#4696).

    Raises:
        ValueError: names the options and what to use.
    """
    given = [name for name in _PRECISIONS if getattr(command.common, name, False)]
    given = [name for name in given if f"memory_efficient_{name}" not in given]  # which implies it
    if given:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(
            f"leave out {options}: what blsp_kd trains stays in float32 and its products run in bfloat16 on a GPU that "
            "has it, by themselves; --llm-dtype says in which precision the frozen LLM is held"
        )
    if command.distributed_training.ddp_backend == "fully_sharded":
        raise ValueError(
            "--ddp-backend fully_sharded cannot hold blsp_kd's trained parameters beside a frozen LLM: use "
            "--ddp-backend pytorch_ddp or legacy_ddp"
        )


# --- several processes ----------------------------------------------------------------------------


def sum_gradients_as_they_are() -> None:
    """Lets both of fairseq's wrappers for several processes train what is here.

    legacy_ddp sums gradients in the precision of the model's first parameter, which is the frozen LLM's table: bfloat16
    loses .3 % of each, even in a single process. pytorch_ddp names a GPU for a model on a CPU.
    """
    import torch

    wrappers = importlib.import_module("fairseq.models.distributed_fairseq_model")

    def in_own_precision(all_reduce_grads: Any) -> Any:
        @functools.wraps(all_reduce_grads)
        def reduce(self: Any) -> None:
            trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
            if self.buffer is None and trained:
                dtype = functools.reduce(torch.promote_types, [parameter.dtype for parameter in trained])
                size = min(self.buffer_size, sum(parameter.numel() for parameter in trained))
                self.buffer = trained[0].new_empty(size, dtype=dtype)
            all_reduce_grads(self)

        return reduce

    def on_its_device(wrapper: Any) -> Any:
        def wrap(module: Any, **options: Any) -> Any:
            if not any(parameter.is_cuda for parameter in module.parameters()):
                options |= {"device_ids": None, "output_device": None}
            return wrapper(module=module, **options)

        return wrap

    _replace(wrappers.LegacyDistributedDataParallel, "all_reduce_grads", in_own_precision)
    _replace(wrappers, "DistributedDataParallel", on_its_device)


# --- attention ------------------------------------------------------------------------------------

CPU_ATTENTION = "sdpa_float32_on_cpu"


def use_fast_cpu_attention(llm: Any) -> None:
    """Lets an LLM in bfloat16 or float16 compute attention in float32 while it is on a CPU.

    torch's fused attention for the CPU takes 15.7 ms for a backward pass in bfloat16 that takes 3.5 ms in float32
    (torch 2.13, 16 x 9 heads, 35 queries, 66 keys), a sixth of a whole training step. On a GPU nothing changes, nor
    for an LLM that does not use it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        dtype = query.dtype
        if query.device.type != "cpu" or not dtype.is_floating_point or dtype.itemsize > 2:
            return sdpa_attention_forward(module, query, key, value, mask, **options)
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
        out, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)
        return out.to(dtype), weights

    if llm.config._attn_implementation == "sdpa":
        AttentionInterface.register(CPU_ATTENTION, attention)
        AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)
        llm.set_attn_implementation(CPU_ATTENTION)


# --- progress bars ---------------------------------------------------------------------------------


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hides the bar that transformers shows, for each model that it loads, in the midst of a command's own lines."""
    from transformers.utils import logging as transformers_logging

    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


# --- the LLM's cache -------------------------------------------------------------------------------


@functools.cache
def _cache_name() -> str:
    """What the installed transformers calls keys and values: ``past_key_values`` before 5.24, then ``cache``."""
    import dataclasses

    from transformers.modeling_outputs import BaseModelOutputWithPast

    names = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
    return "cache" if "cache" in names else "past_key_values"


def cache_argument(cache: Any) -> dict[str, Any]:
    """The keyword argument by which an LLM's ``forward`` and ``generate`` take a cache."""
    return {_cache_name(): cache}


def cache_of(output: Any) -> Any:
    """The cache in what an LLM's ``forward`` returned."""
    return getattr(output, _cache_name())


# --- recomputed activations ------------------------------------------------------------------------


def checkpoint_activations(llm: Any, options: dict[str, Any]) -> None:
    """Lets an LLM recompute its activations in backward, by the method that the installed transformers has."""
    enable = getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
    enable(options)  # by position: the argument was renamed with the method


# --- checkpoints ----------------------------------------------------------------------------------


def allow_safe_checkpoint_globals() -> None:
    """Lets `torch.load(weights_only=True)` read what fairseq puts beside the weights of its checkpoints.

    fairseq stores an argparse Namespace, and meters that may hold numpy scalars. The types are inert data.
    """
    import argparse

    import numpy
    import torch

    scalar = importlib.import_module("numpy._core.multiarray").scalar

    float_dtype = type(numpy.dtype("float64"))
    torch.serialization.add_safe_globals([argparse.Namespace, scalar, numpy.dtype, float_dtype])


def copy_checkpoints_atomically() -> None:
    """A killed training leaves whole files: fairseq writes a checkpoint safely, but then copies it to
    ``checkpoint_last.pt`` byte by byte over the one before, and half of one cannot be resumed from."""
    import shutil

    from fairseq.file_io import PathManager

    remote_copy = PathManager.copy

    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
        if PathManager.path_requires_pathmanager(dst_path) or PathManager.path_requires_pathmanager(src_path):
            return remote_copy(src_path, dst_path, overwrite)
        with whole_file(Path(dst_path)) as partial:
            shutil.copyfile(src_path, partial)
        return True

    copy._is_atomic = True  # type: ignore[attr-defined]
    if not getattr(remote_copy, "_is_atomic", False):
        PathManager.copy = staticmethod(copy)


def say_why_a_checkpoint_is_refused() -> None:
    """fairseq takes a folder for --finetune-from-model, finds no file in it, and trains from scratch without a word;
    what keeps a model from loading a checkpoint it replaces by "please ensure that the architectures match"."""
    from fairseq import checkpoint_utils

    load = checkpoint_utils.load_checkpoint

    def load_checkpoint(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if cfg.finetune_from_model and Path(cfg.finetune_from_model).is_dir():
            raise ValueError(
                f"--finetune-from-model {cfg.finetune_from_model} is a folder: give the checkpoint in it, or "
                "--pretrained-model for a folder of save_pretrained"
            )
        try:
            return load(cfg, *args, **kwargs)
        except Exception as error:
            if "architectures match" in str(error) and isinstance(error.__context__, ValueError):
                raise error.__context__ from None
            raise

    load_checkpoint._says_why = True  # type: ignore[attr-defined]
    if not getattr(load, "_says_why", False):
        checkpoint_utils.load_checkpoint = load_checkpoint


# --- generation ------------------------------------------------------------------------------------


def default_results_jsonl(subset: str) -> str:
    """``generate-SUBSET.jsonl`` in the folder of fairseq-generate's --results-path; "" when it has none.

    fairseq tells a task everything about generation but where the results go, so this reads the command line.
    """
    import argparse

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--results-path", default="")
    folder = parser.parse_known_args()[0].results_path
    return str(Path(folder) / f"generate-{subset}.jsonl") if folder else ""
