"""One thread that answers everybody: requests join the batch when they come, and leave it when they end.

The event loop puts requests in and gets deltas of text out; the thread alone touches the model and its tokenizer.
Between two steps of the decoder it takes new requests in, cancels those whose client has left, and does at most one
piece of other work of the model, so that nobody waits for another's long answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from blspkd_fairseq.generation.streaming import Delta, Request
from blspkd_fairseq.serving.errors import ApiError, overloaded, timed_out

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Decoder(Protocol):
    """The decoder that the engine drives: :class:`blspkd_fairseq.generation.streaming.StreamingDecoder`."""

    def add(self, request: Request) -> int:
        """Queues a request and returns its row."""
        ...

    def step(self) -> list[Delta]:
        """Decodes a token of every row; returns what is new."""
        ...

    def cancel(self, row: int) -> None:
        """Forgets a row."""
        ...


class ClientLeft(Exception):
    """Nobody waits for the answers any more."""


class Answers:
    """Answers to one client while they are decoded, to be iterated over once. Closing them frees their places.

    Args:
        make: makes their requests, in the engine's thread.
        count: number of them.
        at_once: that are decoded or wait at a time; the others follow as these end.
        seconds: until the last of them must be there.
        close: ends them.
        on_first: is told the seconds after which the first text came.
    """

    def __init__(
        self,
        make: Callable[[], Sequence[Request]],
        count: int,
        at_once: int,
        seconds: float,
        close: Callable[[Answers], None],
        on_first: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.make = make
        self.count = count
        self.at_once = min(count, at_once)
        self.waiting: deque[tuple[int, Request]] = deque()  # that the decoder does not have yet
        self.rows: list[int] = []  # the engine's
        self.seconds = seconds
        self.started = time.perf_counter()
        self._close = close
        self._on_first: Callable[[float], None] | None = on_first
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, Delta] | Exception] = asyncio.Queue()
        self._is_closed = False

    @property
    def seconds_left(self) -> float:
        """Until the last of them must be there."""
        return self.started + self.seconds - time.perf_counter()

    def check(self) -> None:
        """For what is done with the answers once they are there.

        Raises:
            ApiError: the time is over. ClientLeft: they were closed.
        """
        if self._is_closed:
            raise ClientLeft
        if self.seconds_left <= 0:
            raise timed_out(self.seconds)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """The deltas, each with the number of its answer.

        Raises:
            ApiError: an answer failed, or is not there in time. ClientLeft: they were closed.
        """
        unfinished = self.count
        while unfinished:
            try:
                async with asyncio.timeout(self.seconds_left):
                    news = await self._news.get()
            except TimeoutError:
                raise timed_out(self.seconds) from None
            if isinstance(news, Exception):
                raise news
            if self._on_first is not None:
                self._on_first(time.perf_counter() - self.started)
                self._on_first = None
            unfinished -= news[1].finish is not None
            yield news

    def close(self) -> None:
        """Ends them; no error once they have ended."""
        self._is_closed = True
        self._close(self)
        self._news.put_nowait(ClientLeft())

    def put(self, news: tuple[int, Delta] | Exception) -> None:
        """Hands news to the event loop, from the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and all clients with it
            self._loop.call_soon_threadsafe(self._news.put_nowait, news)


