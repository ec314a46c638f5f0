"""Who may write: worker sessions, and for each output partition the one attempt whose output it is.

    register ──► SessionTable ──ended──► its attempts are lost
    seal     ──► LockTable: winner of (job, stage, partition), write-once; path of an output ──► its one live job

Applied in log order, alike on every master. Leases keep jobs moving; they decide nothing here.
Knows nothing of tasks, schedules, clocks or sockets.
"""
