"""Score predictions: strings, boxes and images in, numbers and figures out. Uses no process group."""
