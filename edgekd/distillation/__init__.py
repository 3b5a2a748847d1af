"""Teaching a student: cached teacher outputs, objectives, stages, the training loops."""
