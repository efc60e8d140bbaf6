"""`specd bench target`: a target's forwards by their size, alone and behind a daemon."""
