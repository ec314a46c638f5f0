"""A worker: runs attempts in child processes and keeps what they left for others to read.

    masters ──Instruct──► agent (asyncio, no pyarrow) ──Run──► slot: map | reduce | step of the commit
       ▲                    │  attempts.py decides              │
       └──Report, Beat──────┘◄──────Done, Progress──────────────┘ block files, staged partitions
                            │
                            └─► base template ─fork─► job template (user's modules) ─fork─► slots

Owns: what runs on this host, the processes, the logs of user code, the lives of block files. Must not know: how the
masters decide or agree, what is in a block. The agent never runs or unpickles user code; a slot never talks to a
master. `attempts` is the pure core; `agent` is its shell; `template` and `slot` are the processes; `context` is what
user code sees.
"""
