"""The transports that come with specd, one module each; `specd.transport` says what one is and knows their names."""
