"""Losses that end in the LLM's output head, without the [positions, vocabulary] matrix of all positions.

A vocabulary has 50,000 to 250,000 tokens, so the logits of a batch are by far its largest tensors. The positions go
through the head in chunks; the gradient with respect to the hidden states is computed in the same pass while a chunk's
probabilities are at hand, and only that ``[N, D]`` gradient is kept for backward. The head is frozen in distillation,
so it needs none. The idea is that of Liger and Cut Cross-Entropy; the work equals the plain formula's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

DEFAULT_CHUNK_SIZE = 128

# (first position, student logits [C, V]) -> (loss [C], gradient w.r.t. the logits [C, V]); may overwrite the logits.
ChunkLoss = Callable[[int, Tensor], tuple[Tensor, Tensor]]


class LogitTransform(NamedTuple):
    """What Gemma 2, Granite, Cohere do to their logits z: ``cap * tanh(scale * z / cap)``, or ``scale * z``.

    Attributes:
        scale: a factor.
        cap: the largest absolute value, approached softly; None: no cap.
    """

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, logits: Tensor) -> tuple[Tensor, Tensor | float]:
        """The transformed logits, in place, and the derivative at each."""
        logits.mul_(self.scale)
        if self.cap is None:
            return logits, self.scale
        bent = logits.div_(self.cap).tanh_()
        slope = bent.square().neg_().add_(1.0).mul_(self.scale)
        return bent.mul_(self.cap), slope


class KlDivergence(NamedTuple):
    """Attributes: ``kl`` [N] nats, the divergence; ``agrees`` [N] bool, both find the same token likeliest."""

    kl: Tensor
    agrees: Tensor


def chunk_size_for(device: torch.device) -> int:
    """Positions that go through the head at once: as many as keep a GPU busy, as few as a CPU's caches like."""
    return 1024 if device.type == "cuda" else DEFAULT_CHUNK_SIZE


def linear_kl_div(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    transform: LogitTransform | None = None,
) -> Tensor:
    """KL divergence between teacher and student tokens, from their hidden states (BLSP-KD, arXiv 2405.19041, sec. 3.1).

    Args:
        student_hidden: ``[N, D]`` hidden states before the head; receives the gradient.
        teacher_hidden: ``[N, D]``; never receives one.
        head_weight: ``[V, D]`` frozen output embedding, shared by both.
        head_bias: ``[V]``; an entry of -inf takes its token out.
        temperature: divides the logits. There is no T^2 factor on the result (as in the published code).
        reverse: KL(student || teacher) in place of KL(teacher || student).
        chunk_size: positions that go through the head at once; peak memory is about 4 x chunk_size x V x 4 bytes.
        transform: of the logits, where the LLM's head is more than a linear layer.

    Returns:
        ``[N]`` nats, fp32 (fp64 for fp64 input): the sum over the vocabulary at each position.

    Raises:
        ValueError: shapes that do not fit, a temperature that is not positive, or a head that wants a gradient.
    """
    return linear_kl_div_with_agreement(
        student_hidden, teacher_hidden, head_weight, head_bias, temperature, reverse, chunk_size, transform
    ).kl


def linear_kl_div_with_agreement(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    transform: LogitTransform | None = None,
) -> KlDivergence:
    """:func:`linear_kl_div`, and whether both agree on the most likely token, from the same pass through the head."""
    if teacher_hidden.shape != student_hidden.shape:
        raise ValueError(
            "student and teacher must have one shape, "
            f"got {tuple(student_hidden.shape)} and {tuple(teacher_hidden.shape)}"
        )
    return linear_jensen_shannon(
        student_hidden,
        teacher_hidden,
        head_weight,
        head_bias,
        float(reverse),
        temperature,
        chunk_size,
        transform=transform,
        teacher_transform=transform,
    )


