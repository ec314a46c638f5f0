"""Between processes: one TCP port a process, served by aiohttp, and what it takes to keep a link alive.

      caller                                                              answerer
    Masters.call ─► Connection ─► Channel ─► WebSocket /rpc ─► Channel ─► Connection ─► Handler.on_request
                     (the I/O)     (pure)     frames <= 1 MiB   (pure)     (the I/O)      (its owner's)
    PeerLinks.send: two links to every other master, control and bulk; push only, dropped when full

A frame is a msgpack array of envelopes: `Request(id, deadline, body)`, `Reply(id, body)`, `Failure(id, error)`,
`Push(body)`. A body is one msgpack value that rpc never reads: whoever owns the words decodes them.

Owns the envelope, the handshake (token, protocol, cluster, role, identity), deadlines, limits, reconnection and the
search for the leader. Must not know what is said: no job, no worker, nothing of Raft. Nothing here waits for a slow
peer but the writer task of that peer's own connection: its queue is bounded in bytes, and a full queue refuses.
"""
