"""A second STP/1 client, written from docs/protocol.md alone: it shares nothing with `stp`.

What it cannot find in the text is a fault of the text. It is small and correct, not fast: one session, one
thread, one blocking socket.
"""