def linear_jensen_shannon(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    teacher_head: tuple[Tensor, Tensor | None] | None = None,
    transform: LogitTransform | None = None,
    teacher_transform: LogitTransform | None = None,
) -> KlDivergence:
    """Generalised Jensen-Shannon divergence of teacher p and student q (GKD, arXiv 2306.13649, eq. 1).

    ``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``; as in that paper's code, beta 0
    stands for the forward KL(p || q) and beta 1 for the reverse KL(q || p), to which it tends when divided by beta or
    1 - beta. Arguments, dtypes and errors are those of :func:`linear_kl_div`, and:

    Args:
        beta: 0 to 1.
        teacher_head: weight ``[V', D']`` and bias of a teacher of its own, ``teacher_hidden`` then being ``[N, D']``.
            Words beyond the smaller of the two vocabularies (padding of the tables) are left out of both.
        transform, teacher_transform: of the student's and of the teacher's logits.
    """
    if temperature <= 0:
        raise ValueError(f"the temperature must be positive, got {temperature}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be between 0 and 1, got {beta}")
    if len(teacher_hidden) != len(student_hidden):
        raise ValueError(
            f"student and teacher must have as many positions, got {len(student_hidden)}, {len(teacher_hidden)}"
        )
    teacher_hidden = teacher_hidden.detach()
    agrees = torch.empty(student_hidden.shape[0], dtype=torch.bool, device=student_hidden.device)
    head_bias = _finite(head_bias, student_hidden)
    teacher_weight, teacher_bias = teacher_head or (head_weight, head_bias)
    teacher_bias = _finite(teacher_bias, student_hidden)
    vocabulary = min(len(head_weight), len(teacher_weight))

    def chunk_loss(start: int, student_logits: Tensor) -> tuple[Tensor, Tensor]:
        rows = slice(start, start + len(student_logits))
        teacher_logits = _logits(teacher_hidden[rows], teacher_weight, teacher_bias)[:, :vocabulary]
        if teacher_transform is not None:
            teacher_logits, _ = teacher_transform.apply_(teacher_logits)
        student, teacher = _distribution(student_logits, temperature), _distribution(teacher_logits, temperature)
        agrees[rows] = student.best == teacher.best
        if beta in (0, 1):
            value, gradient = (_reverse_kl if beta else _forward_kl)(student, teacher)
        else:
            value, gradient = _jensen_shannon(student, teacher, beta)
        return value, gradient if temperature == 1.0 else gradient.div_(temperature)

    if vocabulary < len(head_weight):
        head_weight, head_bias = head_weight[:vocabulary], None if head_bias is None else head_bias[:vocabulary]
    divergence = _chunked_head_loss(student_hidden, head_weight, head_bias, chunk_size, chunk_loss, transform)
    return KlDivergence(divergence, agrees)


