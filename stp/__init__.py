"""STP: the protocol, and what devices import."""
