"""Pictures that arrive one by one, answered by a model several at a time."""

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

WINDOW = 0.003  # seconds that the first picture of a batch waits for others

Answer = list[dict[str, float]]
Classifier = Callable[[Sequence[bytes]], list[Answer]]


class Batches:
    """A batch is what has arrived when its first picture has waited for WINDOW, or earlier, when it is the largest."""

    def __init__(self, classify: Classifier, largest: int) -> None:
        self.classify, self.largest = classify, largest
        self.sizes: Counter[int] = Counter()  # of the batches so far
        self.waiting: deque[tuple[float, bytes, asyncio.Future[Answer]]] = deque()
        self.some, self.enough = asyncio.Event(), asyncio.Event()
        self.thread = ThreadPoolExecutor(1)  # the model's, so that the event loop goes on meanwhile

    async def answer(self, picture: bytes) -> Answer:
        """The model's answer to a picture."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.waiting.append((time.monotonic(), picture, answer))
        self.some.set()
        if len(self.waiting) >= self.largest:
            self.enough.set()
        return await answer

    async def run(self) -> None:
        """Answer batch after batch, until this is cancelled."""
        while True:
            await self.some.wait()
            with contextlib.suppress(asyncio.TimeoutError):  # what came while the model ran has waited already
                await asyncio.wait_for(self.enough.wait(), self.waiting[0][0] + WINDOW - time.monotonic())
            batch = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.largest))]
            if len(self.waiting) < self.largest:
                self.enough.clear()
            if not self.waiting:
                self.some.clear()
            self.sizes[len(batch)] += 1
            await self.answer_batch([picture for _, picture, _ in batch], [answer for _, _, answer in batch])

    async def answer_batch(self, pictures: Sequence[bytes], answers: Sequence["asyncio.Future[Answer]"]) -> None:
        try:
            found = await asyncio.get_running_loop().run_in_executor(self.thread, self.classify, pictures)
            for answer, result in zip(answers, found, strict=True):
                answer.set_result(result)
        except Exception as error:  # these requests fail, not the service
            for answer in answers:
                if not answer.done():
                    answer.set_exception(error)
