"""Models on the Hugging Face Hub: the commit to load, and errors that distinguish the causes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rtpurbo.errors import RTPurboError

_TIMEOUT_SECONDS = 5


class HubUnreachableError(RTPurboError):
    """A model is not in the cache, and the Hub cannot be asked."""


def find_on_hub(
    name: str,
    revision: str | None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    **_: Any,
) -> tuple[str | None, bool]:
    """Returns the commit of a model on the Hub, and whether only the local cache can be used.

    The Hub is asked once, with a short timeout: loading would first retry for half a minute. Arguments are as of
    `from_pretrained`.

    Raises:
        HubUnreachableError: the Hub cannot be reached and the model is not in the cache.
        RTPurboError: the Hub has no such model or revision, or the model is gated.
    """
    try:
        if local_files_only:
            raise OfflineModeIsEnabled("only local files are to be used")
        info = HfApi(token=token).model_info(name, revision=revision, timeout=_TIMEOUT_SECONDS)
        return info.sha, False
    except Exception as error:  # no network shows itself in many ways, none of them lasting
        if refusal := refusal_message(error, "model", name, revision):
            raise RTPurboError(refusal) from error
        config = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision)
        if not isinstance(config, str):
            raise HubUnreachableError(unreachable_message(name)) from error
        return Path(config).parent.name, True


def refusal_message(
    error: BaseException | None, kind: str, name: str, revision: str | None
) -> str | None:
    """Returns the sentence for an error of `huggingface_hub`, if the Hub refused the request.

    It did not if it did not answer, as without a network. `kind` is that of the repository, "model" or "artifact".
    """
    if isinstance(error, LocalEntryNotFoundError):  # an EntryNotFoundError of the local cache
        return None
    if isinstance(error, GatedRepoError):
        return (
            f"the {kind} {name} is gated; ask for access on its page on the Hugging Face Hub and "
            "log in with `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the {kind} {name} has no revision {revision}; check it on the Hugging Face Hub."
    if isinstance(error, (RepositoryNotFoundError, HFValidationError, EntryNotFoundError)):
        return (
            f"there is no {kind} {name}, neither a folder nor on the Hugging Face Hub; check the "
            "name (for a private one, log in with `hf auth login`)."
        )
    if isinstance(error, LocalTokenNotFoundError):
        return f"no token is stored for the {kind} {name}; log in with `hf auth login`."
    if isinstance(error, HfHubHTTPError) and (status := error.response.status_code) in (401, 403):
        return (
            f"the Hugging Face Hub refused access to the {kind} {name} (HTTP {status}); check the "
            "token with `hf auth whoami` or log in with `hf auth login`."
        )
    return None


def unreachable_message(name: str) -> str:
    """Returns the sentence for a name that is no folder, where the Hub does not answer."""
    return (
        f"{name} is not a folder, and the Hugging Face Hub cannot be reached to look for it there; "
        "check the path or the network."
    )