def linear_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    transform: LogitTransform | None = None,
) -> Tensor:
    """Cross-entropy of the tokens ``targets`` [N] from hidden states ``[N, D]``: ``[N]`` nats.

    Same arguments, dtypes and errors as :func:`linear_kl_div`.
    """
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [{hidden.shape[0]}], got {tuple(targets.shape)}")

    def chunk_loss(start: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        target = targets[start : start + len(logits)].unsqueeze(1)
        log_q = logits.log_softmax(1)
        loss = -log_q.gather(1, target).squeeze(1)
        gradient = log_q.exp_()
        gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
        return loss, gradient

    return _chunked_head_loss(hidden, head_weight, head_bias, chunk_size, chunk_loss, transform)


def distance_cross_entropy(
    vectors: Tensor, targets: Tensor, table: Tensor, scale: float, chunk_size: int = DEFAULT_CHUNK_SIZE
) -> Tensor:
    """Cross-entropy of rows ``targets`` [N] of a table ``[V, D]`` where vectors ``[N, D]`` should lie: ``[N]`` nats.

    The softmax is over ``-scale / 2`` times the squared distance to each row, in units of the rows' mean squared norm
    (as prototypical networks, arXiv 1703.05175). Of dot products alone the minimum lies elsewhere: a row of small norm
    is not even the likeliest where the vector is that row.
    """
    squares = table.float().square().sum(1)
    factor = scale / squares.mean()
    return linear_cross_entropy(vectors.float() * factor, targets, table.float(), -factor / 2 * squares, chunk_size)


class _Distribution(NamedTuple):
    """``logits`` and ``probability`` [C, V]; of the likeliest token [C]: its index, logit and log probability."""

    logits: Tensor
    probability: Tensor
    best: Tensor
    best_logit: Tensor
    best_log: Tensor


def _distribution(logits: Tensor, temperature: float) -> _Distribution:
    """Overwrites the logits if the temperature is not 1."""
    if temperature != 1.0:
        logits.div_(temperature)
    best_logit, best = logits.max(1)
    probability = logits.softmax(1)
    return _Distribution(logits, probability, best, best_logit, probability.amax(1).log())


def _log_sum_difference(one: _Distribution, other: _Distribution) -> Tensor:
    """Difference of the logsumexp of the logits [C], without a [C, V] temporary and exact where both are alike.

    The best token's probability is at least 1/V, so that its log is safe.
    """
    return (one.best_logit - other.best_logit) - (one.best_log - other.best_log)


def _forward_kl(student: _Distribution, teacher: _Distribution) -> tuple[Tensor, Tensor]:
    """KL(p || q) and its gradient q - p with respect to the logits of q, the student. Overwrites both."""
    expectation = teacher.logits.sub_(student.logits).mul_(teacher.probability).sum(1)
    kl = expectation + _log_sum_difference(student, teacher)
    return kl, student.probability.sub_(teacher.probability)


def _reverse_kl(student: _Distribution, teacher: _Distribution) -> tuple[Tensor, Tensor]:
    """KL(q || p) and its gradient q (log q/p - KL) with respect to the logits of q, the student. Overwrites both."""
    log_ratio = student.logits.sub_(teacher.logits)  # plus a constant of the row, which cancels in the gradient
    expectation = (log_ratio * student.probability).sum(1)
    kl = expectation + _log_sum_difference(teacher, student)
    return kl, log_ratio.sub_(expectation.unsqueeze(1)).mul_(student.probability)


def _jensen_shannon(student: _Distribution, teacher: _Distribution, beta: float) -> tuple[Tensor, Tensor]:
    """The divergence and its gradient (1 - beta) q (log q/m - KL(q || m)) with respect to the logits of q."""
    p, q = teacher.probability, student.probability
    mixture = (beta * p + (1 - beta) * q).clamp_(min=torch.finfo(p.dtype).tiny)
    q_log_ratio = torch.xlogy(q, q / mixture)
    kl_student = q_log_ratio.sum(1)
    value = beta * torch.xlogy(p, p / mixture).sum(1) + (1 - beta) * kl_student
    return value, q_log_ratio.sub_(q * kl_student.unsqueeze(1)).mul_(1 - beta)


def _finite(bias: Tensor | None, hidden: Tensor) -> Tensor | None:
    """In the loss's dtype; a token that is taken out has a finite logit, so that a difference of two is 0."""
    return None if bias is None else bias.to(_loss_dtype(hidden)).clamp(min=-1e30)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[C, V]`` in fp32 at least: the matrix product runs in the head's dtype, all that follows does not."""
    logits = (hidden.to(weight.dtype) @ weight.t()).to(_loss_dtype(hidden))
    return logits if bias is None else logits.add_(bias)


def _loss_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _chunked_head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chunk_size: int,
    chunk_loss: ChunkLoss,
    transform: LogitTransform | None,
) -> Tensor:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden states must be [N, D] and the head [V, D], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"the head's bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("the output head gets no gradient here: freeze it (requires_grad_(False)) or detach it")
    return _ChunkedHeadLoss.apply(hidden, weight, bias, chunk_size, chunk_loss, transform)


class _ChunkedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        chunk_size: int,
        chunk_loss: ChunkLoss,
        transform: LogitTransform | None,
    ) -> Tensor:
        losses = torch.empty(hidden.shape[0], dtype=_loss_dtype(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, min(start + chunk_size, hidden.shape[0]))
            logits = _logits(hidden[rows], weight, bias)
            slope: Tensor | float = 1.0
            if transform is not None:
                logits, slope = transform.apply_(logits)
            losses[rows], d_logits = chunk_loss(start, logits)
            if transform is not None:
                d_logits.mul_(slope)
            if gradient is not None:
                gradient[rows] = d_logits.to(weight.dtype) @ weight
            del logits, slope, d_logits  # before the next chunk's logits are made
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * d_losses.unsqueeze(1)).to(gradient.dtype), None, None, None, None, None
