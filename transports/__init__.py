"""How states move from daemon to trainer: `base` is the contract, `registry` knows the names."""
