"""Presets: one YAML file per target that specd knows by name; `specd.config.settings.Preset` describes their fields."""
