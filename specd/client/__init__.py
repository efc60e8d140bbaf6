"""The trainer's side: sessions with daemons, batches in flight, transfers."""
