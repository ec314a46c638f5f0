"""Word count by batch functions."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobrunner import Count, Job, Sum, batch

_SPACES = bytes.maketrans(b"\t\n\v\f\r\x1c\x1d\x1e\x1f", b" " * 9)


@batch
def split_words(lines: pa.RecordBatch) -> pa.RecordBatch:
    """The plain way: two kernels."""
    words = pc.list_flatten(pc.utf8_split_whitespace(lines.column("line")))
    return pa.record_batch({"key": words.filter(pc.not_equal(words, ""))})


@batch
def token_words(lines: pa.RecordBatch) -> pa.RecordBatch:
    """The quick way: all lines as one text, words as slices of it that keep their blank until they are counted.

    Words end at ASCII white space only.
    """
    column = lines.column("line")
    whole = pa.ListArray.from_arrays(pa.array([0, len(column)], pa.int32()), column)
    raw = (pc.binary_join(whole, "\n")[0].as_buffer().to_pybytes() + b" ").translate(_SPACES)
    ends = np.flatnonzero(np.frombuffer(raw, np.uint8) == 32)
    cuts = np.zeros(len(ends) + 1, np.int32)
    cuts[1:] = ends + 1
    tokens = pa.Array.from_buffers(pa.binary(), len(ends), [None, pa.py_buffer(cuts), pa.py_buffer(raw)])
    counted = pa.table({"key": tokens}).group_by("key", use_threads=False).aggregate([([], "count_all")])
    words = pc.binary_slice(counted["key"].combine_chunks(), 0, -1).cast(pa.string())
    counts = counted["count_all"].combine_chunks()
    real = pc.not_equal(words, "")
    return pa.record_batch({"key": words.filter(real), "value": counts.filter(real)})


batch_ = Job(map=split_words, reduce=Count())
batch_tokens = Job(map=token_words, reduce=Sum())
