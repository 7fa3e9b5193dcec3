"""Score predictions: strings, boxes and images in, numbers and pictures out. Uses no process group."""
