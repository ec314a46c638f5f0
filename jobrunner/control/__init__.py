"""What masters, workers and clients say to each other: values only, one frozen struct a message.

    client ──PutBlob, SubmitJob, GetJob──►┐                 ┌◄──RegisterWorker, Beat, Report, OfferBlocks── agent
                                          ▼                 ▼
                                         master (leader of the group)
                                          └──────Instruct, LeaderIs (pushed)──────► agent, client

Owns the words; knows nothing of sockets, the log or how any of it is carried out.
"""
