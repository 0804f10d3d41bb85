"""Input and output: images, audio, tar archives, files, result files and the console."""
