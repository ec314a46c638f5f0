"""How a job will run, decided once by the client: a pure function from what is asked to a frozen plan.

    JobSpec ─┐
    Listing ─┼─► build.py ──► JobPlan (a blob for workers) ──► SubmitJob (what masters need of it)
    Settings ┘      │
                    └─ splits.py: files -> the bytes each map task reads
    functions ─► code.py ─► code bundle (a blob that only workers open)

Owns: splits, stages, and the two blobs of a job. Must not know: who runs it, and anything of sockets, disks or clocks.
"""
