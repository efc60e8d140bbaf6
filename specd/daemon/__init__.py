"""The daemon's control process: sockets, sessions, leases, credits, and the worker's lifecycle."""
