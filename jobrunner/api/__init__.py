"""What a user imports: a job as a plain value, and the ways to run it.

    Job ──► prepare.py: check output, list input, pack functions, plan ──► BuiltJob
                                                                             │
             run.py: own masters and worker, started and stopped ──┐         ▼
             a running cluster, by address or directory ───────────┴─► client.py, handle.py: Client, JobHandle
                                                                             │
                                              remote.py: one loop in one thread, calls to the masters

Everything here is synchronous; the loop is the client's own. A call whose outcome cannot be known raises Unknown, and
asking again under the same job id is safe. Checks come first: what can be refused is refused before anything starts.
Owns: the user's view of a job. Must not know: how masters agree, how workers run, what the command line prints.
"""
