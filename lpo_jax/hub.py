"""The Hugging Face hub's failures as one line, and the folder in which downloads and prepared data are kept."""

import os
from pathlib import Path

from lpo_jax.errors import UserError


def cache_dir() -> Path:
    """`$LPO_CACHE`, else `lpo_jax` in `$XDG_CACHE_HOME`, else in `~/.cache`."""
    if own := os.environ.get("LPO_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lpo_jax"


def hub_failure(what: str, error: Exception) -> UserError:
    """What went wrong at the hub, and what to do.

    Args:
      what: the thing that was asked for, such as `"model 'hf:org/name'"`.
      error: what the hub's client raised; it raises a dozen kinds, none with a common base.
    """
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    kind = type(error).__name__
    hint = {
        "GatedRepoError": "accept its licence on the hub and log in with `hf auth login`",
        "RepositoryNotFoundError": "check the name; a private one needs `hf auth login`",
        "RevisionNotFoundError": "check the revision",
    }.get(kind, "check the network, or name a local one")
    return UserError(f"{what}: cannot be downloaded ({kind}: {reason.strip()}); {hint}")
