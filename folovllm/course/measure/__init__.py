"""The measurements behind the chapters: `python -m folovllm.course.measure`."""
