"""Errors of the Hugging Face hub as one line, and the folder for downloads and prepared data."""

import os
from pathlib import Path

from lpo_jax.errors import UserError


def cache_dir() -> Path:
    """Return the cache folder: `$LPO_CACHE`, else `lpo_jax` in `$XDG_CACHE_HOME`, else in `~/.cache`."""
    if own := os.environ.get("LPO_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lpo_jax"


def hub_failure(what: str, error: Exception) -> UserError:
    """Return the `UserError` for a failed download: what went wrong, and what to do.

    Args:
      what: the requested object, such as `"model 'hf:org/name'"`.
      error: the exception of the hub's client, which raises a dozen kinds without a common base class.
    """
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    kind = type(error).__name__
    hint = {
        "GatedRepoError": "accept its licence on the hub and log in with `hf auth login`",
        "RepositoryNotFoundError": "check the name; a private one needs `hf auth login`",
        "RevisionNotFoundError": "check the revision",
    }.get(kind, "check the network, or name a local one")
    return UserError(f"{what}: cannot be downloaded ({kind}: {reason.strip()}); {hint}")
