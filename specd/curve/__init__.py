"""Authentication over TCP: CURVE keys and their files, who is let in, and the question that libzmq asks about each."""
