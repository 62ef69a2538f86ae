"""``shmengine bench``: what the ways from one process to another cost on this machine, and which one to take.

    plan ─► targets (ours, rivals) ─► crew: two processes each ─► measure: interleaved rounds ─► results
                                                                                                  │
                                           table, JSON, CSV, plot, page  ◄──  recommend  ◄────────┘

Nothing of this is imported by the rest of the package.
"""
