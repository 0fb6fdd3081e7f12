"""Carriers: what moves datagrams and time for the core."""
