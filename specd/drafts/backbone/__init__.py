"""The backbone of block drafts: layers over blocks of masked tokens, their training, their published directories."""
