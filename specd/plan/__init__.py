"""What a training costs, from rates alone."""
