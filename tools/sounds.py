from data import SOUNDS, write_lessons, write_scenes, write_sounds  # noqa: F401
