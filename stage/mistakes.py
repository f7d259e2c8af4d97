"""Errors in the words of who typed the command line."""

from __future__ import annotations

from difflib import get_close_matches

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException


def explain(error: BaseException) -> str | None:
    """The mistake in the words of the user's input, or None for an error that is not the user's."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        if isinstance(error.__cause__, TypeError):
            return _arguments(str(error).rpartition("full_key: ")[2].strip(), error.__cause__)
        return explain(error.__cause__)
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause = error.__cause__
        if not isinstance(cause, OmegaConfBaseException):
            return _one_line(error)
        return f"{_one_line(error)} ({_one_line(cause)})" + _near(cause)
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, ValueError | OSError | ImportError) or _is_misconfiguration(error):
        return " ".join(str(error).split())
    return None


def _arguments(name: str, error: TypeError) -> str:
    """Of the class at `name`: an argument that it does not have, or one of a kind that it cannot use."""
    reason = _one_line(error)
    if wrong := reason.partition("unexpected keyword argument '")[2].rstrip("'"):
        return f"{name}: {reason}; leave it out with '~{name}.{wrong}'"
    typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    given = [item for item in typed if item.lstrip("+").startswith(f"{name}.")]
    return f"{name}: {reason}" + (f"; given were {', '.join(given)}" if given else "")


def _near(error: OmegaConfBaseException) -> str:
    """The setting beside an unknown one that looks most like it."""
    parent: object = error.parent_node
    names = [str(name) for name in parent] if hasattr(parent, "keys") else []  # type: ignore[attr-defined]
    found = get_close_matches(str(error.key), names, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _one_line(error: BaseException) -> str:
    """The first lines of a message, without Hydra's search path and OmegaConf's key details."""
    text = str(error).partition("Config search path")[0].partition("full_key:")[0]
    return " ".join(text.split())


def _is_misconfiguration(error: BaseException) -> bool:
    """Lightning's class for wrong arguments of its own, asked for without importing Lightning."""
    return type(error).__name__ == "MisconfigurationException"
