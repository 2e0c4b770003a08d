"""What all commands share: options, errors, signals, records, resuming."""
