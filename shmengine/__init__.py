"""shmengine."""
