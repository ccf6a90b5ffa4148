"""How vectors and messages cross between the processes of one machine."""
