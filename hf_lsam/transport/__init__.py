"""How vectors and messages cross between processes, on one machine and between machines."""
