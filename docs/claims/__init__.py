"""The numbers of the course and where they come from. `registry` has all of them; pages and labs read it."""
