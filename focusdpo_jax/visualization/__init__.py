"""Images for people: grids, contact sheets, charts."""
