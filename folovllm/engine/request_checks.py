"""What is checked of a request before its prompt is read, and what its user should know."""

from __future__ import annotations

import logging

from folovllm.checks import invalid
from folovllm.config import EngineConfig
from folovllm.engine.factory import EngineParts
from folovllm.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class RequestChecks:
    """The checks of one engine. A warning is given once."""

    def __init__(self, config: EngineConfig, parts: EngineParts) -> None:
        self._model = config.model.model
        self._policy = config.scheduler.scheduling_policy
        self._vocab_size = parts.vocab_size
        self._has_tokenizer = parts.tokenizer is not None
        self._eos_token_ids = parts.eos_token_ids
        self._special_token_ids = parts.special_token_ids
        self._defaults = parts.defaults
        self._has_warned = False  # that explicit parameters override some of these
        self._warned_of: set[str] = set()  # stop strings that cannot match

    def check(self, request_id: str, params: SamplingParams | None, priority: int) -> SamplingParams:
        """The parameters that count. Raises ValueError for a value that is not valid, or not for this model."""
        given, params = params, self._defaults.params if params is None else params
        if not isinstance(request_id, str) or not request_id:
            raise invalid("request_id", request_id, "a non-empty string")
        if not isinstance(params, SamplingParams):
            raise invalid("sampling_params", params, "a SamplingParams or None")
        params.check_vocab(self._vocab_size)
        if params.stop and not self._has_tokenizer:
            raise invalid("stop", params.stop, "none, because the model has no tokenizer")
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise invalid("priority", priority, "an integer")
        if priority != 0 and self._policy != "priority":
            raise invalid("priority", priority, f"0, because scheduling_policy is {self._policy!r}")
        if given is not None:
            self._warn_of_overrides(params)
            self._warn_of_hidden_stops(params)
        return params

    def _warn_of_overrides(self, params: SamplingParams) -> None:
        """Say once what explicit parameters override of the model's generation_config.json."""
        overridden = [] if self._has_warned else self._defaults.overridden_by(params)
        if overridden:
            self._has_warned = True
            logger.warning(
                "explicit sampling parameters override %s of the generation_config.json of model=%r",
                ", ".join(overridden),
                self._model,
            )

    def _warn_of_hidden_stops(self, params: SamplingParams) -> None:
        """Say once of a stop string that it cannot match, because a special token in it is not in the text."""
        if not params.stop or not params.skip_special_tokens:
            return
        ends = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else self._eos_token_ids)}
        for stop in set(params.stop) - self._warned_of:
            hidden = [name for name in self._special_token_ids if name in stop]
            if hidden and self._special_token_ids.get(stop) not in ends:  # those of `ends` end the output anyway
                self._warned_of.add(stop)
                logger.warning(
                    "stop=%r never matches: the text does not show the special token %r; allowed: "
                    "skip_special_tokens=False, or stop_token_ids=[%d]",
                    stop,
                    hidden[0],
                    self._special_token_ids[hidden[0]],
                )
