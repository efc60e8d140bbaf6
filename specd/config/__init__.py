"""Configuration: every setting as data, read from YAML files and `--set a.b=c`."""
