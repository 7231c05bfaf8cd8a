"""What people look at: grids, plots, a page."""
