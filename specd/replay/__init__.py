"""The replay tier: states that were captured once are kept, in memory and on a disk, and read when asked for again."""
