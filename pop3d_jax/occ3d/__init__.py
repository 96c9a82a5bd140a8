"""Scores on Occ3D-nuScenes' grid, for our networks and for anybody's files; the command is `evaluate_occupancy`."""
