"""DSpark: a block-diffusion draft whose guesses are joined by a Markov head, taught by the target's distribution."""
