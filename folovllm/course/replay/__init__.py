"""Turns a recorded run of the engine into one HTML page that replays it."""
