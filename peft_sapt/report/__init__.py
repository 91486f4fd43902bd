"""Reports of a grid's results: tables as Markdown, LaTeX and CSV, and pictures."""
