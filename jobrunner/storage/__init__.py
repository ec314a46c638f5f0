"""Storage: input in, output out, through fsspec.

    inputs ─► list_inputs ─► Listing ─► (planner: splits) ─► read_lines ─► user code ─► TextWriter ─► part file

It owns every opening of an input (`filesystem`), the listing with all that is wrong with it (`listing`), records of
text (`readers`) and the text of output (`writers`). It must not know of jobs, attempts or commits, and never writes to
a final name: whoever calls it opens the output file.
Local paths never pass through fsspec: opening and listing thousands of small files is what it is too slow for.
"""
