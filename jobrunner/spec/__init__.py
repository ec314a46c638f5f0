"""What is asked: settings and job specs, validated once, at the edge, before anything starts.

    flags ──┐
    environment ──► load ──► Settings ──► planner, daemons (cluster.toml, read back without pydantic)
    file ───┘                 (frozen)
    Job + options ──► JobSpec ──► planner

`settings.py` is the one list of every timeout and limit; `keys.py` walks it; `load.py` (for people, pydantic) and
`settings_file.py` (for daemons, msgspec) are built from that list, and so are the files in `conf/`.
Owns: words people write, their bounds, and the error line when a word is wrong (key, found, allowed).
Must not know: how a job is planned or run, what a master or a worker is.
"""
