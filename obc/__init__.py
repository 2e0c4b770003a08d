"""The toolkit's own packages; see docs/design.md for which may import which."""
