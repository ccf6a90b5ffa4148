"""How vectors and messages travel between processes, on one machine and between machines."""
