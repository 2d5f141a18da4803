"""When is a sequence complete? The rules that need token ids only; stop strings need text and live above the core.

Order and meaning follow vLLM (`vllm/v1/core/sched/utils.py: check_stop`), with one reading: every EOS id of the
model's generation_config counts as EOS, so its `stop_reason` is None, as vLLM's documentation of the field says.
"""

from __future__ import annotations

from folovllm.request import Request, RequestStatus


def check_stop(request: Request) -> RequestStatus | None:
    """The final status if the newest output token completes the request, else None. Sets `stop_reason`."""
    params = request.sampling_params
    newest = request.output_token_ids[-1]
    if request.num_output_tokens >= params.min_tokens:
        if newest in request.eos_token_ids and not params.ignore_eos:
            return RequestStatus.FINISHED_STOPPED
        if newest in (params.stop_token_ids or ()):
            request.stop_reason = newest
            return RequestStatus.FINISHED_STOPPED
    if request.num_output_tokens >= request.max_output_tokens:
        return RequestStatus.FINISHED_LENGTH_CAPPED
    return None
