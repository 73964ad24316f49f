"""Side-by-side timings, as CSV files with the machine they come from."""
