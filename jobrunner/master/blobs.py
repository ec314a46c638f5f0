"""Content-addressed blobs (code bundles, plans), replicated in pieces by the log and kept outside the job state."""

import hashlib

from jobrunner.errors import Refused
from jobrunner.ids import Hash


class BlobTable:
    """Blobs by sha256. A blob is usable when its last piece has come and the whole has the right hash."""

    def __init__(self) -> None:
        self._whole: dict[Hash, bytes] = {}
        self._partial: dict[Hash, bytearray] = {}

    def get(self, hash: Hash) -> bytes | None:
        return self._whole.get(hash)

    def has(self, hash: Hash) -> bool:
        return hash in self._whole

    def names(self) -> list[Hash]:
        """Whole and partial blobs, oldest first."""
        return [*self._whole, *self._partial]

    def put(self, hash: Hash, offset: int, total: int, data: bytes) -> bool:
        """Add a piece; True when the blob is whole. Pieces come in order; one that is there already is fine.

        Raises Refused for a gap, or when the whole does not have the hash it is named by.
        """
        if hash in self._whole:
            return True
        partial = self._partial.setdefault(hash, bytearray())
        if offset > len(partial):
            raise Refused(f"blob {hash[:12]}: piece at {offset}, but only {len(partial)} bytes are here")
        if offset + len(data) > len(partial):
            partial[offset:] = data
        if len(partial) < total:
            return False
        del self._partial[hash]
        if len(partial) != total or hashlib.sha256(partial).hexdigest() != hash:
            raise Refused(f"blob {hash[:12]}: the pieces do not have the hash they are named by")
        self._whole[hash] = bytes(partial)
        return True

    def whole(self) -> dict[Hash, bytes]:
        return dict(self._whole)

    def partial(self) -> dict[Hash, bytes]:
        """What has come so far of blobs that are not whole."""
        return {hash: bytes(data) for hash, data in self._partial.items()}

    def restore(self, whole: dict[Hash, bytes], partial: dict[Hash, bytes]) -> None:
        """Hold exactly these."""
        self._whole = dict(whole)
        self._partial = {hash: bytearray(data) for hash, data in partial.items()}

    def drop(self, hash: Hash) -> None:
        self._whole.pop(hash, None)
        self._partial.pop(hash, None)
