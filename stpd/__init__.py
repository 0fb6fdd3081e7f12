"""The daemon: edge gateway, regional hub, hub."""
