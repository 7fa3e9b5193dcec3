"""Share errors, launchers, progress, files, values and command lines among all folders. It imports none of them."""
