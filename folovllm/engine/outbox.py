"""Outputs that wait for the caller who asks for them, because the step that made them was run for another one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from folovllm.errors import EngineGenerateError
from folovllm.outputs import RequestOutput


class Outbox:
    """By request id: what is complete, what has new tokens, and what a failed step ended."""

    def __init__(self) -> None:
        self.finished: dict[str, RequestOutput] = {}
        self.grown: dict[str, None] = {}  # unfinished requests; the output is made when it is asked for
        self.failures: dict[str, Exception] = {}  # of requests in `finished`

    def __contains__(self, request_id: object) -> bool:
        return request_id in self.finished

    def __len__(self) -> int:
        return len(self.finished)

    def put(self, outputs: Sequence[RequestOutput], error: BaseException | None = None) -> None:
        """Keep final outputs. error: what ended these requests, which is raised in the callers that wait for them."""
        self.finished |= {output.request_id: output for output in outputs}
        if isinstance(error, Exception):
            self.failures |= {output.request_id: error for output in outputs}
        elif error is not None:
            ended = "request {!r} was in a step that another thread ran and that was interrupted"
            self.failures |= {o.request_id: EngineGenerateError(ended.format(o.request_id)) for o in outputs}

    def take(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        """Hand out final outputs, in this order. Ids without any are ignored."""
        taken = [i for i in dict.fromkeys(request_ids) if i in self.finished]
        for request_id in taken:
            self.failures.pop(request_id, None)
        return [self.finished.pop(i) for i in taken]

    def take_of(self, request_ids: Collection[str]) -> list[RequestOutput]:
        """Hand out the final outputs of some requests, in the order of their steps."""
        if self.finished.keys().isdisjoint(request_ids):
            return []
        return self.take([i for i in self.finished if i in request_ids])

    def grown_of(self, request_ids: Collection[str]) -> list[str]:
        """Unfinished requests with new tokens, in the order of their steps."""
        return [] if self.grown.keys().isdisjoint(request_ids) else [i for i in self.grown if i in request_ids]

    def take_failure(self, request_ids: Collection[str] | None) -> Exception | None:
        """The error to raise in the caller of some requests (None: of all), once."""
        mine = [i for i in self.failures if request_ids is None or i in request_ids]
        errors = [self.failures.pop(i) for i in mine]
        return errors[0] if errors else None

    def other_caller_fails(self, error: Exception) -> bool:
        """Whether a caller who has not asked yet will get `error`."""
        return any(other is error for other in self.failures.values())
