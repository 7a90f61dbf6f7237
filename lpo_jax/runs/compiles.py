"""Compilations of this process: how many there were, and what is compiled at the moment."""

import contextlib
from collections.abc import Callable, Iterator

import jax.monitoring

_LOWERED, _COMPILED = (
    f"/jax/core/compile/{what}_duration" for what in ("jaxpr_to_mlir_module", "backend_compile")
)
_count = 0
_watchers: list[Callable[[str, float], None]] = []


def compiled() -> int:
    """Return the number of programs compiled so far."""
    return _count


@contextlib.contextmanager
def watch(show: Callable[[str, float], None]) -> Iterator[None]:
    """Call `show(name, seconds)` when a program begins to compile, and `show("", seconds)` when it is done.

    The seconds are those that have passed since the last call for the same program: in tracing, and in compiling.
    """
    _watchers.append(show)
    try:
        yield
    finally:
        _watchers.remove(show)


def _listen(event: str, duration_secs: float, **about: str | int) -> None:
    global _count
    _count += event == _COMPILED
    if event in (_LOWERED, _COMPILED):
        name = (
            str(about.get("fun_name", "program")).removeprefix("jit(").removesuffix(")")
            if event == _LOWERED
            else ""
        )
        for show in _watchers:
            show(name, duration_secs)


jax.monitoring.register_event_duration_secs_listener(_listen)
