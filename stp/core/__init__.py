"""The protocol itself, sans-IO."""
