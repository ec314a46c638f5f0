"""Who may write: worker sessions; the one winner of each output partition; clients' locks and small values.

    register ──► SessionTable ──ended──► its attempts are lost
    seal     ──► LockTable: winner of (job, stage, partition), write-once; path of an output ──► its one live job
    client   ──► LockService: sessions, named locks with waiters and rising tokens, keys with revisions
                 └── holder.py, in the client: may it still rely on what it was granted?

Applied in log order, alike on every master. Leases keep jobs moving; they decide nothing here.
Knows nothing of tasks, schedules, clocks or sockets.
"""
