"""The shuffle: map output to reducers, on Arrow, in bounded memory.

    pairs ─► MapOutputWriter ─► one block file an attempt ─► fetch ─► runs ─► merge ─► reduce_partition ─► pairs
             encode, combine,   partition by partition,      local    sorted  groups
             spill, sort        sorted by key, checksummed   or HTTP

It owns the encoding, order and hash of keys (`keys`, `partition`), the block file (`blocks`), the ready-made reducers
(`reducers`, `fold`), spilling and merging (`writer`, `runs`, `merge`), serving and fetching (`server`, `fetch`).
It must not know how an attempt is scheduled, who won, where the output goes or how a job was asked for.
`blocks`, `server` and `reducers` import neither pyarrow nor numpy: the agent and the client load them.
Decisions (combine, spill, cut) follow from data alone, never from time or free memory: a map that runs again on the
same input writes the same rows, and its digest proves it.
"""
