"""What `jobrunner locks` and `kv` print: JSON objects, and the same as lines for people. Pure: values in, text out."""

import base64

from jobrunner.clock import rfc3339
from jobrunner.control.locks import KeyChange, KeyValue, LockInfo, LockList, LockOwner


def locks_object(found: LockList) -> dict[str, object]:
    return {
        "locks": [_lock_object(info, found.now_ms) for info in found.locks],
        "forced": [
            {
                "name": forced.name,
                "owner": forced.owner,
                "token": forced.token,
                "reason": forced.reason,
                "at": rfc3339(forced.at_ms),
            }
            for forced in found.forced
        ],
    }


def _lock_object(info: LockInfo, now_ms: int) -> dict[str, object]:
    return {
        "name": info.name,
        "mode": mode_of(info),
        "job": info.job or None,
        "holders": [_owner_object(owner, now_ms) for owner in info.holders],
        "waiting": info.waiting,
        "waiters": [_owner_object(owner, now_ms) for owner in info.waiters],
        "closed_after": [_owner_object(owner, now_ms) for owner in info.delays],
    }


def _owner_object(owner: LockOwner, now_ms: int) -> dict[str, object]:
    return {
        "owner": owner.owner,
        "client": owner.client,
        "token": owner.token or None,
        "shared": owner.shared,
        "since": rfc3339(owner.since_ms),
        "age_s": age_s(owner, now_ms),
    }


def mode_of(info: LockInfo) -> str:
    """exclusive, shared, closed (its holder failed), or free (somebody is about to get it)."""
    if info.job:
        return "exclusive"
    if info.holders:
        return "shared" if info.holders[0].shared else "exclusive"
    return "closed" if info.delays else "free"


def age_s(owner: LockOwner, now_ms: int) -> float:
    """Never negative, though masters' clocks differ."""
    return max(0, now_ms - owner.since_ms) / 1000


def locks_text(found: LockList) -> str:
    rows = [("LOCK", "MODE", "TOKEN", "AGE", "OWNER", "WAITING")]
    for info in found.locks:
        rows += _rows(info, found.now_ms)
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines = lines if found.locks else ["no locks"]
    lines += [
        f"{rfc3339(forced.at_ms)} {forced.name} (token {forced.token}) was taken from {forced.owner}: {forced.reason}"
        for forced in found.forced[-5:]
    ]
    return "\n".join(lines)


def _rows(info: LockInfo, now_ms: int) -> list[tuple[str, str, str, str, str, str]]:
    waiting = str(info.waiting)
    if info.job:
        return [(info.name, "exclusive", "", "", f"job {info.job}", waiting)]
    mode = mode_of(info)
    owners = info.holders or info.delays
    return [
        (info.name, mode, str(owner.token), f"{age_s(owner, now_ms):.0f} s", owner.owner, waiting) for owner in owners
    ] or [(info.name, mode, "", "", "", waiting)]


def key_object(item: KeyValue) -> dict[str, object]:
    return {
        "key": item.key,
        **_value_object(item.value),
        "created": item.created,
        "modified": item.modified,
        "client": item.client or None,
    }


def change_object(change: KeyChange) -> dict[str, object]:
    """`value` is null for a deleted key."""
    value = {"value": None} if change.value is None else _value_object(change.value)
    return {"revision": change.revision, "key": change.key, **value}


def _value_object(value: bytes) -> dict[str, object]:
    """As text; what is none, in base 64 under another name."""
    try:
        return {"value": value.decode()}
    except UnicodeDecodeError:
        return {"value_base64": base64.b64encode(value).decode()}
