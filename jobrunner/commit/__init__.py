"""Staged output to final, once.

Owns where an attempt writes, the table of a job's commit, COMMIT.json and _SUCCESS, and every step that touches the
output's file system. Must not know of sockets, of who is alive, of the log or of planning: the masters decide (seal,
CommitJob) and name the step that is due; a worker runs it here, and anybody may run it again.

    set_up ─► open_attempt ─► seal ─►(log: winner)─► ... ─►(log: CommitJob)─► publish ─►(log: committed)─► clean_up
                                                                                │ refused
                                                                                └► retract ─►(log)─► clean_up

Decide after durability, in the log; publish by operations that a zombie may repeat. A process may be stopped at any
point and wake when the job has ended, its stage has been deleted and other jobs have written the same output:
whatever it does next finds either no source or an occupied target (publish.py says why). So readers of an output see
nothing or all of it; where one replaces another: the old, for an instant nothing, then the new.
"""
