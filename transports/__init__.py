"""The transports that come with specd; `specd.transports.base` says what one is and knows their names."""
