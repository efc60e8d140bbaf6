"""Training, export and evaluation of drafts."""
