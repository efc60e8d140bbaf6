"""`specd bench pipeline`: daemons and a trainer together, beside co-location and the origin's protocol."""
