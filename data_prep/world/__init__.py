"""The synthetic driving world: layout of scenes, ray-traced cameras and lidar, nuScenes tables."""
