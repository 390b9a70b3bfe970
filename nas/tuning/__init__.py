"""A faster schedule for a pipeline that somebody has in a folder, without training and without a data set."""
