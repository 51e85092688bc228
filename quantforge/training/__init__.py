"""Training a student towards a teacher: the loop, what of the student is trained, and what is kept."""
