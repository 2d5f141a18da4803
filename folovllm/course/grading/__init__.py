"""The grader of the course's exercises. It needs the repository's `milestones` folder and the `test` extra."""
