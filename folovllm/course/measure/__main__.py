"""`python -m folovllm.course.measure PART` repeats what a chapter measured."""

from folovllm.course.measure.course import main

main()
