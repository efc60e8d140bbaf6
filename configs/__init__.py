"""Presets: one YAML file per target that specd knows by name; `specd.config.Preset` describes their fields."""
