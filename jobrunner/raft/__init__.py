"""Raft: one agreed log, the same on every master, which knows nothing of jobs.

    proposals ─► Engine ─► Ready ─┬─ send now ─────────────────────────► peers
    messages  ─►  (pure)          ├─ save: one frame, one sync ─► Store
    time      ─►                  └─ send after the save ──────────────► peers
                    ▲ saved() ◄──────────────────────────────────┘
                    └ committed entries ─► Machine.apply, in order, on every member

`engine.py` is the algorithm (Ongaro, Consensus: Bridging Theory and Practice, 2014), with pre-vote, check-quorum and
leader stickiness; it does no I/O and reads no clock. `log.py`, `progress.py`, `roles.py` are its parts, `ready.py` is
its output, `messages.py` is what members say, `reads.py` confirms reads that need no entry. `store.py` is the durable
log (`segment.py` its file format, `files.py` the file operations it uses). `snapshot.py` is the state that
takes the log's place, as a file and in pieces, `snapshots.py` keeps it in the directory. `driver.py` runs one engine on
a store, a transport and a clock (`member.py`: what it needs of them).

Owns: terms, indexes, votes, the member's directory. Must not know: jobs, workers, rpc, who asks and why.
Above it, a term is called *epoch* (one per leadership, rising for ever), and there is no other word of Raft's.
A group of one member takes the same path: it wins its own election and commits after its own sync.
"""