class Engine:
    """Answers requests in one batch.

    Args:
        make_decoder: makes the decoder, and another one after a failure, whose state nobody knows.
        most: answers that are decoded or wait; more are refused.
        on_step: is told of the deltas of each step.
        on_first: is told the seconds from each question to its first text.
    """

    def __init__(
        self,
        make_decoder: Callable[[], Decoder],
        most: int,
        on_step: Callable[[Sequence[Delta]], None] = lambda deltas: None,
        on_first: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.most = most
        self._make_decoder = make_decoder
        self._on_step = on_step
        self._on_first = on_first
        self._changed = threading.Condition()  # guards what follows
        self._new: deque[Answers] = deque()
        self._closed: deque[Answers] = deque()
        self._work: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._rows: dict[int, tuple[Answers, int]] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- called from the event loop ----------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    def stop(self) -> None:
        """Ends after the current step; answers that are not ready get an error."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether it works."""
        return self._thread.is_alive() and not self._stopping

    @property
    def active(self) -> int:
        """Answers that are decoded or wait."""
        with self._changed:
            return len(self._rows) + sum(answers.at_once for answers in self._new)

    def ask(
        self, make: Callable[[], Sequence[Request]], count: int, seconds: float, at_once: int | None = None
    ) -> Answers:
        """Takes requests in, all or none; those beyond ``at_once`` (default: all) take no place before their turn.

        Raises:
            ApiError: there are too many.
        """
        with self._changed:
            answers = Answers(make, count, count if at_once is None else at_once, seconds, self._close, self._on_first)
            if self._stopping or self.active + answers.at_once > self.most:
                raise overloaded()
            self._new.append(answers)
            self._changed.notify()
        return answers

    async def call(self, function: Callable[[], T]) -> T:
        """Has the thread do other work of the model between two steps.

        Raises:
            ApiError: there is too much of it, or it fails.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._stopping or len(self._work) >= self.most:
                raise overloaded()
            self._work.append((function, future))
            self._changed.notify()
        return await asyncio.wrap_future(future)

    def _close(self, answers: Answers) -> None:
        with self._changed:
            self._closed.append(answers)
            self._changed.notify()

    # ---- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._decoder = self._make_decoder()
        while self._wait():
            self._take_in()
            self._cancel()
            self._do_work()
            self._step()
        self._end()

    def _wait(self) -> bool:
        """Waits until there is something to do; False: the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._new or self._closed or self._work or self._rows)
            return not self._stopping

    def _take_in(self) -> None:
        with self._changed:
            entering = list(self._new)
        for answers in entering:
            try:
                answers.waiting.extend(enumerate(answers.make()))
            except Exception as error:
                answers.put(as_api_error(error))
            with self._changed:
                self._new.popleft()
            for _ in range(answers.at_once):
                self._add_next(answers)

    def _add_next(self, answers: Answers) -> None:
        """Gives the decoder the next request of a client."""
        if not answers.waiting:
            return
        index, request = answers.waiting.popleft()
        try:
            row = self._decoder.add(request)
        except Exception as error:
            answers.put(as_api_error(error))
            self._forget(answers)
            return
        answers.rows.append(row)
        with self._changed:
            self._rows[row] = (answers, index)

    def _cancel(self) -> None:
        with self._changed:
            closed = [answers for answers in self._closed if answers not in self._new]
            self._closed = deque(answers for answers in self._closed if answers in self._new)
        for answers in closed:
            self._forget(answers)

    def _forget(self, answers: Answers) -> None:
        answers.waiting.clear()
        for row in answers.rows:
            with self._changed:
                is_running = self._rows.pop(row, None) is not None
            if is_running:
                self._decoder.cancel(row)

    def _do_work(self) -> None:
        with self._changed:
            job = self._work.popleft() if self._work else None
        if job is None or not job[1].set_running_or_notify_cancel():
            return
        function, future = job
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(as_api_error(error))

    def _step(self) -> None:
        if not self._rows:
            return
        try:
            deltas = self._decoder.step()
        except Exception as error:  # such as no memory: these answers are lost, the server is not
            self._fail(as_api_error(error))
            self._decoder = self._make_decoder()
            return
        self._on_step(deltas)
        for delta in deltas:
            if delta.row not in self._rows:  # another answer of the same client failed
                continue
            answers, index = self._rows[delta.row]
            if delta.finish:
                with self._changed:
                    del self._rows[delta.row]
            if delta.error is None:
                answers.put((index, delta))
                if delta.finish:
                    self._add_next(answers)
            else:
                answers.put(as_api_error(delta.error))
                self._forget(answers)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            failed = {id(answers): answers for answers, _ in self._rows.values()}
            self._rows.clear()
        for answers in failed.values():
            answers.put(error)

    def _end(self) -> None:
        error = ApiError(503, "the server is shutting down", "shutting_down")
        self._fail(error)
        with self._changed:
            for answers in self._new:
                answers.put(error)
            for _, future in self._work:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)


def as_api_error(error: Exception) -> ApiError:
    """Tells a client all about its own mistakes, which are ValueErrors, and little about the server's."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):
        return ApiError(400, str(error), "invalid_value")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, f"the server failed ({type(error).__name__}); its log says more", "internal_error")
