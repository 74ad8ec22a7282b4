"""Pages of runs and comparisons: one HTML file each, without scripts or pictures from elsewhere."""
