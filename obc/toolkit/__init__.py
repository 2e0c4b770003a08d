"""What the commands share: options, sessions, records, and the loops around the solver."""
