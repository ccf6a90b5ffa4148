"""The server that owns the anchor: `core` (arithmetic), `service` (the workers of a machine), `root` and `relay`."""
