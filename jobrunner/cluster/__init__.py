"""Starts the processes of a cluster, and knows where they are.

    directory.py   DIR/cluster.json, token, ports, pids: what a cluster directory says
    local.py       cluster up, cluster down: daemons of this host that outlive the command
    daemons.py     one master or worker in the foreground: what systemd, Kubernetes and local.py start
    embedded.py    masters and workers forked for one `jobrunner run`, gone with it

Owns processes and their places. Must not know what they say to each other.
"""
