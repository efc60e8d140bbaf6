"""`specd bench transport`: what each transport gives beside a raw copy."""
