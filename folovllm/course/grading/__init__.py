"""The grader of the course's exercises: it needs the repository's `milestones` folder and the `test` extra."""
