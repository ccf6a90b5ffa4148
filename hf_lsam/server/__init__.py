"""The server that owns the anchor: `core` (arithmetic), `process` (sockets, lifetime), `local` (no process at all)."""
