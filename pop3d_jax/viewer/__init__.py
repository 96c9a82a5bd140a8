"""One self-contained HTML page that shows exported grids, and a small server for phrases typed in it."""
