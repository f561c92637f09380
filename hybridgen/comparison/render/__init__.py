"""Results for readers: tables, plots, a page, files."""
