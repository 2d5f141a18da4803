"""Whether the Hugging Face hub can be asked for a model: one short check, before any file is looked for.

Without it, each file that is missing in the cache (most models lack some) costs huggingface_hub minutes of retries.
"""

from __future__ import annotations

import logging
import os
import threading

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HTTPError

logger = logging.getLogger(__name__)

CHECK_SECONDS = 2.0  # to connect, and to answer; HF_HUB_ETAG_TIMEOUT is taken instead if the user sets it
TOO_MANY_REQUESTS = 429


def why_not_the_hub(model_id: str) -> str | None:
    """Why only the cache can be used for this model; None if the hub answers, also if it does not know the model.

    The check is one HEAD request without retries. A warning says that it failed.
    """
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    seconds = CHECK_SECONDS
    if "HF_HUB_ETAG_TIMEOUT" in os.environ:
        seconds = float(constants.HF_HUB_ETAG_TIMEOUT)
    problems: list[str | None] = []
    # In a thread, because the resolution of a name obeys no timeout.
    check = threading.Thread(target=lambda: problems.append(_ask(model_id, seconds)), daemon=True)
    check.start()
    check.join(seconds + 1)
    problem = problems[0] if problems else f"it does not answer within {seconds:g} s"
    if problem is not None:
        logger.warning(
            "the hub cannot be asked for %r (%s): only its cache is used. HF_HUB_OFFLINE=1 saves the check, "
            "HF_HUB_ETAG_TIMEOUT=10 waits 10 s", model_id, problem,
        )  # fmt: skip
    return problem


def _ask(model_id: str, seconds: float) -> str | None:
    try:
        found = get_hf_file_metadata(hf_hub_url(model_id, constants.CONFIG_NAME), timeout=seconds)
    except HfHubHTTPError as error:
        status = error.response.status_code
        return f"it answers with status {status}" if status >= 500 or status == TOO_MANY_REQUESTS else None
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # of the network, a proxy, an address
        return str(error) or type(error).__name__
    return None if found.commit_hash else "what answers is no hub"
