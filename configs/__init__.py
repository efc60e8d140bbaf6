"""Presets: one YAML file per target that specd knows by name; `specd.config.presets.Preset` describes their fields."""
