"""Files of science as stacks of 2-D slices."""
