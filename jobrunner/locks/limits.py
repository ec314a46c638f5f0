"""How much clients may have: limits of sessions, locks and small values, the same on every master.

A master's own settings must not decide what `apply` does, so the leader's are a log entry, and state.
"""

import msgspec

from jobrunner.spec.settings import LocksSection

_DEFAULT = LocksSection()


class LockLimits(msgspec.Struct, frozen=True, array_like=True):
    """The part of the settings that decides what is refused."""

    sessions_max: int = _DEFAULT.sessions_max
    unanswered_max: int = _DEFAULT.unanswered_max
    locks_max: int = _DEFAULT.locks_max
    waiters_max: int = _DEFAULT.waiters_max
    name_bytes_max: int = _DEFAULT.name_bytes_max
    ttl_ms_min: int = _DEFAULT.ttl_ms_min
    ttl_ms_max: int = _DEFAULT.ttl_ms_max
    delay_ms_max: int = _DEFAULT.delay_ms_max
    value_bytes_max: int = _DEFAULT.value_bytes_max
    kv_bytes_max: int = _DEFAULT.kv_bytes_max
    history_bytes_max: int = _DEFAULT.history_bytes_max
    steps_max: int = _DEFAULT.steps_max


def limits_of(section: LocksSection) -> LockLimits:
    return LockLimits(*(getattr(section, name) for name in LockLimits.__struct_fields__))
