"""A run of the engine as one file, and that file as one page that replays it in a browser."""
