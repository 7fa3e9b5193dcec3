"""The ground floor: errors, launchers, progress, files, values, command lines. It imports no other room."""
